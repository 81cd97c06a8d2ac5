"""The inputs that the ops are checked and timed on."""

import jax
import numpy as np
import pytest

from memjax.bench.cases import CASES, GATES, STATES, Shape, masks, on_device, select

SHAPE = Shape(2, 9, 3, 4, "bfloat16")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inputs_fit_the_op_and_its_dtypes(case):
    """Numbers are those that the narrow dtype holds, so that the float64 reference sees the same."""
    drawn = case.draw(np.random.default_rng(0), SHAPE)
    narrow, wide = on_device(drawn, SHAPE.dtype), on_device(drawn, "float32")
    for name, x in narrow.items():
        dtype = "float32" if name in (*GATES, *STATES) else "bfloat16"
        assert {a.dtype.name for a in jax.tree.leaves(x)} == {dtype}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("float32"), b), x, wide[name])
    masked = masks(np.random.default_rng(0), SHAPE)
    o, state = jax.eval_shape(case.bind(None), **narrow, **masked)
    assert jax.tree.leaves(o)[0].shape[:2] == (2, 9)
    given = jax.tree.leaves([narrow[name] for name in STATES if name in narrow])
    assert [a.shape for a in jax.tree.leaves(state)] == [a.shape for a in given]


def test_hard_inputs_are_hard():
    drawn = CASES["delta_rule/channel"].draw(np.random.default_rng(0), Shape(1, 200, 1, 16), "hard")
    k, beta, g = drawn["k"][0, :, 0], drawn["beta"], drawn["log_decay"]
    assert np.mean(k @ k.T) > 0.8
    assert {0.0, 2.0} < set(np.unique(beta)) and beta.max() == 2
    assert {0.0, -20.0} < set(np.unique(g)) and g.max() == 0


def test_alike_inputs_part_no_tokens():
    drawn = CASES["delta_rule/channel"].draw(np.random.default_rng(0), Shape(1, 200, 1, 16), "alike")
    k, beta, g = drawn["k"][0, :, 0], drawn["beta"], drawn["log_decay"]
    assert np.mean(k @ k.T) > 0.8
    assert set(np.unique(beta)) == {2.0} and -0.01 <= g.min() < g.max() <= 0
    masked = masks(np.random.default_rng(0), Shape(1, 200, 1, 16), "alike")
    assert masked["valid"].all() and not masked["start"].any()


def test_draws_repeat():
    first, second = (CASES["dplr_delta_rule"].draw(np.random.default_rng(3), SHAPE) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_select():
    assert [case.name for case in select(())] == list(CASES)
    assert [case.name for case in select(("short_conv", "linear_attention/head"))] == [
        "linear_attention/head",
        "short_conv",
    ]
    assert {case.op for case in select(("delta_rule",))} == {"delta_rule"} and len(select(("delta_rule",))) > 3
    with pytest.raises(KeyError, match="'delta'"):
        select(("delta",))
