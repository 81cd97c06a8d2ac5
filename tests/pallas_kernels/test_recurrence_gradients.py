"""Gradients in float64: random cases against the recurrence and finite differences, and gradients of gradients.

Minutes of compiling: in the slow lane. test_recurrences.py has the named cases.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.linear_attention import IMPLEMENTATIONS
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import MANY_CHUNKS, VARIANTS
from tests.pallas_kernels.compare import assert_close, compiled, expected, settings, value_and_gradients

CONTENTS = st.fixed_dictionaries(
    {
        "name": st.integers(0, 2**32 - 1).map("random-{}".format),  # all numbers of a case follow from its name
        "gates": st.sampled_from(["mild", "mixed", "zero", "strong"]),
        "start": st.sampled_from(["edges", "inside", "dense"]),
        "valid": st.sampled_from(["all", "left", "middle", "right", "random"]),
        "keys": st.sampled_from(["random", "similar"]),
        "beta": st.sampled_from([None, 0, 1, 2]),
        "state": st.sampled_from([1e-3, 1.0, 1e3]),
    }
)
pytestmark = pytest.mark.slow

H = 1e-5  # the step of the differences: their error is h^2 from the function and 1e-16 / h from rounding


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
@pytest.mark.parametrize("variant", VARIANTS + MANY_CHUNKS, ids=lambda variant: variant.name)
@hypothesis.settings(max_examples=8)
@hypothesis.given(content=CONTENTS)
def test_random_cases(variant, implementation, content):
    case = variant._replace(**content)
    with jax.enable_x64(True):
        program, masks = value_and_gradients(case.op, **settings(case, implementation)), cases.masks(case)
        arrays, cotangents = cases.arrays(case)
        got = program(arrays, masks, cotangents)
        assert_close(got, expected(case), {"": 1e-11, "grad_log_decay": 1e-10})

        def outputs(changed):
            values = program(arrays | changed, masks, cotangents)
            return np.concatenate([np.ravel(values[name]) for name in ("o", "final_state")])

        do_dS = np.concatenate([np.ravel(a) for a in cotangents])
        rounding = 1e-16 * np.linalg.norm(outputs({})) * np.linalg.norm(do_dS) / H
        draw = np.random.default_rng(0)
        for name, a in arrays.items():
            direction = draw.standard_normal(a.shape)
            difference = (outputs({name: a + H * direction}) - outputs({name: a - H * direction})) / (2 * H)
            gradient = got[f"grad_{name}"]
            allowed = 1e-6 * np.linalg.norm(gradient) + rounding
            assert abs(np.vdot(difference, do_dS) - np.vdot(gradient, direction)) <= allowed, name


@pytest.mark.parametrize("variant", MANY_CHUNKS, ids=lambda variant: variant.name)
def test_gradients_of_gradients(variant):
    """As a loss has them that holds the gradient of another."""
    case = variant._replace(name="twice", t=19, gates="mild", start="inside", valid="right")
    masks = jax.tree.map(jnp.asarray, cases.masks(case))
    with jax.enable_x64(True):
        arrays, cotangents = cases.arrays(case)
        arrays = cases.fill(case, arrays, 1.0)
        draw = np.random.default_rng(0)
        directions = {name: draw.standard_normal(a.shape) for name, a in arrays.items()}

        def of(implementation):
            def loss(arrays):
                outputs = case.op(**arrays, **masks, **settings(case, implementation))
                return sum((jnp.sin(a) * ct).sum() for a, ct in zip(outputs, cotangents, strict=True))

            def slope(arrays):
                gradients = jax.grad(loss)(arrays)
                return sum((gradients[name] * direction).sum() for name, direction in directions.items())

            return compiled(jax.grad(slope))(arrays)

        want = of("reference")
        for implementation in ("xla", None):
            assert_close(of(implementation), want, {"": 1e-10})
