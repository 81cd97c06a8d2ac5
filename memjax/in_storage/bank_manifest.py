"""What a bank on disk says of itself: its manifest and the tables of its segments, and the checks of both.

Whatever is wrong with a file is a BankError of one line that names file and field.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import numpy as np

from memjax.errors import BankError
from memjax.in_storage.bank import TILE

FORMAT, VERSION = "memjax-bank", 1
# Chunks (of ids: tokens) per file: routing reads whole tiles.
SHARD = {"rk": TILE, "k": TILE, "v": TILE, "ids": 1 << 20}
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


# ---------------------------------------------------------------------------------------------- the manifest


def read_manifest(path: Path) -> dict:
    """The manifest of the bank at `path`, checked, with at least one segment."""
    file = path / "manifest.json"
    with storage_errors(str(file)):
        data = file.read_bytes()
    try:
        manifest = json.loads(data)
        check_manifest(str(file), manifest)
    except BankError:
        raise
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file}: not JSON: {shorten(error)}") from None
    if not manifest["segments"]:
        raise BankError(f"{file}: field 'segments' is empty, needs at least one")
    return manifest


def write_manifest(bank: Path, manifest: dict) -> None:
    """Seal, check and write it, in one step for whoever reads the bank meanwhile."""
    new = bank / f"manifest.json.partial-{secrets.token_hex(8)}"
    sealed = seal(manifest)
    check_manifest(str(bank), sealed)
    try:
        write_file(new, json.dumps(sealed, indent=1).encode())
        os.replace(new, bank / "manifest.json")
    finally:
        new.unlink(missing_ok=True)
    sync_directory(bank)


def plain_json(config: Any) -> Any:
    """The JSON value that a configuration is read back as (tuples as lists, keys as strings)."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"model_config: needs plain JSON: {shorten(error)}") from None


def seal(manifest: dict) -> dict:
    """The manifest with its checksum: sha256 of the rest as canonical JSON."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def check_manifest(file: str, manifest: Any) -> None:
    """Version first, since another version has other fields; then the checksum; then every field."""
    if not isinstance(manifest, dict):
        raise BankError(f"{file}: not a manifest, needs a JSON object")
    for field, need in (("format", FORMAT), ("version", VERSION)):
        if manifest.get(field) != need or isinstance(manifest[field], bool):
            raise BankError(f"{file}: field {field!r} is {shorten(repr(manifest.get(field)))}, needs {need!r}")
    if seal(manifest)["checksum"] != manifest.get("checksum"):
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
        raise BankError(f"{file}: field {field!r} is {shorten(repr(shown))}, needs {words}")
    parts = {}
    if isinstance(need, dict):
        parts = {f"{field}.{name}".lstrip("."): (name, part) for name, part in need.items()}
    elif isinstance(need, list):
        parts = {f"{field}[{i}]": (i, need[0]) for i in range(len(shown))}
    for name, (key, part) in parts.items():
        _check_field(file, name, cast(Any, found)[key], part)


def check_owner(path: Path, manifest: dict, model_hash: str | None, tokenizer_hash: str | None) -> None:
    """BankError unless the bank was built with this model and this tokenizer, as far as they are given."""
    for field, hash_ in (("model", model_hash), ("tokenizer", tokenizer_hash)):
        if hash_ is not None and manifest[field]["hash"] != hash_:
            raise BankError(
                f"{path / 'manifest.json'}: field '{field}.hash' is {manifest[field]['hash']!r}, needs {hash_!r}"
            )


# ---------------------------------------------------------------------------------------------- tables


def read_table(segment: Path, manifest: dict, entry: dict) -> dict:
    """One table, its columns as arrays, after the checks: checksum, types, counts, and the sizes of the files."""
    file = segment / "table.json"
    with storage_errors(str(file)):
        data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["table_sha256"]:
        raise BankError(f"{file}: its checksum is not 'table_sha256' of the manifest")
    try:
        table = json.loads(data)
        columns = {
            c: table[c] for c in ("files", "file", "first_line", "last_line", "tokens", "chunks", "sha256", "sizes")
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{file}: not a table of documents: {shorten(error)}") from None
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
    if not (isinstance(files, list) and all(map(is_inside, files)) and columns["file"].max() < len(files)):
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
    per_row = (manifest["layers"], -(-entry["chunks"] // SHARD["rk"]), 1, 1)
    return {name: (-(-entry["tokens"] // SHARD["ids"]),) if name == "ids" else per_row for name in SHARD}


# ---------------------------------------------------------------------------------------------- small parts


@contextlib.contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """The storage's errors as a BankError that names the file; TensorStore's own end in a page of specification."""
    try:
        yield
    except OSError as error:
        raise BankError(f"{name}: {error.strerror or shorten(error)}") from None
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
        raise BankError(f"{file[1] if file else name}: {shorten(text.split(' [')[0])}") from None


def shorten(error: Any) -> str:
    """One line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def is_inside(path: Any) -> bool:
    """A relative path that stays below where it begins, on any system."""
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    return all(not p.anchor and ".." not in p.parts for p in (PurePosixPath(path), PureWindowsPath(path)))


def write_file(file: Path, data: bytes) -> None:
    """Write, and wait until it is on disk."""
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
