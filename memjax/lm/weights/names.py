"""Where the parameters of a whole model are found: the tables of its parts, put together as the model is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from memjax.blocks import FeedForward
from memjax.combinators import Repeat, Residual, Stack
from memjax.lm.model import LanguageModel
from memjax.lm.rwkv import Normed
from memjax.memory import Memory
from memjax.tensors import Tensor, matrix, same

FEED_FORWARD: Mapping[str, Tensor] = MappingProxyType(
    {
        "w_gate": matrix("gate_proj.weight"),
        "w_up": matrix("up_proj.weight"),
        "w_down": matrix("down_proj.weight"),
    }
)


class Layer(NamedTuple):
    """Where the parameters of a layer are, in our model and in the file.

    path: of the parameters, "body.1.". index: its place along the axis of a `Repeat`; None: it is in none.
    prefix: of the tensors, "model.layers.3.". table: the rest of the names, by the rest of the path.
    """

    path: str
    index: int | None
    prefix: str
    table: dict[str, Tensor]


class Published(NamedTuple):
    """A model, and its layers; the first of them is what stands around the others."""

    model: LanguageModel
    layers: list[Layer]


class Run(NamedTuple):
    """n equal layers on top of each other (None: one, in no `Repeat`), and the names in one, as for `table_of`."""

    layer: Memory
    names: Any
    n: int | None


def stacked(runs: list[Run], prefix: str) -> tuple[Memory, list[Layer]]:
    """The body of some runs, one above the other, and its layers, numbered through in the names."""
    parts, layers = [], []
    for j, (layer, names, n) in enumerate(runs):
        parts.append(layer if n is None else Repeat(layer, n))
        path, table = "body." if len(runs) == 1 and n is not None else f"body.{j}.", table_of(layer, names)
        for i in (None,) if n is None else range(n):
            layers.append(Layer(path, i, f"{prefix}{len(layers)}.", table))
    return parts[0] if len(runs) == 1 and runs[0].n is not None else Stack(tuple(parts)), layers


def around(model: LanguageModel, layers: list[Layer], embed: str, norm: dict[str, Tensor]) -> Published:
    """A model and its layers, with the names of its embedding and of its last norm."""
    head = {} if model.tied else {"head": matrix("lm_head.weight")}
    return Published(model, [Layer("", None, "", {"embed": same(embed), **norm, **head}), *layers])


def table_of(memory: Memory, names: Any) -> dict[str, Tensor]:
    """Where the parameters of a memory are found. names: of a stack, those of its blocks; of x + memory(norm(x)), those
    of the norm and of the memory; of any other, what stands before the names in its own table."""
    if isinstance(memory, Stack):
        parts = (under(f"{i}.", "", table_of(m, n)) for i, (m, n) in enumerate(zip(memory.blocks, names, strict=True)))
        return {path: tensor for part in parts for path, tensor in part.items()}
    if isinstance(memory, Residual):
        return {"norm": same(names[0]), **under("memory.", "", table_of(memory.memory, names[1]))}
    if isinstance(memory, Normed):
        norm, inner = table_of(memory.norm, names[0]), table_of(memory.memory, names[1])
        return {**under("norm.", "", norm), **under("memory.", "", inner)}
    return under("", names, FEED_FORWARD if isinstance(memory, FeedForward) else memory.tensors())


def under(path: str, prefix: str, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A table whose paths and names begin with these."""
    return {
        path + p: Tensor(tuple((prefix + name, width) for name, width in t.parts), t.layout) for p, t in table.items()
    }
