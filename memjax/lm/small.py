"""Small models of any memory of the catalog: what memories are compared by on recall tasks.

mixers = small_mixers("gated_delta_net", dim=64, layers=2)
model = small_model(mixers, vocab=128)
params = small_params(model, jax.random.key(0))
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from memjax.blocks import FeedForward
from memjax.catalog import CATALOG, Part, with_parts
from memjax.combinators import Residual, Stack
from memjax.errors import ConfigError
from memjax.in_context.canon import Canon
from memjax.lm.model import LanguageModel
from memjax.memory import Memory, Param, from_config, named


def small_mixers(
    name: str,
    *,
    dim: int = 64,
    layers: int = 2,
    head_dim: int = 16,
    window: int = 64,
    vocab: int = 128,
    **fields: Any,
) -> tuple[Memory, ...]:
    """The memory of this name in the catalog, once for each layer, with one head of head_dim x head_dim where its class
    has fields for that (two heads, or the sizes of the catalog's small instance, where it refuses them). An output gate
    that a class can do without is left out: layers of the memory alone.

    window: of memories that have one. vocab: of those indexed by tokens. fields: any fields of the class, before all
    else; a `Part` (memjax.catalog) where a field is a memory.

    Raises:
      ConfigError: a field that the class doesn't have, or sizes that don't fit together.
    """
    return tuple(_mixer(name, _Sizes(dim, head_dim, window, vocab, i, layers), fields) for i in range(layers))


class _Sizes(NamedTuple):
    """What small instances have alike."""

    dim: int
    head_dim: int
    window: int
    vocab: int
    layer: int
    layers: int


def _mixer(name: str, sizes: _Sizes, fields: dict[str, Any]) -> Memory:
    """One head; two where one is refused; else as in the catalog, at this width. The fields that are given come last:
    one that doesn't fit is an error, not a reason for other sizes."""
    known, one = CATALOG[name], _usual(name, sizes)

    def build(values: dict[str, Any]) -> Memory:
        part = lambda part: _mixer(part.name, sizes, dict(part.fields))  # noqa: E731
        return from_config({"class": known.path, **{n: with_parts(v, part) for n, v in values.items()}})

    def fits(values: dict[str, Any]) -> bool:
        try:
            return build(values) is not None
        except ConfigError:
            return False

    two = one | ({"heads": 2} if "heads" in one else {})
    values = next(filter(fits, (one, two, {**known.small, "dim": sizes.dim})), one)
    return build(values | fields)


def _usual(name: str, sizes: _Sizes) -> dict[str, Any]:
    """Values for the fields of a class that bear a usual name, and of the catalog for others without a default."""
    parameters, small = inspect.signature(CATALOG[name].cls).parameters, CATALOG[name].small
    share = sizes.head_dim / sizes.dim
    usual = {
        "dim": sizes.dim,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": sizes.head_dim,
        "expand_k": share,
        "expand_v": 1.0 if "head_dim" in parameters else share,
        "feature_dim": sizes.head_dim,
        "head_v_dim": sizes.head_dim,
        "state_size": sizes.head_dim,
        "use_short_conv": True,
        "use_gate": False,
        "window": sizes.window,
        "hidden": 2 * sizes.dim,
        "vocab": sizes.vocab,
        **({"layer": sizes.layer, "layers": sizes.layers} if "layer" in parameters else {}),
    }
    needed = {n: small[n] for n, p in parameters.items() if p.default is p.empty and n in small}
    usual = {n: v for n, v in usual.items() if n in parameters and not isinstance(needed.get(n), Part)}
    return needed | usual


def small_model(
    mixer: Memory | Sequence[Memory],
    vocab: int,
    *,
    layers: int = 2,
    hidden: int | None = None,
    conv: int | None = None,
) -> LanguageModel:
    """Embedding, pre-norm residual layers of the mixer, norm, the embedding again.

    Args:
      mixer: the same in each of `layers` layers, or one for each layer (then `layers` is not read).
      vocab: token ids.
      hidden: width of a feed-forward block behind each mixer; None: none.
      conv: taps of a Canon convolution in front of each mixer, 0 for none. None: 4 where the mixer has no convolution
        of its own, as in Zoology, where every mixer has one.
    """
    blocks: list[Memory] = []
    for m in (mixer,) * layers if isinstance(mixer, Memory) else mixer:
        width = (0 if has_convolution(m) else 4) if conv is None else conv
        blocks.append(Residual(Stack((Canon(m.dim, width), m)) if width else m))
        if hidden:
            blocks.append(Residual(FeedForward(m.dim, hidden)))
    return LanguageModel(Stack(tuple(blocks)), vocab)


def small_params(model: Memory, key: Array) -> dict:
    """`model.init(key)`, but every rate of decay that heads draw by chance is 1, the least of Mamba-2's (A_log is 0).

    Of many heads some always draw a rate at which a pair outlives the question; a layer with one head may not, and then
    learns nothing for the first thousand updates.
    """

    def slow(path: Any, param: Param, value: Array) -> Array:
        return jnp.zeros_like(value) if path[-1].key == "A_log" and param.axes[-1] == "heads" else value

    return jax.tree_util.tree_map_with_path(slow, model.param_specs(), model.init(key))


def has_convolution(memory: Memory) -> bool:
    """Whether a parameter of the memory is a convolution, by its name."""
    return any("conv" in name for name in named(memory.param_specs()))
