"""STEM: what its table means, and how it may be edited and prefetched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_weights.stem import STEM
from memjax.lm import FeedForward

SMALL = STEM(dim=6, vocab=11, hidden=10)


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    ids = jax.random.randint(keys[1], (2, 7), 2, 9)  # 0, 1, 9 and 10 never occur
    return SMALL.init(keys[0]), jax.random.normal(keys[2], (2, 7, 6), dtype), ids


def read(params, x, ids, memory=SMALL):
    return memory.apply(params, memory.init_state(x.shape[0]), x, ids=ids)[0]


def test_it_is_swiglu_where_the_row_is_the_up_projection():
    dense = FeedForward(dim=6, hidden=10)
    params, x = dense.init(jax.random.key(1)), jax.random.normal(jax.random.key(2), (1, 11, 6))
    rows = {"table": (x @ params["w_up"])[0], "w_gate": params["w_gate"], "w_down": params["w_down"]}
    want, _ = dense.apply(params, dense.init_state(1), x)
    np.testing.assert_allclose(read(rows, x, jnp.arange(11)[None]), want, rtol=1e-5, atol=1e-6)


def test_swapping_rows_swaps_what_is_known():
    params, x, ids = inputs()
    swapped = SMALL.swap_rows(params, 3, 5)
    renamed = jnp.where(ids == 3, 5, jnp.where(ids == 5, 3, ids))
    assert (renamed != ids).any()
    np.testing.assert_array_equal(read(swapped, x, renamed), read(params, x, ids))
    neither = jnp.where((ids == 3) | (ids == 5), 4, ids)
    np.testing.assert_array_equal(read(swapped, x, neither), read(params, x, neither))


def test_swapping_twice_restores():
    params, _, _ = inputs()
    pairs = jnp.array([3, 7]), jnp.array([5, 2])
    once = SMALL.swap_rows(params, *pairs)
    np.testing.assert_array_equal(once["table"][jnp.array([3, 7, 5, 2])], params["table"][jnp.array([5, 2, 3, 7])])
    np.testing.assert_array_equal(SMALL.swap_rows(once, *pairs)["table"], params["table"])


def test_prefetched_rows_are_the_resident_table():
    params, x, ids = inputs()
    unique, inverse = np.unique(ids, return_inverse=True)
    few = STEM(dim=6, vocab=len(unique), hidden=10)
    fetched = params | {"table": params["table"][unique]}
    inverse = jnp.asarray(inverse.reshape(ids.shape))
    np.testing.assert_array_equal(read(fetched, x, inverse, few), read(params, x, ids))

    whole = jax.grad(lambda p: jnp.sum(jnp.sin(read(p, x, ids))))(params)["table"]
    part = jax.grad(lambda p: jnp.sum(jnp.sin(read(p, x, inverse, few))))(fetched)["table"]
    np.testing.assert_allclose(whole, jnp.zeros_like(whole).at[unique].set(part), rtol=1e-6, atol=1e-7)
    assert np.abs(part).min(1).max() > 0 and not whole[jnp.array([0, 1, 9, 10])].any()


def test_the_table_is_gathered_before_it_is_cast():
    params, x, ids = inputs(jnp.bfloat16)
    lowered = jax.jit(read).lower(params, x, ids).as_text()
    assert "tensor<11x10xf32>" in lowered and "tensor<11x10xbf16>" not in lowered


def test_the_default_width_is_that_of_llama():
    assert STEM(dim=4096, vocab=2).width == 11008
    assert STEM(dim=6, vocab=2, multiple_of=10).width == 20


@pytest.mark.parametrize("field", ["dim", "vocab", "hidden", "multiple_of"])
def test_bad_fields(field):
    with pytest.raises(ValueError, match=f"STEM: {field} is 0, needs at least 1"):
        STEM(**{"dim": 6, "vocab": 11, field: 0})
