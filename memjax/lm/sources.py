"""What a bank has of some source files and what it lacks: files compared by their hashes, and cut into documents."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from memjax.data.corpus import File, TokenizedDocuments, cut
from memjax.data.tokenizer import Tokenizer
from memjax.errors import DataError
from memjax.in_storage.bank_disk import sha256_of_ids
from memjax.in_storage.bank_files import OpenBank, Source


@dataclass
class FileChanges:
    """Paths of source files, by what became of them."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


def sources_of(files: Sequence[File], appended: bool) -> dict[str, Source]:
    """Files by their paths, with the sha256 of each. DataError where two have one path."""
    sources = {f.path: Source(f.path, _sha256(f), appended) for f in files}
    if len(sources) < len(files):
        paths = sorted(f.path for f in files)
        twice = next(a for a, b in zip(paths, paths[1:], strict=False) if a == b)
        raise DataError(f"files: two have the path {twice!r}; a bank tells its files apart by their paths")
    return sources


def _sha256(file: File) -> str:
    """Of what a citation shows: the text, and the lines of its source, which can move while the text stays."""
    digest = hashlib.sha256(file.text.encode())
    if file.lines is not None:
        digest.update(b"\0" + np.asarray(file.lines, "<i4").tobytes())
    return digest.hexdigest()


def compare(
    opened: OpenBank | None, sources: dict[str, Source], keep_others: bool, unread: Collection[str] = ()
) -> tuple[FileChanges, list[int]]:
    """What became of each file, and the documents that go.

    unread: files and folders that are there and could not be read: what the bank has of them stays.
    """
    changes, gone = FileChanges(), []
    there: dict[str, list[tuple[Source, list[int]]]] = {}
    for source, rows in (opened.files() if opened else {}).items():
        there.setdefault(source.path, []).append((source, rows))
    for path, source in sources.items():
        same = [s for s, _ in there.get(path, ()) if s.sha256 == source.sha256]
        (changes.unchanged if same else changes.changed if path in there else changes.new).append(path)
        gone += [row for s, rows in there.get(path, ()) if s.sha256 != source.sha256 for row in rows]
    for path in there.keys() - sources.keys() if not keep_others else ():
        unknown = any(path == place or path.startswith(f"{place}/") for place in unread)
        if not unknown and not all(s.appended for s, _ in there[path]):
            changes.removed.append(path)
            gone += [row for _, rows in there[path] for row in rows]
    changes.removed.sort()
    return changes, sorted(gone)


def cut_files(
    files: Sequence[File], tokenizer: Tokenizer, width: int, needed: bool
) -> tuple[TokenizedDocuments, list[str]]:
    """Files cut one by one, so that what two of them share stands under both; with the sha256 of each document."""
    parts: list[TokenizedDocuments] = []
    index: list[np.ndarray] = []
    for i, file in enumerate(files):
        try:
            parts.append(cut([file], tokenizer, width))
        except DataError:  # no document: nothing but what the tokenizer drops
            continue
        index.append(np.full(len(parts[-1].lengths), i, np.int32))
    if not parts and needed:
        raise DataError(f"files: {len(files)} files give no document of {width} tokens")
    none = np.zeros(0, np.int32)
    join = lambda name: np.concatenate([getattr(p, name) for p in parts]) if parts else none  # noqa: E731
    ids: np.ndarray = join("ids") if parts else none.reshape(0, width)
    lengths = join("lengths")
    whole = TokenizedDocuments(
        ids,
        lengths,
        np.concatenate(index) if index else none,
        join("first_line"),
        join("last_line"),
        tuple(f.path for f in files),
    )
    return whole, [sha256_of_ids(ids[i, :n]) for i, n in enumerate(lengths.tolist())]


def chosen(documents: TokenizedDocuments, rows: list[int]) -> TokenizedDocuments:
    """Some of the documents."""
    ids, lengths, index, first, last, paths = documents
    return TokenizedDocuments(ids[rows], lengths[rows], index[rows], first[rows], last[rows], paths)
