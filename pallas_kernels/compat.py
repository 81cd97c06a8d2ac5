"""The differences between jax versions, all of them here."""

from typing import Any

import jax
from jax import Array, lax

# For programs that are slower to compile well than to run: leaves out XLA passes that change speed, not results.
QUICK_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # the slow emitters can be switched off only there; later ones refuse the name
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False


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
