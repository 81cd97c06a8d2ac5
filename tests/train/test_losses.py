import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import How, Memory, Residual
from memjax.errors import ConfigError
from memjax.lm.model import FeedForward, LanguageModel
from memjax.train import lm_loss
from memjax.train.losses import cross_entropy, target_mask

MODEL = LanguageModel(Residual(FeedForward(8, 16)), vocab=7)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
LOSS = jax.jit(lm_loss(MODEL))
KEY = jax.random.key(1)
IDS = jax.random.randint(jax.random.key(2), (2, 6), 0, 7)


@dataclass(frozen=True)
class Noted(Memory):
    """The identity, with an auxiliary value."""

    dim: int

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return x, state, {"load_balance": jnp.float32(3)}


@jax.jit
def _nats(ids):
    logits, _ = MODEL.apply(PARAMS, MODEL.init_state(ids.shape[0]), ids[:, :-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)[..., 0], logits


def test_mean_cross_entropy_bits_and_accuracy():
    value, metrics = LOSS(PARAMS, {"ids": IDS}, KEY)
    nats, logits = _nats(IDS)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, nats.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["bits_per_token"], nats.mean() / math.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(-1) == IDS[:, 1:]))
    assert set(metrics) == {"bits_per_token", "accuracy"}


def test_only_targets_of_the_same_document_and_valid_ones_count():
    start = jnp.zeros((2, 6), bool).at[0, 3].set(True)
    valid = jnp.ones((2, 6), bool).at[1, :2].set(False)  # row 1 is padded on the left
    want = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(target_mask(IDS, start=start, valid=valid), want)
    value, _ = LOSS(PARAMS, {"ids": IDS, "start": start, "valid": valid}, KEY)
    np.testing.assert_allclose(value, np.asarray(_nats(IDS)[0])[want].mean(), rtol=1e-6)


def test_nothing_valid_is_zero_with_zero_gradient():
    batch = {"ids": IDS, "valid": jnp.zeros((2, 6), bool)}
    (value, _), grads = jax.jit(jax.value_and_grad(lm_loss(MODEL), has_aux=True))(PARAMS, batch, KEY)
    assert value == 0 and all(not np.any(g) for g in jax.tree.leaves(grads))


def test_low_precision_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 300, 256), jnp.bfloat16)
    nats, _ = jax.jit(cross_entropy)(logits, jnp.zeros((1, 300), jnp.int32), jnp.ones((1, 300), bool))
    np.testing.assert_allclose(nats, math.log(256), rtol=1e-6)


def test_auxiliary_losses_are_weighted_and_reported():
    model = LanguageModel(Residual(Noted(8)), vocab=7)
    params = model.init(jax.random.key(0))
    plain, metrics = jax.jit(lm_loss(model))(params, {"ids": IDS}, KEY)
    weighted, _ = jax.jit(lm_loss(model, aux_weights={"load_balance": 0.5}))(params, {"ids": IDS}, KEY)
    np.testing.assert_allclose(weighted - plain, 1.5, rtol=1e-5)
    assert metrics["load_balance"] == 3


def test_unknown_auxiliary_loss_is_named():
    with pytest.raises(ConfigError, match="aux_weights names 'balance'"):
        jax.eval_shape(lm_loss(MODEL, aux_weights={"balance": 0.5}), PARAMS, {"ids": IDS}, KEY)
