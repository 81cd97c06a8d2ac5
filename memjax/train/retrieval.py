"""Training a model that reads from a store: write the documents, ask, answer; route by contrast.

    L = lm_weight * L_lm + aux_weight * L_aux
    L_lm   cross entropy of the answer, plus `text_weight` times that of what is read before it
    L_aux  mean router loss (memjax.in_storage.router_loss) over the layers that routed and the questions
Source: MSA, arXiv 2603.23516 (two phases: 0.1 L_lm + L_aux, then L_lm + 0.1 L_aux).

One pool of documents serves all questions of a batch: every other question's document is a negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from memjax.in_storage.router_loss import Method, router_loss
from memjax.memory import How, Memory
from memjax.train.losses import Loss, cross_entropy


class Phase(NamedTuple):
    """A stretch of training with its own weights and learning rate, relative to the peak."""

    share: float
    lm_weight: float
    aux_weight: float
    rate: float


# The published schedule: warm the routers up, then train the language model beside them at a lower rate.
PUBLISHED = (Phase(0.5, 0.1, 1.0, 1.0), Phase(0.5, 1.0, 0.1, 0.06))


def retrieval_loss(
    model: Memory,
    *,
    lm_weight: float = 1.0,
    aux_weight: float = 1.0,
    text_weight: float = 0.3,
    method: Method = "decoupled",
    temperature: float = 0.1,
    how: How = How(),
) -> Loss:
    """The loss of a language model with MSA layers. The batch, of fixed shapes:

      documents [n, l] int32, document_valid [n, l] bool    the pool, one document a row
      question [b, q] int32, question_valid [b, q] bool     what routes
      gold [b] int32                                        the document that answers
      reading [b, t] int32, reading_valid [b, t] bool       what is read then, answer included
      answer [b, t] bool                                    which tokens of `reading` are the answer

    Metrics: "aux", "answer_loss", "text_loss", "answer_accuracy" (whole answers), "recall_at_k" (mean over layers).
    """

    def loss(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        documents, question, reading = batch["documents"], batch["question"], batch["reading"]
        b = question.shape[0]
        empty = model.init_state(documents.shape[0])
        _, state = model.write(params, empty, documents, valid=batch["document_valid"], how=how)
        state = model.restart(state, b)
        _, state, aux = model.apply_with_aux(params, state, question, valid=batch["question_valid"], how=how)
        routed = [(a["doc_scores"][:, 0], a["documents"][:, 0]) for a in routing(aux)]
        positive = batch["gold"][:, None] == jnp.arange(routed[0][0].shape[-1], dtype=jnp.int32)[None]
        contrast = jnp.stack(
            [router_loss(s, positive, method=method, temperature=temperature) for s, _ in routed]
        ).mean()
        recall = jnp.stack([(d == batch["gold"][:, None]).any(-1) for _, d in routed]).astype(jnp.float32).mean()

        logits, _ = model.apply(params, state, reading[:, :-1], valid=batch["reading_valid"][:, :-1], how=how)
        targets, valid, answer = reading[:, 1:], batch["reading_valid"][:, :-1], batch["answer"][:, 1:]
        answer_loss, _ = cross_entropy(logits, targets, answer)
        text_loss, _ = cross_entropy(logits, targets, valid & ~answer)
        right = ((logits.argmax(-1) == targets) | ~answer).all(-1).astype(jnp.float32).mean()
        total = lm_weight * (answer_loss + text_weight * text_loss) + aux_weight * contrast
        metrics = {"aux": contrast, "answer_loss": answer_loss, "text_loss": text_loss}
        return total, metrics | {"answer_accuracy": right, "recall_at_k": recall}

    return loss


def routing(aux: Any) -> list[dict[str, Array]]:
    """The diagnostics of every layer that routes, in the order of the layers."""
    if not isinstance(aux, dict):
        return []
    if "doc_scores" in aux:
        return [aux]
    keys = sorted(aux, key=lambda k: (0, int(k), "") if k.isdigit() else (1, 0, k))
    return [found for k in keys for found in routing(aux[k])]
