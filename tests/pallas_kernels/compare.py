"""How the tests of the ops compile and compare."""

import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.compat import QUICK_COMPILE


def compiled(f, **options):
    return jax.jit(f, compiler_options=QUICK_COMPILE, **options)


def error(x: Any, ref: Any) -> float:
    """rms(x - ref) / rms(ref), rms(x) where ref is 0 everywhere, inf where x is not finite."""
    x, ref = np.asarray(x, np.float64), np.asarray(ref, np.float64)
    if x.size == 0:
        return 0.0
    scale = np.sqrt(np.mean(ref**2))
    return float(np.sqrt(np.mean((x - ref) ** 2)) / (scale or 1.0)) if np.isfinite(x).all() else np.inf


def assert_close(got: dict[str, Any], want: dict[str, Any], limits: dict[str, float]) -> None:
    """Every array by its name. limits: by name, "" for all others."""
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    wrong = {n: f"{e:.1e}" for n, e in errors.items() if not e <= limits.get(n, limits[""])}
    assert not wrong, f"error relative to the norm: {wrong}; limits {limits}"


@functools.cache
def value_and_gradients(op):
    """The compiled function (arrays, start, cotangents) -> o, final_state and grad_<name> for every array.

    The gradients are those of sum(o * do) + sum(final_state * dS). Kept per op, so that cases of one shape share it.
    """

    def loss(arrays, start, cotangents):
        o, state = op(**arrays, start=start)
        do, dS = (ct.astype(a.dtype) for ct, a in zip(cotangents, (o, state), strict=True))
        return (o * do).astype(state.dtype).sum() + (state * dS).sum(), (o, state)

    @compiled
    def run(arrays, start, cotangents):
        gradients, (o, state) = jax.grad(loss, has_aux=True)(arrays, start, cotangents)
        return {"o": o, "final_state": state, **{f"grad_{name}": g for name, g in gradients.items()}}

    return run
