"""A change of a bank: segments that are whole before anyone hears of them, then one replacement of the manifest.

A `Change` holds the lock of a bank. What it writes goes into new segments beside the old ones; `finish` replaces the
manifest in one step, and only then old files go. So whoever reads sees the old bank or the new one, whatever happens
to the writer, and the next writer removes what a killed one left. Every `SEGMENT` chunks the documents so far become
a segment of their own, of which a note (unfinished.json) is kept: a change with the same plan goes on behind it. Where
segments end depends on the documents alone, so the bytes of a bank do not tell whether its writer was interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from memjax.errors import BankError
from memjax.in_storage import bank_disk as disk
from memjax.in_storage.bank_manifest import (
    MODEL_COPIES,
    NAME,
    UNFINISHED,
    base_of,
    check_manifest,
    is_bank,
    read_manifest,
    read_note,
    seal,
    write_manifest,
    write_note,
)
from memjax.in_storage.bank_segment import Block, Segment, check_path
from memjax.in_storage.bank_table import Source, file_problems, read_table

SEGMENT = 32768  # chunks of a segment at most, but for one larger block: what an interruption can lose
SEGMENT_NAME = re.compile("segment-[0-9]{8}")


class Change:
    """A change of one bank under its lock, to be used in a `with`; leaving it without `finish` changes nothing.

    Args:
      path: the bank.
      new: the manifest, without segments, of a bank that is begun, or that takes the place of the one that is there.
      overwrite: with `new`, a bank may be there.

    Raises:
      BankError: there is no bank, or one without leave to replace it; another process holds the lock.
    """

    def __init__(self, path: Path, new: dict | None = None, overwrite: bool = False):
        self.path, self.segment_chunks = path, SEGMENT
        self._made = self._replacing = self.finished = False
        self._segment: Segment | None = None
        if new is not None:
            check_manifest(str(path), seal(new))
            check_target(path, overwrite)
            if not path.exists():
                self._made = _make(path)
        self._lock = disk.lock(path)
        try:
            self._made = self._made and not any(path.iterdir())  # another may have built its bank before the lock
            if new is not None:
                check_target(path, overwrite)
            self._begin(new)
        except BaseException:
            try:
                if self._made:
                    disk.remove(path)
            finally:
                os.close(self._lock)
            raise

    def _begin(self, new: dict | None) -> None:
        there = None
        try:
            there = read_manifest(self.path)
        except BankError:
            if new is None:
                raise
        if there:
            names = [s["name"] for s in there["segments"]]
        else:  # none, or of another version, or damaged: what it has is kept until it is replaced
            names = [p.name for p in self.path.glob("segment-*")] if (self.path / NAME).exists() else []
        numbers = {n: int(n[8:]) if SEGMENT_NAME.fullmatch(n) else -1 for n in names}
        base = new or there or {}
        self.manifest: dict = {**base, "deleted": list(base["deleted"])}
        self._base, self._plan, self._first = base_of(there), "", max([-1, *numbers.values()]) + 1
        self._done: list[dict] = []
        note = read_note(self.path, self._base)
        # A note that begins elsewhere is of another's making: what it would have removed is the bank.
        if note and note["plan"] and (not there or note["first"] == self._first):
            self._plan, self._first = note["plan"], note["first"]
            own = zip(note["segments"], itertools.count(self._first), strict=False)
            named = itertools.takewhile(lambda pair: pair[0]["name"] == segment_name(pair[1]), own)
            self._done = list(itertools.takewhile(self._is_whole, (entry for entry, _ in named)))
        self._keep = {name for name, number in numbers.items() if number < self._first}
        self._clean()
        if not self._plan:
            disk.remove(self.path / UNFINISHED)

    def _is_whole(self, entry: dict) -> bool:
        segment = self.path / entry["name"]
        try:
            return not any(file_problems(segment, read_table(segment, self.manifest, entry)["sizes"]))
        except BankError:
            return False

    # ------------------------------------------------------------------------------------------ progress

    def resume(self, plan: str) -> int:
        """How many documents an unfinished change with this plan has already written: go on behind them.

        A plan names what is going to be appended, block by block; "" is never gone on with. What an unfinished change
        with another plan has written is removed.
        """
        if not plan or plan != self._plan:
            self._forget()
        self._plan = plan
        if not self._done:
            write_note(self.path, self._base, plan, self._first, [])
        return sum(s["documents"] for s in self._done)

    def append(self, block: Block, sources: Mapping[str, Source] | None = None) -> None:
        """The next documents. sources: what is known of the files named in `block.path`."""
        chunks = sum(map(int, block.doc_len))
        if self._segment and self._segment.chunks and self._segment.chunks + chunks > self.segment_chunks:
            self._commit()
        self._open_segment().append(block, sources or {})

    def refer(self, source: Source, first_line: int, last_line: int, sha256: str) -> None:
        """A document whose text the bank holds, or will at the end: the same ids, in another file or elsewhere."""
        check_path(source.path, "refer")
        self._open_segment().rows.add(source, first_line, last_line, 0, 0, sha256)

    def delete(self, documents: Sequence[int]) -> None:
        """Hide documents, by their number in the bank that is there: from `finish` on never found, never shown."""
        self.manifest["deleted"] = sorted({*self.manifest["deleted"], *map(int, documents)})

    def finish(self) -> None:
        """The manifest last, in one step; then the files of what it no longer names."""
        if self._segment:
            self._done = [*self._done, self._segment.finish()]
        self.manifest["segments"] = [*self.manifest["segments"], *self._done]
        if not any(s["chunks"] for s in self.manifest["segments"]):
            raise BankError(f"{self.path}: no document was written")
        self._replacing = True
        write_manifest(self.path, self.manifest)
        disk.sync_directory(self.path.absolute().parent)
        self._segment, self._done, self._keep = None, [], {s["name"] for s in self.manifest["segments"]}
        disk.remove(self.path / UNFINISHED)
        self._clean()
        self.finished = True

    def finish_deletion(self) -> None:
        """Write what `delete` hid; an unfinished update or `append` of another command can still be gone on with."""
        self._replacing = True
        write_manifest(self.path, self.manifest)

    def _commit(self) -> None:
        self._done = [*self._done, self._open_segment().finish()]
        write_note(self.path, self._base, self._plan, self._first, self._done)
        self._segment = None

    def _open_segment(self) -> Segment:
        if self._segment is None:
            number = self._first + len(self._done)
            self._segment = Segment(self.path / segment_name(number), self.manifest)
        return self._segment

    def _forget(self) -> None:
        self._done = []
        self._clean()
        if not (self.path / NAME).exists():
            for copy in MODEL_COPIES:
                disk.remove(self.path / copy)
        disk.remove(self.path / UNFINISHED)  # last: it says that the folder is a bank

    def _clean(self) -> None:
        """Remove what killed writers left, and segments that nothing names."""
        named = {*self._keep, *(s["name"] for s in self._done)}
        for entry in sorted(self.path.iterdir()):
            if disk.PARTIAL in entry.name or (entry.name.startswith("segment-") and entry.name not in named):
                disk.remove(entry)

    # ------------------------------------------------------------------------------------------ with

    def __enter__(self) -> Change:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is not None:
                with contextlib.suppress(BankError):  # what went wrong first is what the caller hears of
                    self.give_up()
            elif not self.finished:
                self.give_up()
        finally:
            os.close(self._lock)

    def give_up(self) -> None:
        """Remove what was written without a plan that can be gone on with, and all of a bank that was begun so."""
        self._segment = None
        if self._replacing:  # which manifest there is, and what it names, is for the next writer to see
            return
        if self._plan and self._done:
            self._clean()
            return
        self._forget()
        if self._made:
            disk.remove(self.path)
        elif not (self.path / NAME).exists():
            with contextlib.suppress(OSError):  # of another's making, and not empty
                self.path.rmdir()


def segment_name(number: int) -> str:
    """The folder of a segment."""
    return f"segment-{number:08d}"


def _make(path: Path) -> bool:
    """Make a folder; False where another process was quicker, and the lock tells who may write."""
    try:
        disk.make_directory(path)
    except BankError:
        if not path.is_dir():
            raise
        return False
    return True


def check_target(path: Path, overwrite: bool) -> None:
    """BankError where a new bank may not be written."""
    if not path.exists() and not path.is_symlink():
        return
    if (path / NAME).exists() and is_bank(path):
        if not overwrite:
            raise BankError(f"{path}: exists; overwrite=True replaces a bank")
    elif not is_bank(path) and not (path.is_dir() and all(disk.PARTIAL in p.name for p in path.iterdir())):
        raise BankError(f"{path}: exists and is no bank; it is not overwritten")


def unfinished(path: str | Path) -> int:
    """How many documents an unfinished change has written, that a command run again would not write again."""
    path = Path(path)
    with contextlib.suppress(BankError):
        note = read_note(path, base_of(read_manifest(path) if (path / NAME).exists() else None))
        return sum(s["documents"] for s in note["segments"]) if note and note["plan"] else 0
    return 0
