"""A bank on disk: written in a stream, opened lazily, appended to and deleted from without a moment of a broken bank.

    bank/manifest.json                  what the bank is: model, tokenizer, counts, deleted documents, checksums
    bank/segment-<random>/table.json    documents in columns, and the size of every file of the segment
    bank/segment-<random>/{rk,k,v,ids}  zarr3 arrays, sharded, every inner chunk with a crc32c

A segment is written once and never changed; `append_documents` adds one. Only the manifest says which segments count,
and it is replaced last and atomically: an interruption leaves the old bank or the new one. Arrays are opened with the
metadata the manifest implies, never the file's own, and missing chunks are errors: by default zarr3 reads a flipped bit
as a number and a lost file as zeros. The checksums find damage; they are no signature against an author of forgeries.
What the manifest and the tables have to look like stands in `bank_manifest`.

Token ids are kept beside the vectors, so that the text of a document can be shown without its source file. Whatever is
wrong with the files is a BankError of one line that names file and field.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped

from memjax.errors import BankError
from memjax.in_storage.bank import Bank
from memjax.in_storage.bank_manifest import (
    FORMAT,
    SHARD,
    VERSION,
    check_manifest,
    check_owner,
    is_inside,
    plain_json,
    read_manifest,
    read_table,
    seal,
    storage_errors,
    sync_directory,
    write_file,
    write_manifest,
)

INNER = {"rk": 1024, "k": 32, "v": 32, "ids": 4096}  # chunks (of ids: tokens) per crc32c: reading takes a few of them
CACHE_BYTES = 64 << 20  # of shard indexes and inner chunks, over all arrays of a bank


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


class Documents(NamedTuple):
    """The table of documents, one entry per document, the deleted ones included."""

    path: list[str]
    first_line: Int[np.ndarray, " N"]
    last_line: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]
    chunks: Int[np.ndarray, " N"]  # as written; `Bank.doc_len` is 0 where deleted
    sha256: list[str]  # of the ids as little-endian uint32


@dataclass(frozen=True)
class OpenBank:
    """What `open_bank` returns."""

    bank: Bank
    manifest: dict
    documents: Documents
    path: Path
    ids: Any  # [tokens], all documents one after the other, on disk

    def token_ids(self, document: int) -> Int[np.ndarray, " t"]:
        """The ids of one document, int32, checked against its sha256."""
        if not 0 <= document < len(self.documents.tokens):
            raise BankError(f"{self.path}: no document {document}; the bank has {len(self.documents.tokens)}")
        if document in self.manifest["deleted"]:
            raise BankError(f"{self.path}: document {document} is deleted")
        start = int(self.documents.tokens[:document].sum())
        ids = self.ids[start : start + int(self.documents.tokens[document])].astype(np.int32)
        if _sha256_of_ids(ids) != self.documents.sha256[document]:
            raise BankError(f"{self.path}: field 'sha256' of document {document} does not match its token ids")
        return ids


class DiskArray:
    """A read-only array on disk that is indexed like numpy, reads what is asked, and fails with a BankError."""

    def __init__(self, store: ts.TensorStore, name: str):
        self._store, self._name = store, name
        self.shape, self.dtype, self.ndim = tuple(store.shape), store.dtype.numpy_dtype, store.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        with storage_errors(self._name):
            return self._store[index].read().result()

    def __repr__(self) -> str:
        return f"DiskArray({self._name}, {self.dtype}{list(self.shape)})"


# ---------------------------------------------------------------------------------------------- writing


class BankWriter:
    """Writes a bank beside its target and renames it when it is whole.

        with BankWriter("corpus.bank", layers=2, kv_heads=4, head_dim=24, vocab=8192,
                        model_hash=h, model_config=config, tokenizer_hash=t) as writer:
            for block in blocks:
                writer.append(block)

    Leaving the block finishes the bank; leaving it by an exception, or by an interrupt, removes what was written. A
    killed process leaves `<name>.partial-<random>`, which nobody reads. Memory: 16384 chunks and a block.

    Args:
      path: a directory that does not exist; with overwrite=True it may be another bank, which is replaced at the end.
      vocab: token ids are below it, and stored as uint16 up to 65536.
      model_hash, tokenizer_hash: whatever the caller compares when it opens the bank. model_config: any JSON.

    Raises:
      BankError: the target exists, a block does not fit the bank or itself, no document was written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
        model_hash: str,
        model_config: Any,
        tokenizer_hash: str,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        overwrite: bool = False,
    ):
        self.path, self.overwrite = Path(path), overwrite
        self._partial = self.path.with_name(f"{self.path.name}.partial-{secrets.token_hex(8)}")
        self._check_target()
        self._manifest = {
            "format": FORMAT,
            "version": VERSION,
            "id": uuid.uuid4().hex,
            "model": {"hash": model_hash, "config": plain_json(model_config)},
            "tokenizer": {"hash": tokenizer_hash},
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": dtype,
            "vocab": vocab,
            "segments": [],
            "deleted": [],
        }
        check_manifest(str(self.path), seal(self._manifest))
        self._partial.mkdir(parents=True)
        self._segment = _Segment(self._partial, self._manifest)

    def append(self, block: Block) -> None:
        """The next documents, numbered after the last."""
        self._segment.append(block)

    def finish(self) -> None:
        """Everything to disk, the manifest last, then the name. Nothing may be appended afterwards."""
        self._manifest["segments"].append(self._segment.finish())
        write_manifest(self._partial, self._manifest)
        self._check_target()
        old = self.path.with_name(f"{self.path.name}.old-{secrets.token_hex(8)}")
        if replaces := self.path.exists():
            self.path.rename(old)
        try:
            self._partial.rename(self.path)
        except BaseException:
            if replaces:
                old.rename(self.path)
            raise
        sync_directory(self.path.parent)
        if replaces:
            shutil.rmtree(old)

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and self._partial.exists():
                self.finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _check_target(self) -> None:
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.overwrite:
            raise BankError(f"{self.path}: exists; overwrite=True replaces a bank")
        try:
            found = json.loads((self.path / "manifest.json").read_bytes()).get("format")
        except (OSError, ValueError, AttributeError, RecursionError):
            found = None
        if found != FORMAT:
            raise BankError(f"{self.path}: exists and is no bank; it is not overwritten")


class _Segment:
    """One segment in the making: arrays in a stream, the table at the end."""

    def __init__(self, bank: Path, manifest: dict):
        self.name = f"segment-{secrets.token_hex(8)}"
        self.path, self._manifest = bank / self.name, manifest
        self.path.mkdir()
        self._streams = {name: _Stream(self.path / name, name, manifest) for name in SHARD}
        self._files: dict[str, int] = {}
        self._table: dict[str, list] = {
            c: [] for c in ("file", "first_line", "last_line", "tokens", "chunks", "sha256")
        }

    def append(self, block: Block) -> None:
        p, m = len(block.doc_len), sum(map(int, block.doc_len))
        want = (self._manifest["layers"], m, self._manifest["kv_heads"], self._manifest["head_dim"])
        for name in ("rk", "k", "v"):
            if getattr(block, name).shape != want:
                raise BankError(f"block: {name} is {list(getattr(block, name).shape)}, needs {list(want)}")
        for name in ("ids", "path", "first_line", "last_line"):
            if len(getattr(block, name)) != p:
                raise BankError(
                    f"block: {name} has {len(getattr(block, name))} entries, needs one for each of {p} documents"
                )
        ids = [np.asarray(a) for a in block.ids]
        for i, (a, chunks, path) in enumerate(zip(ids, block.doc_len, block.path, strict=True)):
            if a.ndim != 1 or not np.issubdtype(a.dtype, np.integer) or len(a) < chunks or chunks < 1:
                raise BankError(
                    f"block: document {i} has {chunks} chunks, ids {a.dtype}{list(a.shape)}, needs 1 <= chunks <= ids"
                )
            if a.min() < 0 or a.max() >= self._manifest["vocab"]:
                raise BankError(
                    f"block: document {i} has ids {a.min()}..{a.max()}, needs 0..{self._manifest['vocab'] - 1}"
                )
            if not is_inside(path):
                raise BankError(f"block: path of document {i} is {path!r}, needs a path below the corpus")
        rows = {name: np.asarray(getattr(block, name)) for name in ("rk", "k", "v")}
        for name, a in rows.items():
            if not np.isfinite(a.astype(np.float32)).all():
                raise BankError(
                    f"block: {name} holds NaN or infinity, which would win every search or spoil what is read"
                )
        for name, a in rows.items():
            self._streams[name].append(a)
        if p:
            self._streams["ids"].append(np.concatenate(ids))
        columns = {
            "file": [self._files.setdefault(path, len(self._files)) for path in block.path],
            "first_line": [int(n) for n in block.first_line],
            "last_line": [int(n) for n in block.last_line],
            "tokens": [len(a) for a in ids],
            "chunks": [int(n) for n in block.doc_len],
            "sha256": [_sha256_of_ids(a) for a in ids],
        }
        for name, column in columns.items():
            self._table[name] += column

    def finish(self) -> dict:
        """The entry of the manifest."""
        if not self._table["file"]:
            raise BankError(f"{self.path.parent}: no document was written")
        for stream in self._streams.values():
            stream.finish()
        sizes = {
            p.relative_to(self.path).as_posix(): p.stat().st_size for p in sorted(self.path.rglob("*")) if p.is_file()
        }
        table = json.dumps({"files": list(self._files), **self._table, "sizes": sizes}, separators=(",", ":")).encode()
        write_file(self.path / "table.json", table)
        for directory in (self.path, *(p for p in self.path.rglob("*") if p.is_dir())):
            sync_directory(directory)
        return {
            "name": self.name,
            "documents": len(self._table["file"]),
            "chunks": sum(self._table["chunks"]),
            "tokens": sum(self._table["tokens"]),
            "table_sha256": hashlib.sha256(table).hexdigest(),
        }


class _Stream:
    """One array that grows along its chunks (ids: tokens), written in whole shards."""

    def __init__(self, path: Path, name: str, manifest: dict):
        self._spec, self._axis, self._shard = _spec(path, name, manifest, 0), 0 if name == "ids" else 1, SHARD[name]
        self._store = ts.open(self._spec, create=True, open=True).result()
        self._waiting: list[np.ndarray] = []
        self._size = 0

    def append(self, rows: np.ndarray) -> None:
        self._waiting.append(rows.astype(self._store.dtype.numpy_dtype))
        if sum(a.shape[self._axis] for a in self._waiting) >= self._shard:
            self._write(whole=True)

    def finish(self) -> None:
        self._write(whole=False)

    def _write(self, whole: bool) -> None:
        rows = np.concatenate(self._waiting, self._axis)
        n = rows.shape[self._axis] // self._shard * self._shard if whole else rows.shape[self._axis]
        now, later = np.split(rows, [n], self._axis)
        self._waiting = [later]
        if n:
            shape = list(self._store.shape)
            shape[self._axis] = self._size + n
            self._store = self._store.resize(exclusive_max=shape, expand_only=True).result()
            self._store[(slice(None),) * self._axis + (slice(self._size, self._size + n),)].write(now).result()
            self._size += n


# ---------------------------------------------------------------------------------------------- opening


def open_bank(
    path: str | Path,
    *,
    location: Literal["disk", "host", "device"] = "disk",
    model_hash: str | None = None,
    tokenizer_hash: str | None = None,
) -> OpenBank:
    """Open a bank; the manifest, the table and the sizes of all files are checked, and with a hash, whose bank it is.

    Args:
      location: "disk" reads what is asked for, when it is asked for; "host" reads all into memory as numpy (a copy, not
        a map of the files: checksums are tested on the way); "device" puts all onto the default device. Mixtures are
        a `_replace`: `bank._replace(rk=jnp.asarray(bank.rk[:]))` keeps routing keys on the device, k and v on disk.

    Raises:
      BankError: another model, tokenizer or version; a file missing, truncated or damaged; counts that disagree.
    """
    if location not in ("disk", "host", "device"):
        raise ValueError(f"open_bank: location is {location!r}, needs 'disk', 'host' or 'device'")
    path = Path(path)
    manifest = read_manifest(path)
    check_owner(path, manifest, model_hash, tokenizer_hash)
    documents = _read_tables(path, manifest)
    start = np.cumsum(documents.chunks) - documents.chunks
    chunk_doc = np.repeat(np.arange(len(start), dtype=np.int32), documents.chunks)
    doc_len = documents.chunks.astype(np.int32)
    doc_len[manifest["deleted"]] = 0
    gone = doc_len[chunk_doc] == 0
    chunk_doc[gone] = -1
    arrays = _open_arrays(path, manifest, CACHE_BYTES if location == "disk" else 0)
    ids = arrays.pop("ids")
    if location != "disk":
        arrays = {name: a[:] for name, a in arrays.items()}
        arrays["rk"][:, gone] = 0
    bank = Bank(**arrays, chunk_doc=chunk_doc, doc_start=start.astype(np.int32), doc_len=doc_len)
    return OpenBank(jax.device_put(bank) if location == "device" else bank, manifest, documents, path, ids)


def _read_tables(path: Path, manifest: dict) -> Documents:
    parts = [read_table(path / s["name"], manifest, s) for s in manifest["segments"]]
    column = {c: np.concatenate([t[c] for t in parts]) for c in ("first_line", "last_line", "tokens", "chunks")}
    return Documents(
        path=[p for t in parts for p in t["path"]], sha256=[s for t in parts for s in t["sha256"]], **column
    )


def _open_arrays(path: Path, manifest: dict, cache_bytes: int) -> dict[str, DiskArray]:
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    arrays = {}
    for name in SHARD:
        size, axis = ("tokens", 0) if name == "ids" else ("chunks", 1)
        specs = [_spec(path / s["name"] / name, name, manifest, s[size]) for s in manifest["segments"]]
        with storage_errors(str(path)):
            stores = [ts.open(s, read=True, open=True, assume_metadata=True, context=context).result() for s in specs]
            store = stores[0] if len(stores) == 1 else ts.concat(stores, axis=axis)
        arrays[name] = DiskArray(store, str(path))
    return arrays


def _spec(path: Path, name: str, manifest: dict, size: int) -> dict:
    """The whole zarr3 metadata of one array of a segment; files written with it are read with it."""
    row = (manifest["kv_heads"], manifest["head_dim"])
    around = (lambda n, first: [n]) if name == "ids" else (lambda n, first: [first, n, *row])
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    dtype = manifest["dtype"] if name != "ids" else "uint16" if manifest["vocab"] <= 1 << 16 else "uint32"
    sharding = {"chunk_shape": around(INNER[name], 1), "codecs": plain, "index_codecs": plain}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": around(size, manifest["layers"]),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": around(SHARD[name], 1)}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0,
        },
        # Zeros are data, and what is missing is an error: both are otherwise, by default.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",  # segments never change
    }


# ---------------------------------------------------------------------------------------------- changing


def delete_document(path: str | Path, document: int) -> None:
    """Hide one document from now on: never routed to, never shown. Its files stay until the bank is written anew."""
    path = Path(path)
    with _changing(path) as manifest:
        count = sum(s["documents"] for s in manifest["segments"])
        if not 0 <= document < count or document in manifest["deleted"]:
            raise BankError(
                f"{path}: no document {document}; the bank has {count - len(manifest['deleted'])} documents"
            )
        manifest["deleted"] = sorted([*manifest["deleted"], int(document)])


def append_documents(
    path: str | Path, blocks: Iterable[Block], *, model_hash: str | None = None, tokenizer_hash: str | None = None
) -> None:
    """More documents, numbered after the last, as one new segment. An exception leaves the bank as it was."""
    path = Path(path)
    with _changing(path) as manifest:
        check_owner(path, manifest, model_hash, tokenizer_hash)
        segment = _Segment(path, manifest)
        try:
            for block in blocks:
                segment.append(block)
            manifest["segments"].append(segment.finish())
            check_manifest(str(path), seal(manifest))
        except BaseException:
            shutil.rmtree(segment.path, ignore_errors=True)
            raise


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict]:
    """The manifest to change, written back at the end; one process at a time."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BankError(f"{path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError:
            raise BankError(f"{path}: another process is changing this bank") from None
        manifest = read_manifest(path)
        yield manifest
        write_manifest(path, manifest)
    finally:
        os.close(handle)


def _sha256_of_ids(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
