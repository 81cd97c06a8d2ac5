"""One segment of a bank in the making: what documents have to look like, and the files they become.

A segment is written once and never changed. It is part of a bank when a manifest names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from memjax.errors import BankError
from memjax.in_storage import bank_disk as disk
from memjax.in_storage.bank_arrays import SHARD, Stream
from memjax.in_storage.bank_disk import is_inside, sha256_of_ids
from memjax.in_storage.bank_table import Rows, Source


class Block(NamedTuple):
    """Some documents with their chunks: what a model makes of one batch of texts."""

    rk: Shaped[Any, "n m h d"]  # routing keys, keys and values, in document order
    k: Shaped[Any, "n m h d"]
    v: Shaped[Any, "n m h d"]
    doc_len: Sequence[int] | np.ndarray  # [p], chunks of each document, at least one
    ids: Sequence[Int[Any, " t"]]  # p arrays, the token ids of each document
    path: Sequence[str]  # p source files, relative to the corpus
    first_line: Sequence[int] | np.ndarray  # [p], counted from 1
    last_line: Sequence[int] | np.ndarray


class Segment:
    """One segment in the making: arrays in a stream, the table at the end."""

    def __init__(self, path: Path, manifest: dict):
        self.path, self._manifest, self.rows, self.chunks = path, manifest, Rows(), 0
        disk.make_directory(path)
        self._streams: dict[str, Stream] = {}

    def append(self, block: Block, sources: Mapping[str, Source]) -> None:
        check_block(block, self._manifest)
        if not len(block.doc_len):
            return
        if not self._streams:
            self._streams = {name: Stream(self.path / name, name, self._manifest) for name in SHARD}
        ids = [np.asarray(a) for a in block.ids]
        for name in ("rk", "k", "v"):
            self._streams[name].append(np.asarray(getattr(block, name)))
        self._streams["ids"].append(np.concatenate(ids))
        self.chunks += sum(map(int, block.doc_len))
        for i, a in enumerate(ids):
            source = sources.get(block.path[i]) or Source(block.path[i])
            lines = int(block.first_line[i]), int(block.last_line[i])
            self.rows.add(source, *lines, len(a), int(block.doc_len[i]), sha256_of_ids(a))

    def finish(self) -> dict:
        """The entry of the manifest."""
        if not self.rows.sha256:
            raise BankError(f"{self.path.parent}: no document was written")
        for stream in self._streams.values():
            stream.finish()
        files = sorted(p for p in self.path.rglob("*") if p.is_file())
        table = self.rows.encode({p.relative_to(self.path).as_posix(): p.stat().st_size for p in files})
        disk.write_file(self.path / "table.json", table)
        for directory in (*(p for p in self.path.rglob("*") if p.is_dir()), self.path, self.path.parent):
            disk.sync_directory(directory)
        return self.rows.entry(self.path.name, table)


def check_block(block: Block, manifest: dict) -> None:
    """BankError unless a block fits the bank and itself."""
    p, m = len(block.doc_len), sum(map(int, block.doc_len))
    want = (manifest["layers"], m, manifest["kv_heads"], manifest["head_dim"])
    for name in ("rk", "k", "v"):
        if getattr(block, name).shape != want:
            raise BankError(f"block: {name} is {list(getattr(block, name).shape)}, needs {list(want)}")
    for name in ("ids", "path", "first_line", "last_line"):
        if (found := len(getattr(block, name))) != p:
            raise BankError(f"block: {name} has {found} entries, needs one for each of {p} documents")
    for i, (ids, chunks, path) in enumerate(zip(block.ids, block.doc_len, block.path, strict=True)):
        a = np.asarray(ids)
        if a.ndim != 1 or not np.issubdtype(a.dtype, np.integer) or len(a) < chunks or chunks < 1:
            has = f"{chunks} chunks, ids {a.dtype}{list(a.shape)}"
            raise BankError(f"block: document {i} has {has}, needs 1 <= chunks <= ids")
        if a.min() < 0 or a.max() >= manifest["vocab"]:
            raise BankError(f"block: document {i} has ids {a.min()}..{a.max()}, needs 0..{manifest['vocab'] - 1}")
        check_path(path, f"block: document {i}")
    for name in ("first_line", "last_line"):
        if p and min(map(int, getattr(block, name))) < 0:
            raise BankError(f"block: {name} is {min(map(int, getattr(block, name)))}, needs counts")
    for name in ("rk", "k", "v"):
        if not np.isfinite(np.asarray(getattr(block, name)).astype(np.float32)).all():
            raise BankError(f"block: {name} holds NaN or infinity, which would win every search or spoil what is read")


def check_path(path: str, what: str) -> None:
    """BankError for a source file that is not below the corpus."""
    if not is_inside(path):
        raise BankError(f"{what}: path is {path!r}, needs a path below the corpus")
