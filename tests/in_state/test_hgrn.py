"""HGRN against the equations of the paper, one token after another in numpy, and the bounds that layers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Repeat, Stack
from memjax.in_state.hgrn import HGRN
from tests.in_state.layer import above, apply, bad_fields, float64, inputs, projected, rms_norm, sigmoid, silu

SMALL = HGRN(dim=6)
STACK = Stack(tuple(HGRN(dim=6, layer=i, layers=3) for i in range(3)))


def paper(memory, params, x, bound=0.0):
    """y and the final state, in float64, with loops over rows and tokens."""
    p, x = float64(params, x)
    i, f = projected(memory, p, x, "w_i", "w_f")
    f = bound + (1 - bound) * sigmoid(f)
    h, y = np.zeros((len(x), memory.d)), np.zeros_like(x)
    for s in range(x.shape[1]):
        h = f[:, s] * h + silu(i[:, s]) * (1 - f[:, s])
        y[:, s] = (rms_norm(h, p["norm"], memory.norm_eps) * silu(x[:, s] @ p["w_g"])) @ p["w_o"]
    return y, h


@pytest.mark.parametrize(
    "memory",
    [SMALL, HGRN(dim=6, expand_ratio=2, use_short_conv=True, conv_size=3, norm_eps=1e-3)],
    ids=["plain", "wide, convolution"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the scan in place
    y, last = apply(memory, params, state, x)
    want_y, want_h = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last.h, want_h, rtol=1e-4, atol=2e-6)
    y, last = above(memory, params, state, x, 0.3)
    want_y, want_h = paper(memory, params, x, 0.3)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last.h, want_h, rtol=1e-4, atol=2e-6)


def test_a_closed_gate_leaves_only_the_token_itself():
    params, state, x = inputs(SMALL)
    x = jnp.abs(x) + 0.1
    o, _ = SMALL.recall(params | {"w_f": jnp.full((6, 6), -60.0)}, state._replace(h=jnp.ones((2, 6))), x)
    np.testing.assert_allclose(o[:, :, 0], jax.nn.silu(x @ params["w_i"]), rtol=1e-4, atol=1e-6)


def test_an_open_gate_keeps_all():
    params, state, x = inputs(SMALL)
    before = state._replace(h=jnp.arange(12.0).reshape(2, 6))
    _, after = SMALL.recall(params | {"w_f": jnp.full((6, 6), 300.0)}, before, jnp.abs(x) + 0.1)
    np.testing.assert_array_equal(after.h, before.h)


@pytest.mark.parametrize("bound", [1 - 1e-6, 1.0])
def test_a_bound_near_1_freezes_the_state(bound):
    params, state, x = inputs(SMALL)
    frozen = state._replace(h=jnp.ones((2, 6)))

    def read(bound):
        return above(SMALL, params, frozen, x, bound)[1].h

    np.testing.assert_allclose(read(bound), 1, atol=1e-4)
    slope = jax.grad(lambda bound: jnp.sum(read(bound)))(jnp.float32(bound))
    assert np.isfinite(slope) and abs(slope) > 1e-3


def test_layers_share_one_parameter():
    params, state = STACK.init(jax.random.key(0)), STACK.init_state(2)
    assert [n for n in params if "lower_bounds" in params[n]] == ["0"]
    assert params["0"]["lower_bounds"].shape == (3, 6)
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    y, _ = apply(STACK, params, state, x)
    want = x
    for i in range(3):  # zeros: the bound of layer i is i / 3
        want, _ = paper(HGRN(dim=6), params[str(i)], want, i / 3)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-5)
    drawn = jnp.arange(18.0).reshape(3, 6) / 9
    params["0"]["lower_bounds"] = drawn
    y, _ = apply(STACK, params, state, x)
    shares = np.exp(np.asarray(drawn)) / np.exp(np.asarray(drawn)).sum(0)
    want = x
    for i, bound in enumerate((0.0, shares[1], shares[1] + shares[2])):
        want, _ = paper(HGRN(dim=6), params[str(i)], want, bound)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-5)


def test_a_layer_above_needs_one_below():
    alone = HGRN(dim=6, layer=1, layers=2)
    params, state, x = inputs(alone)
    assert "lower_bounds" not in params
    with pytest.raises(ValueError, match="HGRN: needs the stream 'lower_bounds' of a layer below it"):
        alone.apply(params, state, x)
    with pytest.raises(ValueError, match=r"HGRN: lower_bound is None, layer 1 needs \[6\]"):
        alone.recall(params, state, x)


def test_layers_that_share_bounds_cannot_be_repeated():
    repeated = Repeat(HGRN(dim=6, layers=2), 2)
    params, state, x = inputs(repeated)
    with pytest.raises(ValueError, match="lower_bounds"):
        repeated.apply(params, state, x)


test_bad_fields = bad_fields(
    SMALL,
    ("layer", 1, "0 to layers - 1 = 0"),
    ("layer", -1, "0 to layers - 1 = 0"),
    ("layers", 0, "at least 1"),
    ("expand_ratio", 0, "at least 1"),
    ("conv_size", 1, "at least 2"),
)
