"""memjax: memory architectures for sequence models as pure functions over explicit state, all under one contract."""

from memjax.combinators import Gate as Gate
from memjax.combinators import Repeat as Repeat
from memjax.combinators import Residual as Residual
from memjax.combinators import Stack as Stack
from memjax.combinators import pattern as pattern
from memjax.combinators import total as total
from memjax.memory import How as How
from memjax.memory import Memory as Memory
from memjax.memory import Param as Param
from memjax.memory import Slot as Slot
from memjax.memory import from_config as from_config
from memjax.memory import to_config as to_config

__version__ = "0.1.0.dev0"
