"""Every implementation of the recurrences against the token recurrence in float64, and that against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dplr_delta_rule import dplr_delta_rule as dplr
from pallas_kernels.linear_attention import IMPLEMENTATIONS
from pallas_kernels.linear_attention import linear_attention as linear
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import VARIANTS
from tests.pallas_kernels.compare import assert_close, compiled, error, expected, run, settings

FAST_FORMS = [name for name in IMPLEMENTATIONS if name != "reference"]
OF_GATES = ("grad_log_decay", "grad_beta", "grad_erase", "grad_write")


def by_name(table):
    return pytest.mark.parametrize("case", table, ids=lambda case: case.name)


@pytest.mark.parametrize("implementation", FAST_FORMS)
@by_name(cases.NAMED)
def test_equals_the_recurrence(case, implementation):
    with jax.enable_x64(True):
        assert_close(run(case, implementation), expected(case), {"": 1e-12, "grad_log_decay": 1e-11})


@by_name([v._replace(name=f"{v.name}-masks", valid="random", start="dense") for v in cases.PLAIN.values()])
def test_masks_of_the_recurrence_itself(case):
    with jax.enable_x64(True):
        assert_close(run(case, "reference"), expected(case), {"": 1e-14})


@by_name([v._replace(name=f"{v.name}-formula", t=9, valid="random", start="dense") for v in VARIANTS])
def test_the_recurrence_is_the_formula(case):
    """In matrices, as in the papers, one head and one token after another."""
    x, masks = cases.arrays(case)[0], cases.masks(case)
    with jax.enable_x64(True):
        op = compiled(functools.partial(case.op, **settings(case, "reference")))
        o, final = map(np.asarray, op(**x, **masks))
    valid, start = masks["valid"], masks["start"]
    b, t, h, _ = o.shape
    for row, j in np.ndindex(b, h):
        S, eye = x["initial_state"][row, j], np.eye(x["q"].shape[-1])
        for i in range(t):
            S = 0 * S if start[row, i] else S
            if not valid[row, i]:
                np.testing.assert_array_equal(o[row, i, j], 0)
                continue
            decay = np.exp(x["log_decay"][row, i, j]) * eye if "log_decay" in x else eye
            for r in range(i * case.n, (i + 1) * case.n):
                k, v = x["k"][row, r, j // case.groups], x["v"][row, r, j]
                if case.op is linear:
                    S = decay @ S + np.outer(k, v)
                elif case.op is dplr:
                    S = (decay + np.outer(x["b"][row, r, j], x["a"][row, r, j])) @ S + np.outer(k, v)
                elif case.rates == "beta":
                    beta = x["beta"][row, r, j]
                    S = (eye - beta * np.outer(k, k)) @ decay @ S + beta * np.outer(k, v)
                else:
                    erase, write = x["erase"][row, r, j], x["write"][row, r, j]
                    S = (eye - np.outer(k, erase * k)) @ decay @ S + np.outer(k, write * v)
                decay = eye
            np.testing.assert_allclose(o[row, i, j], S.T @ x["q"][row, i, j // case.groups], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(final[row, j], S, rtol=1e-11, atol=1e-12)


# Chunks of 64 with sums of log decays of hundreds, where differences of cumulative sums have lost a one-step decay; and
# keys so alike that an inverse by powers of A has lost everything.
FAMOUS = ("linear-head", "linear-channel", "beta-none", "beta-head", "beta-channel", "gates-channel", "dplr")
WIDE = [variant._replace(t=150, chunk_size=64) for variant in VARIANTS if variant.name in FAMOUS]
GATED = [v._replace(name=f"{v.name}-wide-gates", start="inside", valid="middle") for v in WIDE if v.decay != "none"]
ALIKE = [
    v._replace(name=f"{v.name}-wide-alike-{beta}", keys="similar", beta=beta, gates="mild", start="edges")
    for v in WIDE
    if v.op is not linear
    for beta in (1, 2)
]


@pytest.mark.parametrize("implementation", FAST_FORMS)
@by_name(GATED + ALIKE)
def test_float32_stays_close_to_float64(case, implementation):
    got = run(case, implementation, np.float32)
    assert got["final_state"].dtype == jnp.float32
    # beta = 2: reflections, whose rounding errors never decay
    assert_close(got, expected(case, np.float32), {"": 2e-5 if case.beta == 2 else 2e-6})


@pytest.mark.parametrize("implementation", FAST_FORMS)
@by_name(
    [
        v._replace(name=f"{v.name}-bfloat16", gates="mild", start="inside")
        for v in [v for v in VARIANTS if v.name in FAMOUS[:2] + FAMOUS[3:]] + cases.MANY_CHUNKS
    ]
)
def test_bfloat16(case, implementation):
    """The output is rounded once (2e-3), gradients on their way through several products."""
    got = run(case, implementation, jnp.bfloat16)
    assert got["o"].dtype == got["grad_q"].dtype == jnp.bfloat16
    assert got["final_state"].dtype == jnp.float32
    limits = {"": 8e-3, "o": 5e-3, "final_state": 5e-3, **dict.fromkeys(OF_GATES, 2e-2)}
    assert_close(got, expected(case, jnp.bfloat16), limits)


@pytest.mark.parametrize("inverse_precision", ["bf16x3", "bf16"])
@by_name([case for case in ALIKE if case.name.startswith(("beta-head", "gates-channel", "dplr"))])
def test_inverse_precision(case, inverse_precision):
    """What each costs with the keys that are hardest to invert; with float32, the default, it is the test above."""
    limit = {"bf16x3": {1: 5e-5, 2: 1e-3}, "bf16": {1: 1.5e-2, 2: 0.15}}[inverse_precision][case.beta]
    got = run(case, "xla", np.float32, inverse_precision=inverse_precision)
    assert_close(got, expected(case, np.float32), {"": limit})
    assert error(got["o"], expected(case, np.float32)["o"]) > limit / 100, "the setting has no effect"
