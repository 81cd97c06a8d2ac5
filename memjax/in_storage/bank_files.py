"""A bank on disk: written in a stream, opened lazily, appended to and deleted from without a moment of a broken bank.

    bank/manifest.json                  what the bank is: model, tokenizer, counts, deleted documents, checksums
    bank/segment-<random>/table.json    documents in columns, and the size of every file of the segment
    bank/segment-<random>/{rk,k,v,ids}  zarr3 arrays, sharded, every inner chunk with a crc32c

A segment is written once and never changed; `append_documents` adds one. Only the manifest says which segments count,
and it is replaced last and atomically: an interruption leaves the old bank or the new one. Arrays are opened with the
metadata the manifest implies, never the file's own, and missing chunks are errors: by default zarr3 reads a flipped bit
as a number and a lost file as zeros. The checksums find damage; they are no signature against an author of forgeries.

Token ids are kept beside the vectors, so that the text of a document can be shown without its source file. Whatever is
wrong with the files is a BankError of one line that names file and field.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped

from memjax.errors import BankError
from memjax.in_storage.bank import TILE, Bank

FORMAT, VERSION = "memjax-bank", 1
# Chunks per file (a tile of routing) and per checksummed inner chunk: routing reads whole tiles, reading a few chunks.
SHARD = {"rk": TILE, "k": TILE, "v": TILE, "ids": 1 << 20}
INNER = {"rk": 1024, "k": 32, "v": 32, "ids": 4096}
CACHE_BYTES = 64 << 20  # of shard indexes and inner chunks, over all arrays of a bank
LARGEST = 2**31 - 1  # chunks and documents are int32 in a Bank
MANIFEST = {
    "format": {FORMAT},
    "version": range(VERSION, VERSION + 1),
    "id": str,
    "model": {"hash": str, "config": object},
    "tokenizer": {"hash": str},
    "layers": range(1, 1 << 16),
    "kv_heads": range(1, 1 << 16),
    "head_dim": range(1, 1 << 16),
    "dtype": {"bfloat16", "float32"},
    "vocab": range(1, LARGEST),
    "segments": [
        {
            "name": re.compile("segment-[0-9a-f]{16}"),
            "documents": range(1, LARGEST),
            "chunks": range(1, LARGEST),
            "tokens": range(1, 1 << 62),
            "table_sha256": re.compile("[0-9a-f]{64}"),
        }
    ],
    "deleted": [range(LARGEST)],
    "checksum": str,
}


class Block(NamedTuple):
    """Some documents with their chunks: what a model makes of one batch of texts."""

    rk: Shaped[Any, "n m h d"]  # routing keys, keys and values, in document order
    k: Shaped[Any, "n m h d"]
    v: Shaped[Any, "n m h d"]
    doc_len: Sequence[int]  # [p], chunks of each document, at least one
    ids: Sequence[Int[Any, " t"]]  # p arrays, the token ids of each document
    path: Sequence[str]  # p source files, relative to the corpus
    first_line: Sequence[int]  # [p], counted from 1
    last_line: Sequence[int]


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
        with _one_line(self._name):
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
            "model": {"hash": model_hash, "config": _plain(model_config)},
            "tokenizer": {"hash": tokenizer_hash},
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": dtype,
            "vocab": vocab,
            "segments": [],
            "deleted": [],
        }
        _check_manifest(str(self.path), _sealed(self._manifest))
        self._partial.mkdir(parents=True)
        self._segment = _Segment(self._partial, self._manifest)

    def append(self, block: Block) -> None:
        """The next documents, numbered after the last."""
        self._segment.append(block)

    def finish(self) -> None:
        """Everything to disk, the manifest last, then the name. Nothing may be appended afterwards."""
        self._manifest["segments"].append(self._segment.finish())
        _write_manifest(self._partial, self._manifest)
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
        _sync_directory(self.path.parent)
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
            if not _inside(path):
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
        _write(self.path / "table.json", table)
        for directory in (self.path, *(p for p in self.path.rglob("*") if p.is_dir())):
            _sync_directory(directory)
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
    manifest = _read_manifest(path)
    _check_owner(path, manifest, model_hash, tokenizer_hash)
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


def _check_owner(path: Path, manifest: dict, model_hash: str | None, tokenizer_hash: str | None) -> None:
    for field, hash_ in (("model", model_hash), ("tokenizer", tokenizer_hash)):
        if hash_ is not None and manifest[field]["hash"] != hash_:
            raise BankError(
                f"{path / 'manifest.json'}: field '{field}.hash' is {manifest[field]['hash']!r}, needs {hash_!r}"
            )


def _read_tables(path: Path, manifest: dict) -> Documents:
    parts = [_read_table(path / s["name"], manifest, s) for s in manifest["segments"]]
    column = {c: np.concatenate([t[c] for t in parts]) for c in ("first_line", "last_line", "tokens", "chunks")}
    return Documents(
        path=[p for t in parts for p in t["path"]], sha256=[s for t in parts for s in t["sha256"]], **column
    )


def _read_table(segment: Path, manifest: dict, entry: dict) -> dict:
    """One table, its columns as arrays, after the checks: checksum, types, counts, and the sizes of the files."""
    file = segment / "table.json"
    with _one_line(str(file)):
        data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["table_sha256"]:
        raise BankError(f"{file}: its checksum is not 'table_sha256' of the manifest")
    try:
        table = json.loads(data)
        columns = {
            c: table[c] for c in ("files", "file", "first_line", "last_line", "tokens", "chunks", "sha256", "sizes")
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{file}: not a table of documents: {_short(error)}") from None
    n = entry["documents"]
    for name in ("file", "first_line", "last_line", "tokens", "chunks"):
        try:
            column = np.array(columns[name])
        except (ValueError, OverflowError):
            column = np.empty(())
        if column.shape != (n,) or column.dtype != np.int64 or column.min() < 0:
            raise BankError(f"{file}: field {name!r} needs {n} counts")
        columns[name] = column
    for name in ("tokens", "chunks"):
        if sum(columns[name].tolist()) != entry[name] or columns[name].min() < 1:
            raise BankError(f"{file}: field {name!r} does not sum to {entry[name]}")
    files, sha256, sizes = (columns[c] for c in ("files", "sha256", "sizes"))
    if not (isinstance(files, list) and all(map(_inside, files)) and columns["file"].max() < len(files)):
        raise BankError(f"{file}: field 'files' needs a path below the corpus for every number in 'file'")
    if not (isinstance(sha256, list) and len(sha256) == n and all(isinstance(s, str) for s in sha256)):
        raise BankError(f"{file}: field 'sha256' needs {n} strings")
    shards = _shards(manifest, entry)
    total = sum(math.prod(grid) + 1 for grid in shards.values())
    if not (isinstance(sizes, dict) and len(sizes) == total):
        raise BankError(f"{file}: field 'sizes' needs the {total} files of {n} documents")
    names = [f"{name}/zarr.json" for name in shards]
    names += ["/".join([name, "c", *map(str, at)]) for name, grid in shards.items() for at in np.ndindex(*grid)]
    for name in names:
        if (size := sizes.get(name)) is None:
            raise BankError(f"{file}: field 'sizes' has no {name!r}")
        try:
            found = os.stat(segment / name).st_size
        except (OSError, ValueError):
            raise BankError(f"{segment / name}: missing") from None
        if found != size:
            raise BankError(f"{segment / name}: {found} bytes, needs {size}")
    return {**columns, "path": [files[i] for i in columns["file"]]}


def _shards(manifest: dict, entry: dict) -> dict[str, tuple[int, ...]]:
    """How many files each array of a segment has, along each of its axes."""
    per_row = (manifest["layers"], -(-entry["chunks"] // TILE), 1, 1)
    return {name: (-(-entry["tokens"] // SHARD["ids"]),) if name == "ids" else per_row for name in SHARD}


def _open_arrays(path: Path, manifest: dict, cache_bytes: int) -> dict[str, DiskArray]:
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    arrays = {}
    for name in SHARD:
        size, axis = ("tokens", 0) if name == "ids" else ("chunks", 1)
        specs = [_spec(path / s["name"] / name, name, manifest, s[size]) for s in manifest["segments"]]
        with _one_line(str(path)):
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
        _check_owner(path, manifest, model_hash, tokenizer_hash)
        segment = _Segment(path, manifest)
        try:
            for block in blocks:
                segment.append(block)
            manifest["segments"].append(segment.finish())
            _check_manifest(str(path), _sealed(manifest))
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
        manifest = _read_manifest(path)
        yield manifest
        _write_manifest(path, manifest)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------- the manifest


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    with _one_line(str(file)):
        data = file.read_bytes()
    try:
        manifest = json.loads(data)
        _check_manifest(str(file), manifest)
    except BankError:
        raise
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file}: not JSON: {_short(error)}") from None
    if not manifest["segments"]:
        raise BankError(f"{file}: field 'segments' is empty, needs at least one")
    return manifest


def _write_manifest(bank: Path, manifest: dict) -> None:
    new = bank / f"manifest.json.partial-{secrets.token_hex(8)}"
    sealed = _sealed(manifest)
    _check_manifest(str(bank), sealed)
    try:
        _write(new, json.dumps(sealed, indent=1).encode())
        os.replace(new, bank / "manifest.json")
    finally:
        new.unlink(missing_ok=True)
    _sync_directory(bank)


def _plain(config: Any) -> Any:
    """The JSON value that a configuration is read back as (tuples as lists, keys as strings)."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"model_config: needs plain JSON: {_short(error)}") from None


def _sealed(manifest: dict) -> dict:
    """The manifest with its checksum: sha256 of the rest as canonical JSON."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def _check_manifest(file: str, manifest: Any) -> None:
    """Version first, since another version has other fields; then the checksum; then every field."""
    if not isinstance(manifest, dict):
        raise BankError(f"{file}: not a manifest, needs a JSON object")
    for field, need in (("format", FORMAT), ("version", VERSION)):
        if manifest.get(field) != need or isinstance(manifest[field], bool):
            raise BankError(f"{file}: field {field!r} is {_short(repr(manifest.get(field)))}, needs {need!r}")
    if _sealed(manifest)["checksum"] != manifest.get("checksum"):
        raise BankError(f"{file}: field 'checksum' does not fit the other fields; the file was changed or damaged")
    _check_field(file, "", manifest, MANIFEST)
    names = [s["name"] for s in manifest["segments"]]
    totals = {field: sum(s[field] for s in manifest["segments"]) for field in ("documents", "chunks")}
    for field, total in totals.items():
        _check_field(file, f"segments.{field}", total, range(LARGEST))
    for i, document in enumerate(manifest["deleted"]):
        _check_field(file, f"deleted[{i}]", document, range(totals["documents"]))
    for field, values in (("segments", names), ("deleted", manifest["deleted"])):
        if len(set(values)) < len(values):
            raise BankError(f"{file}: field {field!r} names something twice")


def _check_field(file: str, field: str, found: Any, need: Any) -> None:
    """need: a dict of fields, [need] for a list, a range of integers, a set of values, a pattern, or a type."""
    shown = found
    if isinstance(need, dict):
        fits, words = isinstance(found, dict) and set(found) == set(need), f"the fields {sorted(need)}"
        shown = sorted(found) if isinstance(found, dict) else found
    elif isinstance(need, list):
        fits, words = isinstance(found, list), "a list"
    elif isinstance(need, range):
        fits = isinstance(found, int) and not isinstance(found, bool) and found in need
        words = f"a whole number from {need.start} to {need.stop - 1}"
    elif isinstance(need, set):
        fits, words = isinstance(found, str) and found in need, f"one of {sorted(need)}"
    elif isinstance(need, re.Pattern):
        fits, words = isinstance(found, str) and bool(need.fullmatch(found)), f"the form {need.pattern}"
    else:
        fits, words = isinstance(found, need), f"a {need.__name__}"
    if not fits:
        raise BankError(f"{file}: field {field!r} is {_short(repr(shown))}, needs {words}")
    parts = {}
    if isinstance(need, dict):
        parts = {f"{field}.{name}".lstrip("."): (name, part) for name, part in need.items()}
    elif isinstance(need, list):
        parts = {f"{field}[{i}]": (i, need[0]) for i in range(len(shown))}
    for name, (key, part) in parts.items():
        _check_field(file, name, cast(Any, found)[key], part)


# ---------------------------------------------------------------------------------------------- small parts


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """The storage's errors as a BankError that names the file; TensorStore's own end in a page of specification."""
    try:
        yield
    except OSError as error:
        raise BankError(f"{name}: {error.strerror or _short(error)}") from None
    except ValueError as error:
        text = str(error)
        file = re.search(r'local file "([^"]*)"', text)
        for sign, meaning in (
            ("Digest mismatch", "checksum mismatch"),
            ("is missing", "missing"),
            ("NOT_FOUND", "missing"),
        ):
            if sign in text:
                raise BankError(f"{file[1] if file else name}: {meaning}, the file is damaged") from None
        raise BankError(f"{file[1] if file else name}: {_short(text.split(' [')[0])}") from None


def _short(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _inside(path: Any) -> bool:
    """A relative path that stays below where it begins, on any system."""
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    return all(not p.anchor and ".." not in p.parts for p in (PurePosixPath(path), PureWindowsPath(path)))


def _sha256_of_ids(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()


def _write(file: Path, data: bytes) -> None:
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
