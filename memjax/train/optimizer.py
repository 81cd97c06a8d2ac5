"""The optimizer: Muon for matrices, Adam for everything else, each with its own warm-up and cosine decay.

The group of a parameter is declared once, as `Param.kind`. "matrix" goes to Muon (Jordan et al., "Muon: An optimizer
for hidden layers in neural networks", 2024; `optax.contrib.muon`), which replaces the momentum of a linear map by a
nearby orthogonal matrix; "embedding", "vector" and "gate" go to Adam (Kingma and Ba, arXiv:1412.6980).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from memjax.errors import ConfigError
from memjax.memory import Memory, Param


def make_optimizer(
    memory: Memory | dict[str, Any],
    *,
    steps: int,
    learning_rate: float = 0.01,
    adam_learning_rate: float = 0.005,
    warmup: int | None = None,
    min_ratio: float = 0.1,
    weight_decay: float = 0.0,
    b2: float = 0.95,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer for the parameters of `memory`.

    Args:
      memory: a Memory, or its `param_specs()`: a nested dict of `Param` in the structure of the parameters.
      steps: number of updates; both schedules end there and stay at their last value.
      learning_rate: peak of Muon's, the spectral norm of a step (times sqrt(out / in) where a map widens).
      adam_learning_rate: peak of Adam's, about the largest change of one entry in a step.
      warmup: updates of linear warm-up; None: 5 % of `steps`.
      min_ratio: learning rate at the end over the peak, in [0, 1].
      weight_decay: decoupled, times the learning rate; matrices only.
      b2: Adam's decay of the second moment.
      clip: largest global norm of the gradient; None: no clipping.

    A matrix with leading axes (layers stacked by `Repeat`, one map per head) is orthogonalised per layer and head.

    Raises:
      ConfigError: warmup beyond steps, a kind that is not known, or a matrix of fewer than two dimensions.
    """
    specs = memory.param_specs() if isinstance(memory, Memory) else memory
    jax.tree_util.tree_map_with_path(_check, specs)
    warmup = round(0.05 * steps) if warmup is None else warmup
    if not 0 <= warmup < steps:
        raise ConfigError(f"make_optimizer: warmup is {warmup}, needs 0 <= warmup < steps = {steps}")
    if not 0 <= min_ratio <= 1:
        raise ConfigError(f"make_optimizer: min_ratio is {min_ratio}, needs a number in [0, 1]")

    def schedule(peak: float) -> optax.Schedule:
        # The ramp begins at peak / warmup: beginning at 0 would waste the first batch.
        start = peak / max(warmup, 1)
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, steps, end_value=min_ratio * peak)

    adam = schedule(adam_learning_rate)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "matrix": muon(schedule(learning_rate), weight_decay=weight_decay, muon_weight_dimension_numbers=_last_two),
        "embedding": optax.adam(adam, b2=b2),  # decay would wear out the rows of rare tokens
        "vector": optax.adam(adam, b2=b2),
        "gate": optax.adam(adam, b2=b2),
    }
    update = optax.partition(groups, jax.tree.map(lambda spec: spec.kind, specs))
    return lenient(update if clip is None else optax.chain(optax.clip_by_global_norm(clip), update))


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same under jax's standard dtype promotion: optax takes floats to int32 powers, an error when strict."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _last_two(params):
    return jax.tree.map(lambda w: MuonDimensionNumbers(reduction_axis=w.ndim - 2, output_axis=w.ndim - 1), params)


def _check(path, spec: Param) -> None:
    name = jax.tree_util.keystr(path)
    if spec.kind not in ("matrix", "embedding", "vector", "gate"):
        raise ConfigError(f"params{name}: kind is {spec.kind!r}, needs 'matrix', 'embedding', 'vector' or 'gate'")
    if spec.kind == "matrix" and len(spec.shape) < 2:
        raise ConfigError(f"params{name}: kind is 'matrix' but shape is {list(spec.shape)}, needs two dimensions")
