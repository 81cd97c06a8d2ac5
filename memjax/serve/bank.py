"""A bank that is asked again and again, and followed when it changes. Knows nothing of HTTP, and of one thread only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memjax.data.corpus import Document
from memjax.errors import BankError, ConfigError
from memjax.in_storage.bank_files import OpenBank
from memjax.in_storage.bank_manifest import NAME
from memjax.lm.asking import Asked, Passage, ask, excerpt, word_index
from memjax.lm.files import LoadedModel
from memjax.lm.pooling import router_layers
from memjax.lm.reader import Routing, agree


class ServedBank:
    """An open bank with its model, both opened anew when the bank's manifest is another.

    path: of the bank. open: gives the model and the open bank, as `memjax.lm.asking.open_with_model` does. passages:
    documents that are read before answering; by default as in training. words: choose them by their words too.
    """

    def __init__(
        self,
        path: Path,
        open: Callable[[], tuple[LoadedModel, OpenBank]],
        passages: int | None = None,
        words: bool = False,
    ):
        self._path, self._open, self._passages, self._words = path, open, passages, words
        self._seen: tuple[int, ...] | None = None  # the manifest that is open

    def about(self) -> dict[str, Any]:
        """What is asked. Raises MemjaxError or OSError where the bank can't be opened."""
        self._follow()
        assert self._loaded.reading is not None  # open_with_model has looked
        lives = np.asarray(self._opened.bank.doc_len) > 0
        return {
            "bank": self._path.resolve().name,
            "documents": int(lives.sum()),
            "tokens": int(self._opened.documents.tokens[lives].sum()),
            "layers": self._opened.manifest["layers"],
            "passages": self._passages or self._loaded.reading.passages,
            "model": self._loaded.hash[:12],
        }

    def warm_up(self) -> None:
        """Ask something, so that the first question waits for no compiler.

        Raises the errors of `ask`, and ConfigError where no question would leave room for the passages.
        """
        self._follow()
        assert (reading := self._loaded.reading) is not None  # open_with_model has looked
        window = min(layer.window for layer in router_layers(self._loaded.model))
        passages = (self._passages or reading.passages) * (1 + reading.document_tokens)
        if (needed := passages + reading.answer_tokens + 2) > window:
            raise ConfigError(
                f"answer: question, passages and answer are {needed} tokens at least where the passages are full, the "
                f"model's window is {window}; serve fewer passages"
            )
        first = int(self._opened.living()[0])
        for _ in self.ask(self._loaded.tokenizer.decode(self._opened.token_ids(first)[:8])):
            pass

    def ask(self, question: str) -> Iterator[dict[str, Any]]:
        """What `memjax.serve` sends, as it becomes known.

        Raises:
          ConfigError: the question can't be asked: empty, or too long for the model's window.
          MemjaxError, OSError: the bank or its model can't be read.
        """
        began, first = time.perf_counter(), None
        asked = self._ask(question)
        yield {
            "type": "found",
            "passages": [_passage(p, question) for p in asked.passages],
            "routing": self._routing(asked.routing),
        }
        for text in asked.answer:
            if first is None and text.strip():
                first = time.perf_counter() - began
            if text:
                yield {"type": "text", "text": text}
        yield {"type": "end", "first_word_seconds": first, "seconds": time.perf_counter() - began}

    def _ask(self, question: str) -> Asked:
        self._follow()
        try:
            return self._ask_once(question)
        except BankError:
            if self._manifest() == self._seen:
                raise
        self._follow()  # it was compacted under our hands
        return self._ask_once(question)

    def _ask_once(self, question: str) -> Asked:
        return ask(self._loaded, self._opened, question, self._passages, same_shapes=True, words=self._index)

    def _follow(self) -> None:
        """Open the bank if it is not open, or another than the open one."""
        if (now := self._manifest()) is not None and now == self._seen:
            return
        self._seen = None
        try:
            self._loaded, self._opened = self._open()
        except ConfigError as error:  # of the model: no fault of the question
            raise BankError(str(error)) from None
        self._index = word_index(self._loaded, self._opened) if self._words else None
        self._seen = now

    def _manifest(self) -> tuple[int, ...] | None:
        """What changes when the manifest is replaced."""
        try:
            found = (self._path / NAME).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _routing(self, routing: Routing) -> dict[str, Any]:
        order = [i for i, _ in agree(routing, routing.documents.size)[0]]
        layers = [
            dict(zip(documents.tolist(), scores.tolist(), strict=True))
            for documents, scores in zip(routing.documents[:, 0], routing.scores[:, 0], strict=True)
        ]
        table = self._opened.documents
        places = [Document(table.path[i], int(table.first_line[i]), int(table.last_line[i]), "") for i in order]
        return {
            "documents": [{"document": i, **_place(place)} for i, place in zip(order, places, strict=True)],
            "scores": [[_finite(layer.get(i)) for i in order] for layer in layers],
        }


def _passage(passage: Passage, question: str) -> dict[str, Any]:
    text = passage.document.text
    return {
        "document": passage.number,
        **_place(passage.document),
        "score": _finite(passage.score),
        "text": text,
        "excerpt": [{"text": piece, "marked": marked} for piece, marked in excerpt(text, question)],
    }


def _place(document: Document) -> dict[str, Any]:
    path, first, last, _ = document
    return {"file": path, "first_line": first, "last_line": last, "citation": document.citation}


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
