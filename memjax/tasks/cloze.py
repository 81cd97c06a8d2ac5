"""Inverse cloze: a few words of a document, some of them dropped, ask for the document they stand in.

Source: Lee, Chang, Toutanova, arXiv 1906.00300 (there a sentence asks for the passage around it; here the words stay in
their document, which is what somebody does who searches for a passage that he half remembers).
"""

from __future__ import annotations

import numpy as np

LEAST = 3  # words of a question


def cloze(rng: np.random.Generator, text: str, *, words: tuple[int, int] = (4, 8), keep: float = 0.65) -> str | None:
    """A question that the text answers: a span of it with whole words dropped, in their order.

    Words are what stands between white space. None where the text has fewer than `words[0]`.

    Args:
      words: the span's number of words, from the first to the second of these with equal chance, as far as there are.
      keep: chance of each word to stay; at least three do.
    """
    if not (LEAST <= words[0] <= words[1] and 0 < keep <= 1):
        raise ValueError(
            f"cloze: words is {words}, needs {LEAST} <= first <= second; keep is {keep}, needs 0 < keep <= 1"
        )
    found = text.split()
    if len(found) < words[0]:
        return None
    n = int(rng.integers(words[0], min(words[1], len(found)) + 1))
    at = int(rng.integers(0, len(found) - n + 1))
    drawn = rng.random(n)
    stays = drawn < max(keep, np.sort(drawn)[LEAST - 1] + 1e-9)
    return " ".join(word for word, stay in zip(found[at : at + n], stays, strict=True) if stay)
