"""Searching a bank by words: BM25 over the texts of its documents, and fusing its ranking with a model's.

Source: BM25 as the library bm25s computes it (Lu, arXiv 2407.03618); reciprocal rank fusion: Cormack, Clarke and
Buettcher, SIGIR 2009.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from memjax.errors import DataError

FADED = 60  # of 1 / (FADED + rank): how fast a rank loses weight, as published

Ranking = list[tuple[int, float]]
"""(document, score), best first."""


class WordIndex:
    """BM25 over texts. Words are runs of letters, digits and "_", in lower case; nothing is stemmed or left out.

    Args:
      texts: one for each document; None or a text without a word is never found.

    Raises DataError without the extra `demo`, which has bm25s.
    """

    def __init__(self, texts: Sequence[str | None]):
        try:
            import bm25s
        except ImportError:
            raise DataError("searching by words needs bm25s: pip install 'memjax[demo]'") from None
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index to standard error
        split = [words(text or "") for text in texts]
        self._index = bm25s.BM25()
        self._empty = not any(split)
        if not self._empty:
            self._index.index(split, show_progress=False)

    def rank(self, question: str, count: int) -> Ranking:
        """The best `count` documents that have a word of the question; ties to the lower number."""
        asked = words(question)
        if self._empty or not asked:
            return []
        scores = self._index.get_scores(asked)
        found = scores.nonzero()[0]
        best = found[np.argsort(-scores[found], kind="stable")[:count]]
        return list(zip(best.tolist(), scores[best].tolist(), strict=True))


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    return re.findall(r"\w+", text.lower())


def fuse(*rankings: Ranking) -> Ranking:
    """Reciprocal rank fusion: the sum over the rankings of 1 / (60 + rank), rank from 1; ties to the lower number."""
    total: dict[int, float] = {}
    for ranking in rankings:
        for rank, (document, _) in enumerate(ranking, start=1):
            total[document] = total.get(document, 0.0) + 1 / (FADED + rank)
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))
