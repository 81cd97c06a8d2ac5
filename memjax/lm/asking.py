"""One question to a bank on disk: the answer as it is decoded, the passages it is read from, what each layer chose.

What the command line and the server have in common; what a batch of questions needs is in `memjax.lm.reader`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from memjax.data.corpus import Document
from memjax.errors import BankError, ConfigError
from memjax.in_storage.bank_files import OpenBank, open_bank
from memjax.lm.bank_model import model_of
from memjax.lm.files import LoadedModel
from memjax.lm.generate import stream, stream_text
from memjax.lm.reader import Routing, prepare
from memjax.lm.reading import encode_question
from memjax.lm.words import WordIndex

Location = Literal["disk", "host", "device"]

BLOCK = 4  # tokens of an answer decoded between two pieces
QUESTION = 64  # tokens of a question up to which all share their compiled programs
SHOWN = 240  # characters of a passage
USUAL = frozenset("about does from have that their there they this what when where which will with".split())


class Passage(NamedTuple):
    """A document that was read before answering. number: in the bank; score: the mean over the router layers, or with
    an index of words that of `fuse`."""

    number: int
    score: float
    document: Document


class Asked(NamedTuple):
    """A question that has routed. answer: its text piece by piece; each piece is decoded when it is asked for."""

    answer: Iterator[str]
    passages: list[Passage]  # best first
    routing: Routing


def open_with_model(bank: Path, model: Path | None = None, location: Location = "disk") -> tuple[LoadedModel, OpenBank]:
    """A bank and the model that built it, by default the copy inside the bank.

    Raises:
      BankError: the bank can't be opened, it is another model's, or all of its documents are deleted.
      CheckpointError, ConfigError, TokenizerError: the model can't be loaded, or was not trained to read a bank.
    """
    opened = open_bank(bank)
    if not len(opened.living()):
        raise BankError(f"{bank}: every document is deleted, so there is nothing to ask")
    loaded = model_of(bank, opened.manifest, model)
    if loaded.reading is None:
        raise ConfigError(f"{model or bank}: its model has no reading settings, so it can't ask a bank")
    if location != "disk":
        opened = open_bank(
            bank, location=location, model_hash=loaded.hash, tokenizer_hash=loaded.tokenizer.hash
        )  # another may have built it anew meanwhile
    return loaded, opened


def ask(
    loaded: LoadedModel,
    opened: OpenBank,
    question: str,
    passages: int | None = None,
    *,
    same_shapes: bool = False,
    words: WordIndex | None = None,
) -> Asked:
    """Route a question over a bank, and begin its answer.

    Args:
      loaded, opened: as `open_with_model` gives them.
      passages: documents that are read before answering; by default as in training.
      same_shapes: pad to widths that do not depend on the question (up to 64 tokens, then in powers of two), so that
        the next one compiles nothing.
      words: `word_index` of the bank: its ranking and the model's choose the passages together.

    Raises:
      ConfigError: the question is empty, or with its passages and the answer longer than the model's window.
      BankError: the bank is damaged, or was compacted since it was opened.
    """
    assert loaded.reading is not None  # open_with_model has looked
    read, steps, tokenizer = passages or loaded.reading.passages, loaded.reading.answer_tokens, loaded.tokenizer
    block = min(BLOCK, steps)
    question_width = reading_width = None
    if same_shapes:
        question_width = max(QUESTION, 1 << len(encode_question(tokenizer, question)).bit_length())  # and its mark
        longest = max(loaded.reading.document_tokens, int(opened.documents.tokens.max()))
        reading_width = question_width + read * (1 + longest)
        block = max(n for n in range(1, block + 1) if steps % n == 0)  # no shorter block at the end
    got = prepare(
        loaded.model,
        loaded.params,
        opened.bank,
        tokenizer,
        [question],
        opened.token_ids,
        read=read,
        steps=steps,
        question_width=question_width,
        reading_width=reading_width,
        words=words,
    )
    pieces = stream(
        loaded.model,
        loaded.params,
        got.state,
        got.prompt,
        steps=steps,
        block=block,
        valid=got.valid,
        sampling=got.sampling,
    )
    found = [Passage(i, score, document(loaded, opened, i)) for i, score in got.passages[0]]
    return Asked(stream_text(pieces, tokenizer), found, got.routing)


def word_index(loaded: LoadedModel, opened: OpenBank) -> WordIndex:
    """An index of what a search can find in a bank, by words. DataError without the extra `demo`."""
    found = (opened.bank.doc_len > 0).tolist()
    texts = [loaded.tokenizer.decode(opened.token_ids(i)) if there else None for i, there in enumerate(found)]
    return WordIndex(texts)


def document(loaded: LoadedModel, opened: OpenBank, number: int) -> Document:
    """A document of a bank: its text, and the file and the lines that it is from."""
    table = opened.documents
    text = loaded.tokenizer.decode(opened.token_ids(number))
    return Document(table.path[number], int(table.first_line[number]), int(table.last_line[number]), text)


def excerpt(text: str, question: str, width: int = SHOWN) -> list[tuple[str, bool]]:
    """The part of a text that has most of the question's words, on one line, in pieces; True: such a word."""
    text = " ".join(text.split())
    words = {w for w in re.findall(r"\w+", question.lower()) if (len(w) > 3 or w.isdigit()) and w not in USUAL}
    any_word = "|".join(rf"\b{re.escape(w)}\b" for w in sorted(words, key=len, reverse=True)) or r"(?!)"
    pattern = re.compile(any_word, re.IGNORECASE)
    hits = [(m.start(), m.group().lower()) for m in pattern.finditer(text)]
    begins = [max(0, min(at - width // 4, len(text) - width)) for at, _ in hits] or [0]
    begin = max(begins, key=lambda b: len({word for at, word in hits if b <= at <= b + width - len(word)}))
    shown = ("… " if begin else "") + text[begin : begin + width] + (" …" if begin + width < len(text) else "")
    pieces, end = [], 0
    for m in pattern.finditer(shown):
        pieces += [(shown[end : m.start()], False), (m.group(), True)]
        end = m.end()
    return [(piece, marked) for piece, marked in [*pieces, (shown[end:], False)] if piece]
