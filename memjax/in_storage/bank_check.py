"""Reading a whole bank on disk to find whatever is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memjax.errors import BankError
from memjax.in_storage import bank_disk as disk
from memjax.in_storage.bank_arrays import SHARD, metadata_problems, open_arrays
from memjax.in_storage.bank_disk import sha256_of_ids
from memjax.in_storage.bank_manifest import UNFINISHED, base_of, read_manifest, read_note
from memjax.in_storage.bank_table import file_problems, read_documents, read_table


class Verified(NamedTuple):
    """What `verify` found. problems: one line each, with the file; none: the bank is whole."""

    problems: list[str]
    leftovers: list[str]  # of interrupted changes; no harm, the next change goes on with them or removes them
    documents: int  # the deleted ones included
    bytes: int  # read


def verify(path: str | Path, progress: Callable[[int], None] = lambda _: None) -> Verified:
    """Read every byte of a bank: checksums of all chunks, sha256 of the ids of all documents, deleted ones included.

    Args:
      progress: called with the number of bytes after each piece that was read.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except BankError as error:
        return Verified([str(error)], [], 0, 0)
    problems: list[str] = []
    read = 0
    for entry in manifest["segments"]:
        segment = path / entry["name"]
        with _noted(problems):
            table = read_table(segment, manifest, entry)
            missing = list(file_problems(segment, table["sizes"]))
            known = {line.split(": ")[0] for line in missing}
            problems += missing
            problems += [p for p in metadata_problems(path, manifest, entry) if p.split(": ")[0] not in known]
            if entry["chunks"]:
                for size, problem in _chunk_problems(path, manifest, entry, table):
                    read += size
                    progress(size)
                    problems += [p for p in problem if p.split(": ")[0] not in known]
    if not problems:
        with _noted(problems):
            read_documents(path, manifest)
    documents = sum(s["documents"] for s in manifest["segments"])
    return Verified(problems, _leftovers(path, manifest), documents, read)


def _chunk_problems(path: Path, manifest: dict, entry: dict, table: dict) -> Iterator[tuple[int, list[str]]]:
    """File by file of one segment: the bytes that were read, and what is wrong with them."""
    arrays = open_arrays(path, {**manifest, "segments": [entry]}, 0)
    ids = arrays.pop("ids")
    for name, array in arrays.items():
        for layer in range(array.shape[0]):
            for at in range(0, array.shape[1], SHARD[name]):
                problems: list[str] = []
                size = 0
                with _noted(problems):
                    rows = array[layer, at : min(at + SHARD[name], array.shape[1])]
                    size = rows.nbytes
                    if not np.isfinite(rows.astype(np.float32)).all():
                        problems.append(f"{path / entry['name'] / name}: holds NaN or infinity in layer {layer}")
                yield size, problems
    ends = np.cumsum(table["tokens"])
    for i, (end, tokens) in enumerate(zip(ends.tolist(), table["tokens"].tolist(), strict=True)):
        problems, size = [], 0
        if tokens:
            with _noted(problems):
                found = ids[end - tokens : end]
                size = found.nbytes
                if sha256_of_ids(found) != table["sha256"][i]:
                    where = f"{path / entry['name']}: field 'sha256' of its document {i}"
                    problems.append(f"{where} does not match its token ids")
        yield size, problems


def _leftovers(path: Path, manifest: dict) -> list[str]:
    named = {s["name"] for s in manifest["segments"]}
    note = read_note(path, base_of(manifest))
    going_on = {UNFINISHED, *(s["name"] for s in note["segments"])} if note else set()
    found = []
    for entry in sorted(path.iterdir()):
        if entry.name in going_on:
            found.append(f"{entry}: of an unfinished change, which goes on if its command is run again")
        elif (
            disk.PARTIAL in entry.name
            or entry.name == UNFINISHED
            or (entry.name.startswith("segment-") and entry.name not in named)
        ):
            found.append(f"{entry}: left by a process that was killed")
    return found


@contextlib.contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except BankError as error:
        if str(error) not in problems:
            problems.append(str(error))
