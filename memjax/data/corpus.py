"""Texts to documents that know where they came from: one array of token ids whose rows can be cited."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from memjax.data.folder import File
from memjax.data.tokenizer import Tokenizer
from memjax.errors import DataError


class Document(NamedTuple):
    """A piece of a file. Lines (of a PDF: pages) are counted from 1, and the last one is included."""

    path: str
    first_line: int
    last_line: int
    text: str

    @property
    def citation(self) -> str:
        """path:first-last, or path:line; of a PDF "path, page 3"."""
        several = self.last_line > self.first_line
        numbers = f"{self.first_line}-{self.last_line}" if several else f"{self.first_line}"
        if self.path.lower().endswith(".pdf"):
            return f"{self.path}, page{'s' if several else ''} {numbers}"
        return f"{self.path}:{numbers}"


class TokenizedDocuments(NamedTuple):
    """n documents of at most `length` tokens each. Lines are counted from 1, and the last one is included."""

    ids: Int32[np.ndarray, "n length"]  # padded on the right
    lengths: Int32[np.ndarray, " n"]  # tokens of each row
    path_index: Int32[np.ndarray, " n"]  # into paths
    first_line: Int32[np.ndarray, " n"]
    last_line: Int32[np.ndarray, " n"]
    paths: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all documents, without padding."""
        return int(self.lengths.sum())

    def document(self, i: int, tokenizer: Tokenizer) -> Document:
        """Document i with its text, decoded by the tokenizer that made the ids."""
        text = tokenizer.decode(self.ids[i, : self.lengths[i]])
        return Document(self.paths[self.path_index[i]], int(self.first_line[i]), int(self.last_line[i]), text)


def cut(
    files: Sequence[File],
    tokenizer: Tokenizer,
    tokens_per_document: int,
    *,
    align: Literal["lines", "tokens"] = "lines",
) -> TokenizedDocuments:
    """Cut files into documents of at most `tokens_per_document` tokens. Exact duplicates (equal ids) are dropped.

    With align="lines" a document is as many whole lines as fit, encoded on their own: its ids equal
    `tokenizer.encode` of its text, and its first token never depends on the line before. Only a line that alone is too
    long is cut inside. With align="tokens" a file is encoded whole and cut every `tokens_per_document` tokens: each
    document is full, a shorter rest is dropped, and a border may fall inside a line (which both documents then cite).

    Args:
      files: the texts, as `read_folder` or `standard_library` give them.
      tokenizer: encodes; with align="tokens" it must keep newlines, as every byte-level one does.
      tokens_per_document: width of the result, at least 1.
      align: where the borders lie.

    Returns:
      The documents in the order of the files, padded on the right with the tokenizer's "<pad>", or 0.

    Raises:
      DataError: if no document is left.
    """
    if tokens_per_document < 1:
        raise ValueError(f"tokens_per_document must be at least 1, got {tokens_per_document}")
    pieces = _cut_at_lines if align == "lines" else _cut_at_tokens
    rows, where, seen = [], [], set()
    for index, piece in pieces(files, tokenizer, tokens_per_document):
        digest = hashlib.blake2b(piece.ids.tobytes(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            rows.append(piece.ids)
            first, last = piece.first_line, piece.last_line
            numbers = files[index].lines
            where.append((index, *((numbers[first - 1], numbers[last - 1]) if numbers else (first, last))))
    if not rows:
        raise DataError(f"files: {len(files)} files give no document of {tokens_per_document} tokens")

    ids = np.full((len(rows), tokens_per_document), tokenizer.special.get("<pad>", 0), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    lengths = np.array([len(values) for values in rows], np.int32)
    path_index, first_line, last_line = np.array(where, np.int32).T.copy()
    return TokenizedDocuments(ids, lengths, path_index, first_line, last_line, tuple(file.path for file in files))


class _Piece(NamedTuple):
    ids: np.ndarray
    first_line: int
    last_line: int


def _cut_at_lines(files: Sequence[File], tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, _Piece]]:
    for index, file in enumerate(files):
        lines = file.text.split("\n")
        lines = [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
        # Lines encoded one by one bound what they take together, but for rare tokenizers: _fit is for those.
        counts = [len(ids) for ids in tokenizer.encode_batch(lines)]
        spans = list(_greedy(counts, length))
        encoded = tokenizer.encode_batch(["".join(lines[a:b]) for a, b in spans])
        for (a, b), ids in zip(spans, encoded, strict=True):
            for piece in _fit(tokenizer, lines, a, b, ids, length):
                yield index, piece


def _greedy(counts: list[int], length: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of lines whose counts sum up to at most `length`; a longer line stands alone."""
    first, total = 0, 0
    for i, count in enumerate(counts):
        if i > first and total + count > length:
            yield first, i
            first, total = i, 0
        total += count
    if first < len(counts):
        yield first, len(counts)


def _fit(tokenizer: Tokenizer, lines: list[str], a: int, b: int, ids: np.ndarray, length: int) -> Iterator[_Piece]:
    """The lines [a, b) as they are if they fit; else in halves, and a single line cut hard."""
    if len(ids) <= length:
        if len(ids):
            yield _Piece(ids, a + 1, b)
    elif b - a == 1:
        for start in range(0, len(ids), length):
            yield _Piece(ids[start : start + length], a + 1, b)
    else:
        middle = (a + b) // 2
        for c, d in ((a, middle), (middle, b)):
            yield from _fit(tokenizer, lines, c, d, tokenizer.encode("".join(lines[c:d])), length)


def _cut_at_tokens(files: Sequence[File], tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, _Piece]]:
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    newlines = np.array([text.count("\n") for text in texts], np.int64)
    ends_line = np.array([text.endswith("\n") for text in texts], np.int64)
    for index, file in enumerate(files):
        ids = tokenizer.encode(file.text)
        before = np.cumsum(newlines[ids]) - newlines[ids]  # lines ended before each token
        inside = newlines[ids] - ends_line[ids]  # lines ended within it, with text after
        for start in range(0, len(ids) - length + 1, length):
            last = start + length - 1
            piece = ids[start : last + 1]
            yield index, _Piece(piece, 1 + int(before[start]), 1 + int(before[last] + inside[last]))
