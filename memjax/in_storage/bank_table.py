"""The tables of a bank on disk: which document came from which file and lines, and the size of every file of a segment.

A table is JSON in columns. `files`, `file_sha256` and `appended` have one entry a source file: its path below the
corpus, the sha256 of its text (UTF-8; "" where nobody said), and 1 where the file was appended, 0 where it is part of
the folder that the bank was built from. The others have one entry a document: `file`, `first_line`, `last_line`,
`tokens`, `chunks`, and `sha256` of the token ids. A document whose text stands in the bank already has 0 tokens and 0
chunks of its own: its sha256 says whose it shares.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from memjax.errors import BankError, shorten
from memjax.in_storage.bank_arrays import SHARD, file_bytes
from memjax.in_storage.bank_disk import is_inside, storage_errors

NUMBERS = ("file", "first_line", "last_line", "tokens", "chunks")


class Source(NamedTuple):
    """A version of a source file."""

    path: str
    sha256: str = ""  # of its text; "": nobody said
    appended: bool = False  # it is no part of the folder that the bank was built from


class Documents(NamedTuple):
    """The table of documents, one entry per document, the deleted ones included."""

    path: list[str]
    source: list[Source]
    first_line: Int[np.ndarray, " N"]
    last_line: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]
    chunks: Int[np.ndarray, " N"]  # of its text, whether the document lives or not; see `Bank.doc_len`
    sha256: list[str]  # of its token ids
    holder: Int[np.ndarray, " N"]  # the document whose chunks and ids are those of this one, mostly itself


@dataclass
class Rows:
    """The documents of one segment in the making."""

    sources: dict[Source, int] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in NUMBERS})
    sha256: list[str] = field(default_factory=list)

    def add(self, source: Source, first_line: int, last_line: int, tokens: int, chunks: int, sha256: str) -> None:
        row = (self.sources.setdefault(source, len(self.sources)), first_line, last_line, tokens, chunks)
        for name, value in zip(NUMBERS, row, strict=True):
            self.numbers[name].append(value)
        self.sha256.append(sha256)

    def encode(self, sizes: dict[str, int]) -> bytes:
        """The bytes of table.json."""
        table = {
            "files": [s.path for s in self.sources],
            "file_sha256": [s.sha256 for s in self.sources],
            "appended": [int(s.appended) for s in self.sources],
            **self.numbers,
            "sha256": self.sha256,
            "sizes": sizes,
        }
        return json.dumps(table, separators=(",", ":")).encode()

    def entry(self, name: str, table: bytes) -> dict:
        """What the manifest says of the segment."""
        return {
            "name": name,
            "documents": len(self.sha256),
            "chunks": sum(self.numbers["chunks"]),
            "tokens": sum(self.numbers["tokens"]),
            "table_sha256": hashlib.sha256(table).hexdigest(),
        }


def read_documents(path: Path, manifest: dict, check_files: bool = True) -> Documents:
    """The documents of all segments, checked; with `check_files` also that every file is there and as long as said."""
    tables = []
    for entry in manifest["segments"]:
        segment = path / entry["name"]
        table = read_table(segment, manifest, entry)
        for problem in file_problems(segment, table["sizes"]) if check_files else ():
            raise BankError(problem)
        tables.append(table)
    column = {name: np.concatenate([t[name] for t in tables]) for name in NUMBERS[1:]}
    source = [t["files"][i] for t in tables for i in t["file"]]
    sha256 = [s for t in tables for s in t["sha256"]]
    holder = np.arange(len(sha256))
    if sharing := np.flatnonzero(column["chunks"] == 0).tolist():
        first: dict[str, int] = {}
        for i in np.flatnonzero(column["chunks"]).tolist():
            first.setdefault(sha256[i], i)
        for i in sharing:
            if sha256[i] not in first:
                raise BankError(f"{path}: field 'sha256' of document {i}, which has no chunks, is that of no other")
            holder[i] = first[sha256[i]]
        for name in ("tokens", "chunks"):
            column[name] = column[name][holder]
    return Documents([s.path for s in source], source, sha256=sha256, holder=holder, **column)


def read_table(segment: Path, manifest: dict, entry: dict) -> dict:
    """One table, its numbers as arrays, its files as `Source`, after the checks: checksum, types, counts."""
    file = segment / "table.json"
    with storage_errors(str(file)):
        data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["table_sha256"]:
        raise BankError(f"{file}: its checksum is not 'table_sha256' of the manifest")
    try:
        table = json.loads(data)
        columns = {c: table[c] for c in ("files", "file_sha256", "appended", *NUMBERS, "sha256", "sizes")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{file}: not a table of documents: {shorten(error)}") from None
    n = entry["documents"]
    for name in NUMBERS:
        column = columns[name]
        # Looked at before numpy does: one long text among the numbers would make it an array of texts as long.
        if not (isinstance(column, list) and len(column) == n and set(map(type, column)) == {int}):
            raise BankError(f"{file}: field {name!r} needs {n} counts")
        if min(column) < 0 or max(column) >= 1 << 62:
            raise BankError(f"{file}: field {name!r} needs counts from 0 to {(1 << 62) - 1}")
        columns[name] = np.array(column, np.int64)
    for name in ("tokens", "chunks"):
        if sum(columns[name].tolist()) != entry[name]:
            raise BankError(f"{file}: field {name!r} does not sum to {entry[name]}")
    if ((columns["chunks"] == 0) != (columns["tokens"] == 0)).any() or (columns["chunks"] > columns["tokens"]).any():
        raise BankError(f"{file}: field 'chunks' needs at least one and at most 'tokens', or both 0")
    files, sha256 = columns["files"], columns["sha256"]
    if not (isinstance(files, list) and all(map(is_inside, files)) and columns["file"].max() < len(files)):
        raise BankError(f"{file}: field 'files' needs a path below the corpus for every number in 'file'")
    for name, fits in (("file_sha256", lambda f: isinstance(f, str)), ("appended", lambda f: f in (0, 1))):
        found = columns[name]
        if not (isinstance(found, list) and len(found) == len(files) and all(map(fits, found))):
            raise BankError(f"{file}: field {name!r} needs {len(files)} entries, one for each of 'files'")
    if not (isinstance(sha256, list) and len(sha256) == n and all(isinstance(s, str) for s in sha256)):
        raise BankError(f"{file}: field 'sha256' needs {n} strings")
    _check_names(file, columns["sizes"], manifest, entry)
    sources = zip(files, columns["file_sha256"], map(bool, columns["appended"]), strict=True)
    return {**columns, "files": [Source(*s) for s in sources]}


def file_problems(segment: Path, sizes: dict[str, int]) -> Iterator[str]:
    """One line for each file of a segment that is missing or of another size."""
    for name, size in sizes.items():
        try:
            found = os.stat(segment / name).st_size
        except (OSError, ValueError):
            yield f"{segment / name}: missing"
        else:
            if found != size:
                yield f"{segment / name}: {found} bytes, needs {shorten(size)}"


def _check_names(file: Path, sizes: object, manifest: dict, entry: dict) -> None:
    """The files of a segment, and how long they are, follow from its counts; no other is ever opened."""
    shards = {}
    if entry["chunks"]:
        per_row = (manifest["layers"], -(-entry["chunks"] // SHARD["rk"]), 1, 1)
        shards = {n: (-(-entry["tokens"] // SHARD["ids"]),) if n == "ids" else per_row for n in SHARD}
    total = sum(math.prod(grid) + 1 for grid in shards.values())
    if not (isinstance(sizes, dict) and len(sizes) == total):
        raise BankError(f"{file}: field 'sizes' needs the {total} files of {entry['documents']} documents")
    for name, grid in shards.items():
        needs: dict[str, int | None] = {f"{name}/zarr.json": None}  # of any length: nothing is read from it
        for at in np.ndindex(*grid):
            here = at[0] if name == "ids" else at[1]
            left = entry["tokens" if name == "ids" else "chunks"] - here * SHARD[name]
            needs["/".join([name, "c", *map(str, at)])] = file_bytes(name, manifest, min(left, SHARD[name]))
        for path, length in needs.items():
            if path not in sizes:
                raise BankError(f"{file}: field 'sizes' has no {path!r}")
            if length not in (None, sizes[path]):
                raise BankError(f"{file}: field 'sizes' has {shorten(sizes[path])} for {path!r}, needs {length}")
