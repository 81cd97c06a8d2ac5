"""Corpora: files to documents that know where they came from.

`read_folder` and `standard_library` give texts, `cut` turns them into one array of token ids whose rows are documents
with a path and a range of lines, so that whatever is later retrieved can be cited.
"""

import errno
import hashlib
import importlib.util
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from memjax.data.tokenizer import Tokenizer
from memjax.errors import DataError

SKIPPED_FOLDERS = ("__pycache__", "node_modules")
"""Folders that hold no sources. Hidden files and folders (.git, .venv, .env) are passed over too."""

_TESTS = {"test", "tests", "idle_test"}


class File(NamedTuple):
    """One text with the name it is cited by: a relative path with "/", or a logical name."""

    path: str
    text: str


class Skipped(NamedTuple):
    """A file that was not read, and why."""

    path: str
    reason: str


class Document(NamedTuple):
    """A piece of a file. Lines are counted from 1, and the last one is included."""

    path: str
    first_line: int
    last_line: int
    text: str

    @property
    def citation(self) -> str:
        """path:first-last, or path:line."""
        lines = f"{self.first_line}-{self.last_line}" if self.last_line > self.first_line else f"{self.first_line}"
        return f"{self.path}:{lines}"


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


def read_folder(
    path: str | os.PathLike, *, max_bytes: int = 1 << 24, extensions: tuple[str, ...] | None = None
) -> tuple[list[File], list[Skipped]]:
    """Read every UTF-8 text file below a folder, in the order of their relative paths; or one file.

    Hidden entries, `SKIPPED_FOLDERS` and other extensions are passed over. Whatever else can't be used is listed:
    binary files, other encodings (never guessed), empty, oversized or unreadable files, pipes and devices, names that
    are not UTF-8, and links to folders (they can form loops). Links to files are followed. A byte order mark is
    dropped; line ends stay as they are.

    Args:
      path: a folder or a file.
      max_bytes: larger files are skipped.
      extensions: endings of names, such as (".py", ".md"); None takes all. Not asked of a file named by `path` itself.

    Returns:
      The files, and the skipped ones with their reasons.

    Raises:
      DataError: naming the path, if it does not exist, if the folder has no text file, or if the file is not usable.
    """
    root = Path(path)
    if extensions is not None and (not extensions or not all(end.startswith(".") for end in extensions)):
        raise ValueError(f"extensions must be endings that begin with a dot, such as ('.py',), got {extensions!r}")
    if not root.exists():
        raise DataError(f"{root}: there is no such file or folder")
    if not root.is_dir():
        found = _read(root, root.name, max_bytes)
        if isinstance(found, Skipped):
            raise DataError(f"{root}: can't be used as text: {found.reason}")
        return [found], []

    read = [_read(file, name, max_bytes) for name, file in sorted(_walk(root)) if name.endswith(extensions or "")]
    files = [found for found in read if isinstance(found, File)]
    skipped = [found for found in read if isinstance(found, Skipped)]
    if not files:
        ending = f" with extension {' or '.join(extensions)}" if extensions else ""
        example = f", such as {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{root}: the folder holds no text file{ending} ({len(skipped)} skipped{example})")
    return files, skipped


def standard_library() -> list[File]:
    """The text that is on every machine with Python: the standard library's sources, and pydoc's help topics.

    The modules of `sys.stdlib_module_names` without their tests, in the order of their paths, then the topics under
    pydoc_data/topics/. It depends on nothing but the version of Python (3.11: 11.8 MB, 3.8
    million tokens of a BPE with a vocabulary of 2048).

    Raises:
      DataError: if this Python came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    # What else lies at the top is installed packages, or describes one machine (_sysconfigdata, sitecustomize).
    for module in sys.stdlib_module_names:
        if (root / f"{module}.py").is_file():
            found.append((f"{module}.py", root / f"{module}.py"))
        found += [(f"{module}/{name}", path) for name, path in _walk(root / module) if name.endswith(".py")]
    files = []
    for name, path in sorted(found):
        file = _read(path, name, max_bytes=1 << 24)
        # The topics are one dict literal in their source, and are read from the dict below.
        if isinstance(file, File) and not _TESTS & set(name.split("/")) and name != "pydoc_data/topics.py":
            files.append(file)
    if not files:
        raise DataError(f"{root}: this Python came without the sources of the standard library")
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        files += sorted(File(f"pydoc_data/topics/{name}.txt", text) for name, text in topics.items())
    return files


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
            where.append((index, piece.first_line, piece.last_line))
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


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of what is below root and not hidden; links to folders are given, not entered."""
    for folder, subfolders, names in os.walk(root):
        entered = [name for name in subfolders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        subfolders[:] = entered
        links = [name for name in entered if os.path.islink(os.path.join(folder, name))]
        for name in links + [name for name in names if not name.startswith(".")]:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _read(path: Path, name: str, max_bytes: int) -> File | Skipped:
    printable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if printable != name:
        return Skipped(printable, "its name is not UTF-8")
    try:
        # Look before opening: a named pipe would block for ever.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return Skipped(name, "a link to a folder")
        if not stat.S_ISREG(status.st_mode):
            return Skipped(name, "not a regular file")
        if status.st_size > max_bytes:
            return Skipped(name, f"{status.st_size} bytes, over max_bytes = {max_bytes}")
        data = path.read_bytes()
    except OSError as error:
        return Skipped(name, os.strerror(error.errno or errno.EIO))
    if b"\0" in data:
        return Skipped(name, f"binary: a NUL byte at offset {data.index(0)}")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(name, f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}")
    return File(name, text) if text.strip() else Skipped(name, "empty")
