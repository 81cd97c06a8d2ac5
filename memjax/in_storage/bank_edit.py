"""Appending to a bank on disk, deleting from it, and compacting it: each one replacement of its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memjax.errors import BankError
from memjax.in_storage.bank_change import Change
from memjax.in_storage.bank_manifest import check_owner
from memjax.in_storage.bank_reader import OpenBank, open_bank
from memjax.in_storage.bank_segment import Block
from memjax.in_storage.bank_table import Source

COPIED = 4096  # chunks that compaction holds in memory, and one document more


def append_documents(
    path: str | Path,
    blocks: Iterable[Block],
    *,
    model_hash: str | None = None,
    tokenizer_hash: str | None = None,
    sources: Mapping[str, Source] | None = None,
) -> None:
    """More documents, numbered after the last, in new segments. An exception leaves the bank as it was.

    Args:
      model_hash, tokenizer_hash: where given, those the bank must have been built with.
      sources: what is known of the files named in the blocks.

    Raises:
      BankError: of another model, blocks that do not fit, none at all, or another process at work.
    """
    with Change(Path(path)) as change:
        check_owner(change.path, change.manifest, model_hash, tokenizer_hash)
        change.resume("")
        written = 0
        for block in blocks:
            change.append(block, sources)
            written += len(block.doc_len)
        if not written:
            raise BankError(f"{path}: no document was written")
        change.finish()


def delete_documents(path: str | Path, documents: Sequence[int]) -> int:
    """Hide documents from now on: never routed to, never shown; how many were there until now.

    The others keep their numbers and every bit of their answers. Their files stay until `compact`, and where another
    document shares the text, that one is found instead. Deleting what is deleted changes nothing.

    Raises:
      BankError: a number the bank does not have.
    """
    with Change(Path(path)) as change:
        count = sum(s["documents"] for s in change.manifest["segments"])
        before = len(change.manifest["deleted"])
        for document in documents:
            if not 0 <= document < count:
                raise BankError(f"{path}: no document {document}; the bank has {count}, the deleted ones included")
        change.delete(documents)
        if gone := len(change.manifest["deleted"]) - before:
            change.finish_deletion()
        return gone


def delete_files(path: str | Path, patterns: Sequence[str]) -> tuple[int, int]:
    """Hide the documents of some source files, see `delete_documents`; how many files and documents were there.

    Args:
      patterns: paths as the bank names them, of files or of folders, or patterns of paths in which "*" stands for any
        characters, "/" among them.

    Raises:
      BankError: a pattern that no file has, deleted ones included.
    """
    with Change(Path(path)) as change:
        table = open_bank(path).documents
        rows: list[int] = []
        for pattern in patterns:
            folder = pattern.rstrip("/") + "/"
            found = {f for f in set(table.path) if fnmatchcase(f, pattern) or f == pattern or f.startswith(folder)}
            if not found:
                raise BankError(f"{path}: none of its {len(set(table.path))} files is {pattern!r}")
            rows += [i for i, file in enumerate(table.path) if file in found]
        gone = set(rows) - set(change.manifest["deleted"])
        change.delete(sorted(gone))
        if gone:
            change.finish_deletion()
        return len({table.path[i] for i in gone}), len(gone)


class Compacted(NamedTuple):
    """What `compact` did. documents: that are left; dropped: deleted ones whose numbers and files are gone."""

    documents: int
    dropped: int
    segments: int  # that became one


def compact(path: str | Path) -> Compacted:
    """Write what lives into one segment, and drop the rest from the disk. Killed at any moment it leaves a good bank.

    Documents are numbered anew, in their order, those that share another's text last, so numbers that somebody kept
    mean others afterwards; what a search finds, its scores and texts stay, bit for bit. An unfinished change is thrown
    away. Room is needed for the old bank and the new one. For readers that have the bank open see
    `memjax.in_storage.bank_reader`.

    Raises:
      BankError: the bank is damaged, or every document is deleted.
    """
    with Change(Path(path)) as change:
        opened = open_bank(path)
        segments, dropped = len(opened.manifest["segments"]), len(opened.manifest["deleted"])
        living = opened.living()
        if not living.size:
            raise BankError(f"{path}: every document is deleted; append some, or remove the bank")
        change.resume("")
        if segments > 1 or dropped:
            change.manifest.update(segments=[], deleted=[])
            change.segment_chunks = int(opened.bank.doc_len.sum())
            for block, sources in _copied(opened):
                change.append(block, sources)
            table = opened.documents
            for i in living[np.asarray(opened.bank.doc_len)[living] == 0].tolist():
                change.refer(table.source[i], int(table.first_line[i]), int(table.last_line[i]), table.sha256[i])
            change.finish()
        return Compacted(len(living), dropped, segments)


def _copied(opened: OpenBank) -> Iterator[tuple[Block, dict[str, Source]]]:
    """What a search can find, block by block; in a block one version of a file."""
    bank, table = opened.bank, opened.documents
    group: list[int] = []
    sources: dict[str, Source] = {}
    for i in [*np.flatnonzero(bank.doc_len).tolist(), -1]:
        full = i < 0 or bank.doc_len[group].sum() >= COPIED
        if group and (full or sources.get(table.path[i], table.source[i]) != table.source[i]):
            starts, lengths = bank.doc_start[group], bank.doc_len[group]
            chunks = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
            yield (
                Block(
                    *(a[:, chunks] for a in (bank.rk, bank.k, bank.v)),
                    doc_len=lengths,
                    ids=[opened.token_ids(d) for d in group],
                    path=[table.path[d] for d in group],
                    first_line=table.first_line[group],
                    last_line=table.last_line[group],
                ),
                sources,
            )
            group, sources = [], {}
        group.append(i)
        sources[table.path[i]] = table.source[i]
