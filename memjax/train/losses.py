"""Losses for `fit`: functions (params, batch, key) -> (scalar, dict of scalar metrics)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from memjax.combinators import total
from memjax.errors import ConfigError
from memjax.memory import How, Memory

Loss = Callable[[Any, dict[str, Array], Array], tuple[Array, dict[str, Array]]]


def lm_loss(memory: Memory, *, aux_weights: Mapping[str, float] | None = None, how: How = How()) -> Loss:
    """Next-token loss of a memory over token ids (x: int [b, t] -> logits [b, t, vocab]).

    The batch is {"ids": int [b, t + 1]} with optional "start" and "valid", bool [b, t + 1], of the same tokens. The
    loss is the mean cross entropy in float32 over the targets that count (`target_mask`), plus `aux_weights[name]`
    times each auxiliary loss of the model, added over its layers by name (`memjax.combinators.total`).

    Metrics: "bits_per_token" (cross entropy / ln 2), "accuracy" (share of targets that are the most likely token), and
    every auxiliary scalar under its own name.

    Raises:
      ConfigError: at trace time, where `aux_weights` names a loss that the model does not report.
    """
    weights = dict(aux_weights or {})

    def loss(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        ids, start, valid = batch["ids"], batch.get("start"), batch.get("valid")
        head = {name: None if a is None else a[:, :-1] for name, a in (("start", start), ("valid", valid))}
        x = ids[:, :-1]
        logits, _, aux = memory.apply_with_aux(params, memory.init_state(x.shape[0]), x, **head, how=how)
        entropy, accuracy = cross_entropy(logits, ids[:, 1:], target_mask(ids, start=start, valid=valid))
        terms = {name: jnp.asarray(term, jnp.float32) for name, term in total(aux).items()}
        if missing := [name for name in weights if name not in terms]:
            raise ConfigError(f"lm_loss: aux_weights names {missing[0]!r}, the model reports {sorted(terms)}")
        value = entropy + sum(jnp.float32(weight) * terms[name] for name, weight in weights.items())
        return value, {"bits_per_token": entropy / math.log(2), "accuracy": accuracy, **terms}

    return loss


def target_mask(
    ids: Int[Array, "b n"], *, start: Bool[Array, "b n"] | None = None, valid: Bool[Array, "b n"] | None = None
) -> Bool[Array, "b m"]:
    """Which of ids[:, 1:] are counted as targets of ids[:, :-1] (m = n - 1).

    Input and target must both be valid, and a target that begins a document (`start`) cannot follow from another one.
    """
    mask = jnp.ones((ids.shape[0], ids.shape[1] - 1), bool)
    if valid is not None:
        mask &= valid[:, :-1] & valid[:, 1:]
    return mask if start is None else mask & ~start[:, 1:]


def cross_entropy(
    logits: Float[Array, "b t vocab"], targets: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy in nats and accuracy over the targets where mask is True, in float32; 0 if none."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
    mean = lambda a: jnp.sum(jnp.where(mask, a, jnp.float32(0))) / count  # noqa: E731
    return mean(nats), mean(correct)
