"""Synthetic recall tasks and evaluations: each a deterministic generator and a metric.

`SETTINGS` holds the published difficulties by name, as `memjax eval --list-tasks` shows them.
"""

from collections.abc import Mapping
from types import MappingProxyType

from memjax.tasks import induction, mqar, passkey, ruler, selective_copying, state_tracking
from memjax.tasks.task import IGNORE as IGNORE
from memjax.tasks.task import Examples as Examples
from memjax.tasks.task import Score as Score
from memjax.tasks.task import Setting as Setting
from memjax.tasks.task import Task as Task
from memjax.tasks.task import score as score

_MODULES = (mqar, selective_copying, induction, passkey, ruler, state_tracking)

SETTINGS: Mapping[str, Setting] = MappingProxyType({n: s for module in _MODULES for n, s in module.SETTINGS.items()})
