"""The arrays of a bank on disk: zarr3, sharded, every inner chunk with a crc32c, written in a stream, read lazily.

Arrays are opened with the metadata that the manifest implies, never the file's own, and missing chunks are errors: by
default zarr3 reads a flipped bit as a number and a lost file as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from memjax.in_storage.bank import TILE
from memjax.in_storage.bank_disk import make_directory, storage_errors

# Chunks (of ids: tokens) per file: routing reads whole tiles.
SHARD = {"rk": TILE, "k": TILE, "v": TILE, "ids": 1 << 20}
INNER = {"rk": 1024, "k": 32, "v": 32, "ids": 4096}  # chunks (of ids: tokens) per crc32c: reading takes a few of them


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


def open_arrays(path: Path, manifest: dict, cache_bytes: int) -> dict[str, DiskArray]:
    """rk, k, v [layers, chunks, kv_heads, head_dim] and ids [tokens], over all segments of a bank."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    arrays = {}
    for name in SHARD:
        size, axis = ("tokens", 0) if name == "ids" else ("chunks", 1)
        parts = [s for s in manifest["segments"] if s["chunks"]]  # without chunks there are no files either
        specs = [_spec(path / s["name"] / name, name, manifest, s[size]) for s in parts]
        with storage_errors(str(path)):
            stores = [ts.open(s, read=True, open=True, assume_metadata=True, context=context).result() for s in specs]
            store = stores[0] if len(stores) == 1 else ts.concat(stores, axis=axis)
        arrays[name] = DiskArray(store, str(path))
    return arrays


def metadata_problems(path: Path, manifest: dict, entry: dict) -> Iterator[str]:
    """One line for each zarr.json of a segment that says anything else than the manifest implies.

    Nothing here reads these files, but other readers of zarr3 do.
    """
    for name in SHARD if entry["chunks"] else ():
        size = entry["tokens" if name == "ids" else "chunks"]
        try:
            ts.open(_spec(path / entry["name"] / name, name, manifest, size), read=True, open=True).result()
        except (OSError, ValueError):  # with a page of specification
            yield f"{path / entry['name'] / name / 'zarr.json'}: damaged, does not describe this array"


class Stream:
    """One array that grows along its chunks (ids: tokens), written in whole shards. Memory: a shard and a block."""

    def __init__(self, path: Path, name: str, manifest: dict):
        self._spec, self._axis, self._shard = _spec(path, name, manifest, 0), 0 if name == "ids" else 1, SHARD[name]
        self._name = str(path)
        make_directory(path)
        with storage_errors(self._name):
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
            with storage_errors(self._name):
                self._store = self._store.resize(exclusive_max=shape, expand_only=True).result()
            # File by file: where one fails, no other is under way any more and comes back after it was removed.
            for at in range(0, n, self._shard):
                for layer in np.ndindex(*shape[: self._axis]):
                    part = now[(*layer, slice(at, at + self._shard))]
                    with storage_errors(self._name):
                        write_rows(self._store, (*layer, slice(self._size + at, self._size + at + len(part))), part)
            self._size += n


def file_bytes(name: str, manifest: dict, size: int) -> int:
    """How long a file with so many chunks (ids: tokens) of one layer is: whole inner chunks and their index, nothing
    compressed and nothing left out."""
    ids, inner = name == "ids", INNER[name]
    row = 1 if ids else manifest["kv_heads"] * manifest["head_dim"]
    item = (2 if manifest["vocab"] <= 1 << 16 else 4) if ids else 2 if manifest["dtype"] == "bfloat16" else 4
    return -(-size // inner) * (inner * row * item + 4) + SHARD[name] // inner * 16 + 4


def write_rows(store: ts.TensorStore, place: Any, rows: np.ndarray) -> None:
    """Write one file whole, and wait until it is on disk."""
    store[place].write(rows).result()


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
