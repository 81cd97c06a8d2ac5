"""JRT: a recurrent model reads its prompt twice, or learns to read it in both directions.

JRT-Prompt asks nothing of the model: context and question are repeated, so that what to keep of the context is decided
with the question already seen. `repeated` does it for arrays, `repeated_text` for text. `masked_prefix` makes the
training examples of JRT-RNN, whose prompt tokens see each other.

Source: Arora et al., Just read twice, arXiv 2407.05483.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Prompt(NamedTuple):
    """Token ids, which of them are no padding, and which belong to the answer: the only ones that are scored.

    A model is given ids[:, :-1]; its outputs are judged against ids[:, 1:] where answer[:, 1:].
    """

    ids: Int[np.ndarray, "b t"]
    valid: Bool[np.ndarray, "b t"]
    answer: Bool[np.ndarray, "b t"]


def repeated(
    context: Int[np.ndarray, "b c"],
    question: Int[np.ndarray, "b q"],
    answer: Int[np.ndarray, "b a"],
    *,
    reads: int = 2,
    padding: int | None = None,
) -> Prompt:
    """Context and question `reads` times over, then the answer: C Q C Q A.

    Args:
      reads: 1 is the ordinary prompt, to compare with.
      padding: the id that fills up short rows of the three parts; it may stand anywhere in the result, where valid is
        False. None: nothing is padding.

    Raises:
      ValueError: parts with another number of rows than the context, or reads below 1.
    """
    _check_reads("repeated", reads)
    for name, part in (("question", question), ("answer", answer)):
        if len(part) != len(context):
            raise ValueError(f"repeated: {name} has {len(part)} rows, needs those of the context, {len(context)}")
    prompt = [context, question] * reads
    ids = np.concatenate([*prompt, answer], 1)
    valid = np.ones(ids.shape, bool) if padding is None else ids != padding
    last = np.arange(ids.shape[1]) >= ids.shape[1] - answer.shape[1]
    return Prompt(ids, valid, valid & last)


def repeated_text(context: str, question: str, *, reads: int = 2, separator: str = "\n") -> str:
    """The prompt as text, for the answer to follow: context, question, context, question.

    Raises ValueError if reads is below 1.
    """
    _check_reads("repeated_text", reads)
    return separator.join([context, question] * reads)


def _check_reads(name: str, reads: int) -> None:
    if reads < 1:
        raise ValueError(f"{name}: reads is {reads}, needs at least 1")


class MaskedPrefix(NamedTuple):
    """Inputs of a model whose first tokens see each other, its targets, and which of them belong to which loss.

    The loss of JRT-RNN is the mean cross entropy where `next` plus a quarter of the mean where `hidden`.
    """

    ids: Int[np.ndarray, "b t"]
    targets: Int[np.ndarray, "b t"]
    next: Bool[np.ndarray, "b t"]
    hidden: Bool[np.ndarray, "b t"]


def masked_prefix(
    rng: np.random.Generator, ids: Int[np.ndarray, "b n"], enc_length: int, mask_id: int, rate: float = 0.15
) -> MaskedPrefix:
    """Examples of t = n - 1 tokens. Of the first enc_length a share `rate` reads mask_id and has itself as its target;
    from the last of them on the target is the next token, which no output before it has seen.

    Raises ValueError unless 1 <= enc_length <= n - 1 and 0 <= rate <= 1.
    """
    t = ids.shape[1] - 1
    if not 1 <= enc_length <= t:
        raise ValueError(f"masked_prefix: enc_length is {enc_length}, needs 1 to {t}, the tokens before the last")
    if not 0 <= rate <= 1:
        raise ValueError(f"masked_prefix: rate is {rate}, needs 0 to 1")
    at = np.arange(t)
    hidden = (rng.random((len(ids), t)) < rate) & (at < enc_length)
    inputs, following = ids[:, :-1], ids[:, 1:]
    return MaskedPrefix(
        ids=np.where(hidden, np.asarray(mask_id, ids.dtype), inputs),
        targets=np.where(hidden, inputs, following),
        next=(at >= enc_length - 1) & ~hidden,
        hidden=hidden,
    )
