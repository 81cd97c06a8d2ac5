"""The contrastive losses against plain numpy, document by document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_storage.router_loss import router_loss

INF = np.inf
SCORES = np.array(
    [
        [0.9, 0.1, -0.3, 0.5, -INF, 0.2],  # two positives
        [0.2, 0.8, 0.1, -INF, -INF, -0.7],  # one, and one that does not exist
        [0.3, 0.2, -INF, 0.1, 0.4, 0.0],  # none
        [-0.5, -INF, -INF, -0.9, -INF, -INF],  # no negatives
    ],
    np.float32,
)
POSITIVE = np.array([[1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]], bool)
METHODS = ("decoupled", "infonce", "focal", "bce")

losses = jax.jit(router_loss, static_argnames=("method", "gamma", "bias"))


def by_hand(scores, positive, method, temperature=0.1, gamma=2.0, bias=-20.0):
    here = scores > -1e9
    pos = [s for s, p, e in zip(scores, positive, here, strict=True) if p and e]
    neg = [s for s, p, e in zip(scores, positive, here, strict=True) if e and not p]
    if not pos:
        return 0.0
    if method == "bce":
        return -np.mean([-np.log1p(np.exp(-(s + bias) * y)) for side, y in ((pos, 1), (neg, -1)) for s in side])
    e = lambda s: np.exp(s / temperature)  # noqa: E731
    if method == "decoupled":
        return -np.mean([np.log(e(s) / (e(s) + sum(map(e, neg)))) for s in pos])
    p = np.array([e(s) / sum(map(e, pos + neg)) for s in pos])
    return -np.mean(((1 - p) ** gamma if method == "focal" else 1) * np.log(p))


@pytest.mark.parametrize("method", METHODS)
def test_is_the_formula(method):
    arguments = {"temperature": 0.3, "gamma": 3.0, "bias": -2.0}
    want = [by_hand(s, p, method, **arguments) for s, p in zip(SCORES.astype(np.float64), POSITIVE, strict=True)]
    np.testing.assert_allclose(losses(SCORES, POSITIVE, method=method, **arguments), want, rtol=1e-5, atol=1e-7)


def test_decoupled_and_plain_agree_on_one_positive():
    np.testing.assert_allclose(
        losses(SCORES[1], POSITIVE[1], method="decoupled"), losses(SCORES[1], POSITIVE[1], method="infonce"), rtol=1e-6
    )
    assert losses(SCORES[3], POSITIVE[3], method="decoupled") == pytest.approx(0, abs=1e-6)
    assert losses(SCORES[3], POSITIVE[3], method="infonce") > 1


def test_the_temperature_is_clamped():
    one = lambda temperature: float(losses(SCORES[1], POSITIVE[1], temperature=temperature))  # noqa: E731
    assert one(9.0) == one(0.5) != one(0.4)
    assert one(0.0) == one(0.001)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_gradients_are_finite(method, temperature):
    """Where documents are missing, where all scores are far below 0, and towards the temperature too."""
    scores = np.concatenate([SCORES, SCORES[3:] * 2, np.full((1, 6), -INF, np.float32)])
    positive = jnp.asarray(np.concatenate([POSITIVE, POSITIVE[3:], POSITIVE[:1]]))

    def mean(s, tau):
        return router_loss(s, positive, method=method, temperature=tau).mean()

    value, grads = jax.jit(jax.value_and_grad(mean, (0, 1)))(scores, jnp.float32(temperature))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(grads[0])[np.isneginf(scores)].any()
    assert np.abs(grads[0]).max() > 0


def test_any_leading_axes():
    np.testing.assert_array_equal(
        losses(np.stack([SCORES, SCORES]), np.stack([POSITIVE] * 2))[1], losses(SCORES, POSITIVE)
    )


def test_an_unknown_method_is_refused(as_user):
    with pytest.raises(ValueError, match="method is 'INFONCE_DECOUPLE', needs one of"):
        router_loss(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), method="INFONCE_DECOUPLE")  # type: ignore[arg-type]
