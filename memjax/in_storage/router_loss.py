"""The losses that train a router: contrast the documents that answer a question against the others.

Source: MSA, arXiv 2603.23516, equation 5 (the decoupled form) and the released code's variants. Scores are cosines s_d,
tau a temperature: decoupled   l = -mean_{i in Pos} log( e^{s_i/tau} / (e^{s_i/tau} + sum_{j in Neg} e^{s_j/tau}) )
                   infonce     l = -mean_{i in Pos} log softmax(s/tau)_i over all documents
                   focal       as infonce, each positive weighted by (1 - p_i)**gamma
                   bce         l = -mean log sigmoid((s + bias) * (+1 positive, -1 negative))
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Method = Literal["decoupled", "infonce", "focal", "bce"]


def router_loss(
    scores: Float[Array, "*b N"],
    positive: Bool[Array, "*b N"],
    *,
    method: Method = "decoupled",
    temperature: float | Float[Array, ""] = 0.1,
    gamma: float = 2.0,
    bias: float = -20.0,
) -> Float[Array, "*b"]:
    """The loss of each question; 0 where it has no positive document that exists.

    Args:
      scores: s_d, float32; -inf where there is no such document.
      positive: the documents that answer the question.
      method: see the file's head; "decoupled" is the released setting.
      temperature: tau, clamped to [0.001, 0.5]; unused by "bce".
      gamma: exponent of "focal", whose weight is not detached.
      bias: added to the score in "bce".
    """
    if method not in get_args(Method):
        raise ValueError(f"router_loss: method is {method!r}, needs one of {get_args(Method)}")
    exists = scores > -1e9
    pos, neg = positive & exists, ~positive & exists
    count = jnp.maximum(pos.sum(-1), 1).astype(scores.dtype)
    mean = lambda a: jnp.where(pos, a, 0).sum(-1) / count  # noqa: E731
    finite = jnp.where(exists, scores, 0)
    if method == "bce":
        sign = jnp.where(positive, 1, -1).astype(scores.dtype)
        log_p = jax.nn.log_sigmoid((finite + bias) * sign)
        loss = -jnp.where(exists, log_p, 0).sum(-1) / jnp.maximum(exists.sum(-1), 1).astype(scores.dtype)
    else:
        s = finite / jnp.clip(jnp.asarray(temperature, scores.dtype), 1e-3, 0.5)
        s = s - jax.lax.stop_gradient(jnp.where(exists, s, -jnp.inf).max(-1, keepdims=True, initial=-1e9))
        s = jnp.where(exists, s, 0)  # else exp overflows where no document is, and its gradient is NaN
        e = jnp.where(exists, jnp.exp(s), 0)
        if method == "decoupled":
            den = e + jnp.where(neg, e, 0).sum(-1, keepdims=True)
            loss = -mean(s - jnp.log(den + 1e-10))
        else:
            log_p = s - jnp.log(e.sum(-1, keepdims=True) + 1e-10)
            weight = (1 - jnp.exp(log_p)) ** gamma if method == "focal" else 1
            loss = -mean(weight * log_p)
    return jnp.where(pos.any(-1), loss, 0)
