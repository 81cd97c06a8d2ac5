"""The language model around a body: ids in, float32 logits out, in the dtype it declares inside."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.catalog import CATALOG
from memjax.combinators import Residual, Stack
from memjax.layers import rms_norm
from memjax.lm.model import FeedForward, LanguageModel, block
from pallas_kernels.compat import QUICK_COMPILE

STEM, CANON = (CATALOG[n].build_small() for n in ("stem", "canon"))
MODEL = LanguageModel(Stack((Residual(STEM), block(CANON, 8))), 50)
PARAMS, IDS = MODEL.init(jax.random.key(0)), np.random.default_rng(0).integers(0, 50, (2, 5)).astype(np.int32)

apply = partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)(lambda m, *args, **kw: m.apply(*args, **kw))


def test_is_embedding_body_norm_and_output():
    model = LanguageModel(FeedForward(4, 6), 9, tied=False, embed_std=0.5, logit_scale=3.0, eps=0.1)
    params = model.init(jax.random.key(0))
    params["norm"] = jnp.arange(4.0)
    logits, state = apply(model, params, model.init_state(1), jnp.array([[3, 8]]))
    x, p = np.asarray(params["embed"])[[3, 8]], jax.tree.map(np.asarray, params["body"])
    gate = x @ p["w_gate"]
    h = (gate / (1 + np.exp(-gate)) * (x @ p["w_up"])) @ p["w_down"]
    want = 3 * np.asarray(rms_norm(jnp.asarray(h), params["norm"], 0.1)) @ params["head"]
    np.testing.assert_allclose(logits[0], want, rtol=1e-5, atol=1e-6)
    assert jax.tree.leaves(state) == [] and np.std(params["embed"]) == pytest.approx(0.5, rel=0.4)


def test_tied_output_is_the_embedding():
    assert "head" not in PARAMS and "head" in dataclasses.replace(MODEL, tied=False).param_specs()
    louder = PARAMS | {"norm": 2 * PARAMS["norm"]}
    logits, _ = apply(MODEL, PARAMS, MODEL.init_state(2), IDS)
    assert logits.shape == (2, 5, 50)
    np.testing.assert_allclose(apply(MODEL, louder, MODEL.init_state(2), IDS)[0], 2 * logits, rtol=1e-5, atol=1e-6)


def test_bfloat16_inside_and_float32_logits_outside():
    half = dataclasses.replace(MODEL, dtype="bfloat16")
    logits, _ = apply(half, PARAMS, half.init_state(2), IDS)
    exact, _ = apply(MODEL, PARAMS, MODEL.init_state(2), IDS)
    assert logits.dtype == jnp.float32
    assert 1e-4 < np.abs(logits - exact).max() < 0.2
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.abs(logits - rounded).max() > 0  # rounded logits would tie under argmax


def test_ids_reach_the_layers_and_padding_does_not():
    valid = np.array([[True] * 5, [False, False, True, True, True]])
    wild = np.where(valid, IDS, 10**6).astype(np.int32)
    y, state = apply(MODEL, PARAMS, MODEL.init_state(2), wild, valid=valid)
    alone, s = apply(MODEL, PARAMS, MODEL.init_state(1), IDS[1:, 2:])
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[1:, 2:], alone, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, rtol=1e-5, atol=1e-6), state, s)
    one, _ = MODEL.step(PARAMS, MODEL.init_state(2), jnp.asarray(IDS[:, 0]))
    whole, _ = apply(MODEL, PARAMS, MODEL.init_state(2), IDS)
    np.testing.assert_allclose(one, whole[:, 0], rtol=1e-5, atol=1e-6)
    written, _ = MODEL.write(PARAMS, MODEL.init_state(2), jnp.asarray(IDS))
    np.testing.assert_allclose(written, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x, need", [(np.ones((2, 5), np.float32), "float32"), (IDS[0], r"int32\[5\]"), (IDS[:, :0], "one token")]
)
def test_misuse(x, need):
    with pytest.raises(ValueError, match=need):
        MODEL.apply(PARAMS, MODEL.init_state(2), x)


def test_declarations():
    assert MODEL.dim == 16 and MODEL.reads_ids == 50
    assert MODEL.param_axes()["embed"] == ("vocab", "model")
    assert MODEL.param_specs()["embed"].kind == "embedding"
