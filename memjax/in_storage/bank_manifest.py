"""What a bank on disk says of itself: the manifest, the note of an unfinished change, and the checks of both.

Whatever is wrong with a file is a BankError of one line that names file and field.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast

from memjax.errors import BankError, shorten
from memjax.in_storage import bank_disk as disk
from memjax.in_storage.bank_disk import storage_errors

FORMAT, VERSION = "memjax-bank", 2
NAME, UNFINISHED = "manifest.json", "unfinished.json"
MODEL_COPIES = ("model", "model.new")  # folders beside them, see memjax.lm.bank_model
LARGEST = 2**31 - 1  # chunks and documents are int32 in a Bank
SHA256 = re.compile("[0-9a-f]{64}")
SEGMENT = {
    "name": re.compile("segment-[0-9]{8}"),
    "documents": range(1, LARGEST),
    "chunks": range(LARGEST),
    "tokens": range(1 << 62),
    "table_sha256": SHA256,
}
MANIFEST = {
    "format": {FORMAT},
    "version": range(VERSION, VERSION + 1),
    "model": {"hash": str, "config": object},
    "tokenizer": {"hash": str},
    "document_tokens": range(LARGEST),  # texts were cut into documents of at most so many; 0: not said
    "layers": range(1, 1 << 16),
    "kv_heads": range(1, 1 << 16),
    "head_dim": range(1, 1 << 16),
    "dtype": {"bfloat16", "float32"},
    "vocab": range(1, LARGEST),
    "segments": [SEGMENT],
    "deleted": [range(LARGEST)],
    "checksum": str,
}
# What a change has done so far: `segments` are whole, `base` is the manifest it goes on from, `plan` what it is to do.
NOTE = {
    "format": {f"{FORMAT}-unfinished"},
    "version": range(VERSION, VERSION + 1),
    "base": str,
    "plan": str,
    "first": range(10**8),  # number of its first segment
    "segments": [SEGMENT],
    "checksum": str,
}


# ---------------------------------------------------------------------------------------------- the manifest


def read_manifest(path: Path) -> dict:
    """The manifest of the bank at `path`, checked, with at least one segment that holds chunks."""
    file = path / NAME
    if not file.exists() and is_bank(path):
        raise BankError(f"{path}: unfinished; the command that began it (memjax bank build) goes on if it is run again")
    manifest = _read(file)
    check_manifest(str(file), manifest)
    if not any(s["chunks"] for s in manifest["segments"]):
        raise BankError(f"{file}: field 'segments' is empty, needs at least one with chunks")
    return manifest


def write_manifest(bank: Path, manifest: dict) -> None:
    """Seal, check and write it, in one step for whoever reads the bank meanwhile."""
    sealed = seal(manifest)
    check_manifest(str(bank), sealed)
    disk.replace_file(bank / NAME, json.dumps(sealed, indent=1).encode())


def is_bank(path: Path) -> bool:
    """Whether a directory says that it is a bank of any version, or one that was begun."""
    for name, format_ in ((NAME, FORMAT), (UNFINISHED, f"{FORMAT}-unfinished")):
        try:
            if json.loads((path / name).read_bytes()).get("format") == format_:
                return True
        except (OSError, ValueError, AttributeError, RecursionError):
            pass
    return False


def base_of(manifest: dict | None) -> str:
    """What tells whether the segments of a bank are still those that a change began with."""
    return _checksum([] if manifest is None else [[s["name"], s["table_sha256"]] for s in manifest["segments"]])


def read_note(path: Path, base: str) -> dict | None:
    """The note of an unfinished change of this base; None if there is none, or none of use."""
    try:
        note = _read(path / UNFINISHED)
        _check_sealed(str(path / UNFINISHED), note, NOTE)
    except BankError:
        return None
    return note if note["base"] == base else None


def write_note(path: Path, base: str, plan: str, first: int, segments: list[dict]) -> None:
    """Say how far a change has come."""
    about = {"format": f"{FORMAT}-unfinished", "version": VERSION, "base": base, "plan": plan, "first": first}
    disk.replace_file(path / UNFINISHED, json.dumps(seal({**about, "segments": segments}), indent=1).encode())


def _read(file: Path) -> Any:
    with storage_errors(str(file)):
        data = file.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file}: not JSON: {shorten(error)}") from None


def plain_json(config: Any) -> Any:
    """The JSON value that a configuration is read back as (tuples as lists, keys as strings)."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"model_config: needs plain JSON: {shorten(error)}") from None


def seal(manifest: dict) -> dict:
    """The manifest with its checksum: sha256 of the rest as canonical JSON."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    return {**rest, "checksum": _checksum(rest)}


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_manifest(file: str, manifest: Any) -> None:
    """Version first, since another version has other fields; then the checksum; then every field."""
    _check_sealed(file, manifest, MANIFEST)
    names = [s["name"] for s in manifest["segments"]]
    totals = {field: sum(s[field] for s in manifest["segments"]) for field in ("documents", "chunks")}
    for field, total in totals.items():
        _check_field(file, f"segments.{field}", total, range(LARGEST))
    for i, document in enumerate(manifest["deleted"]):
        _check_field(file, f"deleted[{i}]", document, range(totals["documents"]))
    for field, values in (("segments", names), ("deleted", manifest["deleted"])):
        if len(set(values)) < len(values):
            raise BankError(f"{file}: field {field!r} names something twice")


def _check_sealed(file: str, found: Any, need: dict) -> None:
    if not isinstance(found, dict):
        raise BankError(f"{file}: not a manifest, needs a JSON object")
    (format_,) = need["format"]
    for field, value in (("format", format_), ("version", VERSION)):
        if found.get(field) != value or isinstance(found[field], bool):
            raise BankError(f"{file}: field {field!r} is {shorten(repr(found.get(field)))}, needs {value!r}")
    try:
        sealed = seal(found)["checksum"]
    except RecursionError as error:
        raise BankError(f"{file}: not a manifest: {shorten(error)}") from None
    if sealed != found.get("checksum"):
        raise BankError(f"{file}: field 'checksum' does not fit the other fields; the file was changed or damaged")
    _check_field(file, "", found, need)


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
            raise BankError(f"{path / NAME}: field '{field}.hash' is {manifest[field]['hash']!r}, needs {hash_!r}")
