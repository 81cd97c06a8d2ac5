"""Memory Interleave: a model of MSA layers asks its bank in rounds, for questions that take several hops.

The rounds are those of `memjax.lm.interleave_text`; here a model continues the text. Text is turned into tokens piece
by piece: a mark is one token where the tokenizer has it, and what a document, a question or the model says never
becomes one. A text that is read anew starts from fresh rows: of an earlier round nothing is left but its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from memjax.data.tokenizer import DecodeStream, Tokenizer
from memjax.errors import ConfigError
from memjax.in_storage import bank as banks
from memjax.lm import pooling, reader
from memjax.lm.generate import Prefix, read, stream
from memjax.lm.interleave_text import (
    LIMITS,
    MSA_4B,
    QUESTION,
    TEMPLATE,
    Call,
    Decoded,
    Interleaved,
    Limits,
    Marks,
    Piece,
    in_rounds,
)
from memjax.lm.reading import pad_left
from memjax.memory import Memory

NARROWEST = 64  # texts are padded to powers of two from here on, so that few programs are compiled


class InterleavedAnswer(NamedTuple):
    """How one question was answered.

    text: the answer, the rounds, why retrieval stopped; its numbers are the model's, from `Marks.first` on.
    documents: of the bank, those whose text was read, in the order of reading. routing: what every reading of the text
    chose, rounds first, b = 1.
    """

    text: Interleaved
    documents: tuple[int, ...]
    routing: tuple[reader.Routing, ...]


def answer_in_rounds(
    model: Memory,
    params: dict,
    bank: banks.Bank,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    document_ids: Callable[[int], np.ndarray],
    *,
    marks: Marks = MSA_4B,
    limits: Limits = LIMITS,
    interleave: bool = True,
    original_text: bool = True,
) -> list[InterleavedAnswer]:
    """Answer questions over the bank, greedily, in rounds in which the model says which documents it wants to read.

    One question after the other, since their rounds differ in number and length; each is answered as if alone. Only
    documents that a search can return are shown, so a deleted one never is. The model's window bounds the text: where
    documents find no room, retrieval stops and the answer is given from what was read, with `stopped` "window".

        opened = open_bank("notes.bank")
        (got,) = answer_in_rounds(model, params, opened.bank, tokenizer, ["..."], opened.token_ids)
        print(got.text.answer, got.documents, got.text.stopped)

    Args:
      document_ids: document number of the bank -> its token ids, without padding.
      marks: the strings that the model was trained on; the defaults are those of MSA-4B.
      limits: of rounds, and of what is generated.
      interleave, original_text: the paper's ablations; see `memjax.lm.interleave_text.in_rounds`.

    Raises:
      ConfigError: a question is empty or too long for the model's window; the marks' head is not as long as the
        template of the model's layers.
      ValueError: marks that are empty or equal, limits below 1, a bank of another number of router layers.
    """
    layers = pooling.router_layers(model)
    head = len(_ids(tokenizer, (Piece(t, TEMPLATE, t in marks[:4]) for t in marks.head)))
    if any(m.template != head for m in layers):
        found = sorted({m.template for m in layers})
        raise ConfigError(f"marks: head has {head} tokens, the template of the model's layers has {found}")
    living = np.asarray(bank.doc_len) > 0

    def text_of(number: int) -> str | None:
        document = number - marks.first
        there = 0 <= document < len(living) and bool(living[document])
        return tokenizer.decode(document_ids(document)) if there else None

    answers = []
    for question in questions:
        decode = _Decode(model, params, bank, tokenizer)
        got = in_rounds(
            question,
            decode,
            text_of,
            marks=marks,
            limits=limits,
            window=min(m.window for m in layers),
            size=lambda piece: len(_ids(tokenizer, [piece])),
            interleave=interleave,
            original_text=original_text,
        )
        documents = tuple(n - marks.first for n in got.documents)
        answers.append(InterleavedAnswer(got, documents, tuple(decode.routing)))
    return answers


def tokens(tokenizer: Tokenizer, text: Sequence[Piece]) -> tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
    """The ids of a text, and which of them route."""
    parts = [_ids(tokenizer, [piece]) for piece in text]
    routes = [np.full(len(ids), piece.role == QUESTION) for ids, piece in zip(parts, text, strict=True)]
    return np.concatenate(parts), np.concatenate(routes)


def _ids(tokenizer: Tokenizer, text: Iterable[Piece]) -> np.ndarray:
    parts = [
        np.array([tokenizer.special[p.text]]) if p.mark and p.text in tokenizer.special else tokenizer.encode(p.text)
        for p in text
    ]
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


class _Decode:
    """Continues text with the model; what it has read last stays for the next call, and every routing is kept."""

    def __init__(self, model: Memory, params: dict, bank: banks.Bank, tokenizer: Tokenizer):
        self.model, self.params, self.bank, self.tokenizer = model, params, bank, tokenizer
        self.prefix: Prefix | None = None
        self.routing: list[reader.Routing] = []

    def __call__(self, call: Call) -> Decoded:
        ids, routes = tokens(self.tokenizer, call.text[call.kept :])
        width = max(NARROWEST, 1 << (len(ids) - 1).bit_length())
        padded, valid = pad_left([ids], width)
        if call.kept:
            self.prefix = read(self.model, self.params, self.prefix, padded, valid=valid)
        else:
            asks = np.pad(routes, (width - len(ids), 0))[None]
            given = (jnp.asarray(a) for a in (padded, valid, asks))
            self.prefix, routing = reader.ask_prefix(self.model, self.params, self.bank, *given)
            self.routing.append(routing)
        return self._write(call)

    def _write(self, call: Call) -> Decoded:
        """Greedily, token by token, until a mark: a single token, or a string in what was written."""
        special = {self.tokenizer.special[m]: m for m in call.until if m in self.tokenizer.special}
        spelt = [m for m in call.until if m not in special.values()]
        pieces, text, length = DecodeStream(self.tokenizer), "", 0
        for row, prefix in stream(self.model, self.params, self.prefix, steps=call.tokens):
            self.prefix, token, length = prefix, int(row[0, 0]), length + 1
            if (mark := special.get(token)) is not None:
                return Decoded(text + pieces.finish(), mark, length)
            text += pieces.push(token)
            if found := [(text.find(m), m) for m in spelt if m in text]:
                at, mark = min(found)
                return Decoded(text[:at], mark, length)
            if call.characters is not None and len(text) > call.characters:
                break
        return Decoded(text + pieces.finish(), None, length)
