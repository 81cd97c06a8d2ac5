"""LayerNorm, and RWKV's language model under the laws that its thread of norms could break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import laws
from memjax.combinators import Stack
from memjax.in_state.rwkv7 import RWKV7, RWKV7ChannelMixing
from memjax.lm.rwkv import LayerNorm, Normed, RWKVLanguageModel


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    norm = LayerNorm(8, eps=0.1, bias=bias)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(8).astype(np.float32) for name in norm.param_specs()}
    assert set(params) == {"weight", "bias"} if bias else {"weight"}
    x = rng.standard_normal((2, 3, 8))
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt(centred.var(-1, keepdims=True) + 0.1) * params["weight"] + params.get("bias", 0)
    params = jax.tree.map(jnp.asarray, params)
    y, _ = norm.apply(params, norm.init_state(2), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    half, _ = norm.apply(params, norm.init_state(2), jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=0.1, atol=0.1)


def test_the_model_is_lawful():
    norm = LayerNorm(16)
    mixing = RWKV7(16, 8, decay_low_rank_dim=4, a_low_rank_dim=4, v_low_rank_dim=4, gate_low_rank_dim=4)
    layer = Stack((norm, Normed(mixing, norm), Normed(RWKV7ChannelMixing(16, 24), norm)))
    model = RWKVLanguageModel(Stack((layer,)), 50, tied=False)
    results = laws.check(model, only=("split", "step", "padding", "packing", "saved"))
    assert all(r.ok for r in results.values()), results
    params = model.init(jax.random.key(0))
    assert set(params["norm"]) == {"weight", "bias"}
