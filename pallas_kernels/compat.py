"""The differences between jax versions, all of them here."""

from typing import Any

import jax
from jax import Array, lax


def varying_axes(x: Array) -> frozenset[str]:
    """The manual mesh axes over which x differs between devices; empty outside `shard_map`."""
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def match_varying(tree: Any, *refs: Any) -> Any:
    """`tree` with every array marked as varying over each manual axis over which any array of tree or refs varies.

    A scan under `shard_map(check_vma=True)` needs a carry of one type from first to last, and a state of zeros, or one
    replicated over an axis, becomes varying at its first meeting with varying inputs.
    """
    axes = frozenset().union(*(varying_axes(a) for a in jax.tree.leaves((tree, refs))))

    def mark(a: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(a)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(mark, tree)
