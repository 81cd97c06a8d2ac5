"""Training a model that reads from a store: write the documents, ask, answer; route by contrast.

    L = lm_weight * L_lm + aux_weight * L_aux
    L_lm   cross entropy of the answer, plus `text_weight` times that of what is read before it
    L_aux  mean router loss (memjax.in_storage.router_loss) over the layers that routed and the questions
Source: MSA, arXiv 2603.23516 (two phases: 0.1 L_lm + L_aux, then L_lm + 0.1 L_aux).

One pool of documents serves all questions of a batch: every other question's document is a negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from memjax.in_storage.msa import MSAStore
from memjax.in_storage.router_loss import Method, router_loss
from memjax.memory import How, Memory, to_config
from memjax.train.loop import FitResult, fit
from memjax.train.losses import Loss, cross_entropy, target_mask
from memjax.train.metrics import JSONLWriter
from memjax.train.optimizer import make_optimizer


class Phase(NamedTuple):
    """A stretch of training: its share of the steps, its weights, and its learning rates relative to the peak."""

    share: float
    lm_weight: float
    aux_weight: float
    rate: float


# As published: warm the routers up, then train the language model beside them at a lower rate (1e-4, then 6e-6).
PUBLISHED = (Phase(0.5, 0.1, 1.0, 1.0), Phase(0.5, 1.0, 0.1, 0.06))
# For a small model from scratch: both losses from the beginning, one cosine.
TOGETHER = (Phase(1.0, 1.0, 1.0, 1.0),)


def fit_phases(
    model: Memory,
    params: Any,
    data: Callable[[int], Iterable[dict[str, Any]]],
    *,
    steps: int,
    key: Array,
    phases: Sequence[Phase] = PUBLISHED,
    learning_rate: float = 0.01,
    adam_learning_rate: float = 0.005,
    temperature: float = 0.1,
    directory: Path | None = None,
    log_every: int = 25,
    save_every: int | None = None,
) -> FitResult:
    """Train through the phases one after another, each a `fit` with its own loss, schedule and checkpoints.

    Args:
      data: number of the phase -> its batches (`retrieval_loss` says what is in one).
      steps: updates of all phases together.
      temperature: of the contrast between documents (`router_loss`).
      directory: <directory>/phase-<i> keeps the checkpoints and metrics.jsonl of phase i; a run begun again goes on
        from the newest checkpoint. None keeps nothing.

    Returns:
      The result of the last phase.
    """
    for i, phase in enumerate(phases):
        count = max(round(phase.share * steps), 1)
        home = None if directory is None else directory / f"phase-{i}"
        rates: dict[str, Any] = {
            "learning_rate": phase.rate * learning_rate,
            "adam_learning_rate": phase.rate * adam_learning_rate,
        }
        result = fit(
            retrieval_loss(model, lm_weight=phase.lm_weight, aux_weight=phase.aux_weight, temperature=temperature),
            params,
            data(i),
            optimizer=make_optimizer(model, steps=count, **rates),
            steps=count,
            key=jax.random.fold_in(key, i),
            directory=home,
            config={
                "memory": to_config(model),
                "phase": list(phase),
                "steps": count,
                "temperature": temperature,
                **rates,
            },
            save_every=save_every,
            log_every=log_every,
            writers=[] if home is None else [JSONLWriter(home / "metrics.jsonl")],
        )
        params = result.params
    return result


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

      documents [n, l] int32, document_valid [n, l] bool    the pool, one document a row, none empty
      question [b, q] int32, question_valid [b, q] bool     what routes
      gold [b] int32                                        the document that answers
      reading [b, t] int32, reading_valid [b, t] bool       what is read then, answer included
      answer [b, t] bool                                    which tokens of `reading` are the answer
      passages                                              optional: another pool with its questions, that only route

    Metrics: "aux", "answer_loss", "text_loss", "answer_accuracy" (whole answers), "recall_at_k" (mean over layers),
    "lost_chunks" (of the pools, found no room in the stores: more than 0 is a capacity too small); with `passages` also
    "passages_aux" and "passages_recall_at_k", and the loss has `aux_weight` times the former.

    Raises ValueError at trace time where the model has no router layer, or its store fewer documents than the pool.
    """

    def routed(params: Any, batch: dict[str, Array]) -> tuple[Array, Array, Array, Any]:
        """Router loss, recall, chunks without room, and the state to answer from."""
        documents, question = batch["documents"], batch["question"]
        _, state = model.write(
            params, model.init_state(documents.shape[0]), documents, valid=batch["document_valid"], how=how
        )
        state = model.restart(state, question.shape[0])
        _, state, aux = model.apply_with_aux(params, state, question, valid=batch["question_valid"], how=how)
        found = [(a["doc_scores"][:, 0], a["documents"][:, 0]) for a in routing(aux)]
        room = min((s.shape[-1] for s, _ in found), default=0)
        if room < documents.shape[0]:
            raise ValueError(f"retrieval_loss: documents has {documents.shape[0]} rows, the model's stores hold {room}")
        positive = batch["gold"][:, None] == jnp.arange(room, dtype=jnp.int32)[None]
        contrast = jnp.stack(
            [router_loss(s, positive, method=method, temperature=temperature) for s, _ in found]
        ).mean()
        recall = jnp.stack([(d == batch["gold"][:, None]).any(-1) for _, d in found]).astype(jnp.float32).mean()
        lost = jnp.stack([s.count[2] for s in stores(state)]).sum().astype(jnp.float32)
        return contrast, recall, lost, state

    def loss(params: Any, batch: dict[str, Any], key: Array) -> tuple[Array, dict[str, Array]]:
        contrast, recall, lost, state = routed(params, batch)
        reading = batch["reading"]
        logits, _ = model.apply(params, state, reading[:, :-1], valid=batch["reading_valid"][:, :-1], how=how)
        targets, answer = reading[:, 1:], batch["answer"][:, 1:]
        text = target_mask(reading, valid=batch["reading_valid"]) & ~answer
        answer_loss, _ = cross_entropy(logits, targets, answer)
        text_loss, _ = cross_entropy(logits, targets, text)
        right = ((logits.argmax(-1) == targets) | ~answer).all(-1).astype(jnp.float32).mean()
        total = lm_weight * (answer_loss + text_weight * text_loss) + aux_weight * contrast
        metrics = {"aux": contrast, "answer_loss": answer_loss, "text_loss": text_loss}
        metrics |= {"answer_accuracy": right, "recall_at_k": recall}
        if "passages" in batch:
            contrast, recall, more, _ = routed(params, batch["passages"])
            total, lost = total + aux_weight * contrast, lost + more
            metrics |= {"passages_aux": contrast, "passages_recall_at_k": recall}
        return total, metrics | {"lost_chunks": lost}

    return loss


def routing(aux: Any) -> list[dict[str, Array]]:
    """The diagnostics of every layer that routes."""
    routed = lambda a: isinstance(a, dict) and "doc_scores" in a  # noqa: E731
    return [a for a in jax.tree.leaves(aux, is_leaf=routed) if routed(a)]


def stores(state: Any) -> list[MSAStore]:
    """The store of every layer that routes."""
    return [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, MSAStore)) if isinstance(s, MSAStore)]
