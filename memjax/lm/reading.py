"""How a model asks a bank: the texts it reads and the shapes they have, the same in training and in use.

    documents   one a row, read by `write`
    question    <question> q                                              routes, `apply` on fresh rows
    reading     <document> d1 <document> d2 ... <question> q              follows, `apply` in the same rows
    answer      what continues q, then <end>                              decoded by `step`

Rows are padded on the left, so that what follows stands right behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from memjax.data.tokenizer import Tokenizer
from memjax.errors import TokenizerError

SPECIAL = ("<question>", "<document>", "<end>")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the marks above. Raises TokenizerError where one is missing."""
    if missing := [name for name in SPECIAL if name not in tokenizer.special]:
        raise TokenizerError(
            f"tokenizer: has no special token {missing[0]}; a reading model needs {', '.join(SPECIAL)}"
        )
    return {name: tokenizer.special[name] for name in SPECIAL}


def encode_question(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " t"]:
    """The ids of what is asked, begun with a space: so its first word is spelt as in the middle of a document."""
    return tokenizer.encode(" " + text.strip() if text.strip() else "")


def question(special: dict[str, int], ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The question as it routes."""
    return np.concatenate([[special["<question>"]], ids]).astype(np.int32)


def reading(special: dict[str, int], documents: Sequence[np.ndarray], ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The chosen documents, then the question again: the answer continues it."""
    texts = [part for d in documents for part in ([special["<document>"]], d)]
    return np.concatenate([*texts, [special["<question>"]], ids]).astype(np.int32)


def pad_left(rows: Sequence[np.ndarray], width: int) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Rows side by side, padded on the left to `width`: ids and which are valid. ValueError if one is longer."""
    if (longest := max(map(len, rows))) > width:
        raise ValueError(f"pad_left: a row has {longest} tokens, needs at most {width}")
    ids, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], valid[i, width - len(row) :] = row, True
    return ids, valid
