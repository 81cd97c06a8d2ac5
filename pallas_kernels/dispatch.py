"""What every op does before its mathematics: choose an implementation, check its arguments, choose a dtype."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

SHORT = 16
"""Up to this many tokens None means the token recurrence: its program is several times smaller than that of the chunk
form, and nothing is left to win from chunks."""


def choose(op: str, implementation: str | None, available: Sequence[str], default: str) -> str:
    """The name of the implementation to run: `default` for None. A name that is not available raises ValueError."""
    if implementation is None:
        return default
    if implementation not in available:
        raise ValueError(f"{op}: implementation is {implementation!r}, needs None or one of {', '.join(available)}")
    return implementation


def check_shape(op: str, name: str, array: Array | None, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError if an array that is given has none of the allowed shapes."""
    if array is not None and array.shape not in allowed:
        needed = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{op}: {name} has shape {list(array.shape)}, needs {needed}")


def check_rank(op: str, name: str, array: Array, axes: str) -> None:
    """Raises ValueError if the array has not the axes that the string of names counts, or has an axis of size 0."""
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise ValueError(f"{op}: {name} has shape {list(array.shape)}, needs [{axes}], each at least 1")


def check_bool(op: str, name: str, array: Array | None) -> None:
    """Raises ValueError if an array that is given is not boolean."""
    if array is not None and array.dtype != jnp.bool:
        raise ValueError(f"{op}: {name} has dtype {array.dtype}, needs bool")


def accumulator(*arrays: Array | None) -> DTypeLike:
    """The dtype to accumulate in: float64 if any array has it, else float32."""
    return jnp.float64 if any(a is not None and a.dtype == jnp.float64 for a in arrays) else jnp.float32


def check_chunk_size(op: str, chunk_size: int) -> None:
    """Raises ValueError unless chunk_size is a power of two: chunks are halved again and again."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size is {chunk_size}, needs a power of two")
