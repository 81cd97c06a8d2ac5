"""The tensors of somebody else's checkpoint: by which name and in which layout they hold a memory's parameters.

An architecture has one table, `tensors()`: path of a parameter -> where it is found. Reading and writing both follow
it, and so do the golden tests, whose files keep the names of flash-linear-attention.

    {"w_q": matrix("q_proj.weight"), "conv": depthwise(("q_conv1d.weight", 64), ("k_conv1d.weight", 64))}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Layout = Literal["same", "matrix", "depthwise"]


class Tensor(NamedTuple):
    """Where one parameter is found.

    parts: names, and how much of the parameter's last axis each holds (None: all of it), in order.
    layout: "same"; "matrix", PyTorch's [out, in]; "depthwise", PyTorch's depthwise Conv1d [channels, 1, width].
    """

    parts: tuple[tuple[str, int | None], ...]
    layout: Layout = "same"


def same(name: str) -> Tensor:
    """A tensor in our layout."""
    return Tensor(((name, None),))


def matrix(*parts: str | tuple[str, int]) -> Tensor:
    """The weight of a Linear layer; of several side by side with the widths of their outputs."""
    return Tensor(tuple((p, None) if isinstance(p, str) else p for p in parts), "matrix")


def depthwise(*parts: str | tuple[str, int]) -> Tensor:
    """The weight of a depthwise Conv1d; of several side by side with their channels."""
    return Tensor(tuple((p, None) if isinstance(p, str) else p for p in parts), "depthwise")


def read(table: Mapping[str, Tensor], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, by name, of a memory with this table. Differentiable. KeyError names a missing tensor."""
    turn: dict[Layout, Callable[[Any], Any]] = {
        "same": lambda a: a,
        "matrix": lambda a: a.T,
        "depthwise": lambda a: a[:, 0].T,
    }
    return {
        path: jnp.concatenate([turn[t.layout](jnp.asarray(arrays[name])) for name, _ in t.parts], -1)
        for path, t in table.items()
    }


def write(table: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: the tensors of somebody else's checkpoint. `params` may also be their gradients."""
    turn: dict[Layout, Callable[[Any], Any]] = {
        "same": lambda a: a,
        "matrix": lambda a: a.T,
        "depthwise": lambda a: a.T[:, None],
    }
    found = {}
    for path, t in table.items():
        at = 0
        for name, width in t.parts:
            end = params[path].shape[-1] if width is None else at + width
            found[name] = turn[t.layout](params[path][..., at:end])
            at = end
    return found
