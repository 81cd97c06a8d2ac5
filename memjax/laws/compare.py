"""Comparing arrays, and saying where they differ."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32, FLOAT64 = 5e-5, 1e-8  # largest error, relative to the largest number of the array


class Broken(Exception):
    """A law does not hold; the message says where."""


class NotApplicable(Exception):
    """A law has nothing to say about this memory; the message says why."""


def same(got, want, what: str, where: str = "", valid=None, *, error: float = FLOAT32, places=None) -> None:
    """Raises Broken at the first entry of got that differs; its first two axes are row and token, or `places` says."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise Broken(f"{what} is {list(got.shape)}, not {list(want.shape)}{where}")
    gap = np.abs(np.subtract(got, want, where=got != want, out=np.zeros_like(got)))
    if valid is not None:
        gap = np.where(beside(valid, gap), gap, 0)
        want = np.where(beside(valid, want), want, 0)
    size = np.abs(want[np.isfinite(want)]).max(initial=0)
    off = ~(gap <= error * (0.1 + size))
    if not off.any():
        return
    first = tuple(np.argwhere(off)[0])
    at = "" if places == () else " at row {}, token {}".format(*(first if places is None else places[first[0]]))
    raise Broken(f"{what} off by {gap[first]:.1e}{at}{where}")


def same_state(got, want, where: str = "", *, error: float = FLOAT32, label: str = "state") -> None:
    """Raise Broken where two states differ by more than rounding."""
    for (name, a), b in zip(named(got, label), jax.tree.leaves(want), strict=True):
        same(a, b, name, where, error=error, places=())


def named(tree, label: str = "state"):
    """(path, leaf) of a tree."""
    return [(path_name(path, label), a) for path, a in jax.tree_util.tree_leaves_with_path(tree)]


def path_name(path, label: str) -> str:
    """A path as one reads it."""
    return ".".join([label, jax.tree_util.keystr(path, simple=True, separator=".")]).rstrip(".")


def beside(mask, like):
    """A mask with axes added to stand beside `like`."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def to_numpy(tree):
    """A tree with numpy leaves."""
    return jax.tree.map(np.asarray, tree)


def is_float(a) -> bool:
    """Whether an array holds floats."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def rms(a) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) if a.size else 0.0


def count(n: int, what: str) -> str:
    """A number with its noun."""
    return f"{n} {what}{'' if n == 1 else 's'}"
