"""How the tests of the ops run, compile and compare."""

import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.compat import QUICK_COMPILE
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import Case


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
def value_and_gradients(op, **settings):
    """The compiled function (arrays, masks, cotangents) -> o, final_state and grad_<name> for every array.

    The gradients are those of sum(o * do) + sum(final_state * dS). Kept per op and settings, so that cases of one shape
    share it.
    """

    def loss(arrays, masks, cotangents):
        o, state = op(**arrays, **masks, **settings)
        do, dS = (ct.astype(a.dtype) for ct, a in zip(cotangents, (o, state), strict=True))
        return (o * do).astype(state.dtype).sum() + (state * dS).sum(), (o, state)

    @compiled
    def run(arrays, masks, cotangents):
        gradients, (o, state) = jax.grad(loss, has_aux=True)(arrays, masks, cotangents)
        return {"o": o, "final_state": state, **{f"grad_{name}": g for name, g in gradients.items()}}

    return run


def settings(case: Case, implementation: str, **more: Any) -> dict[str, Any]:
    """What is static of a case. more: settings of the op beyond it."""
    if case.n > 1:
        more["num_householder"] = case.n
    if implementation != "reference":  # the recurrence has no chunks
        more["chunk_size"] = case.chunk_size
    return {"implementation": implementation, **more}


def run(case: Case, implementation: str, dtype: Any = np.float64, **more: Any) -> dict[str, jax.Array]:
    """Values and gradients of a case. more: settings of the op beyond it."""
    arrays, cotangents = cases.arrays(case, dtype)
    return value_and_gradients(case.op, **settings(case, implementation, **more))(arrays, cases.masks(case), cotangents)


@functools.cache
def expected(case: Case, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """The same by the recurrence in float64, of the arrays rounded to dtype.

    It is not told what is valid and how long the sequence is: tokens that change nothing stand in the place of invalid
    ones and after the last. So it needs one program for cases that differ in no more.
    """
    arrays, (do, dS) = jax.tree.map(lambda a: a.astype(np.float64), cases.arrays(case, dtype))
    more = max(cases.T - case.t, 0)

    def lengthen(a, rows):
        return np.pad(a, [(0, 0), (0, rows)] + [(0, 0)] * (a.ndim - 2))

    state = {name: arrays.pop(name) for name in ("initial_state",) if name in arrays}
    tokens = {name: lengthen(a, more * (a.shape[1] // case.t)) for name, a in cases.fill(case, arrays, 0.0).items()}
    start = cases.masks(case).get("start", np.zeros((do.shape[0], case.t), bool))
    with jax.enable_x64(True):
        reference = value_and_gradients(case.op, **settings(case, "reference"))
        found = reference(tokens | state, {"start": lengthen(start, more)}, (lengthen(do, more), dS))
    found = {name: np.asarray(a) for name, a in found.items()}
    for name, a in {"o": do, **{f"grad_{name}": a for name, a in arrays.items()}}.items():
        found[name] = found[name][:, : a.shape[1]]
    return cases.fill(case, found, 0.0)
