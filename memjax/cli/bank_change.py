"""`memjax bank build | append`: files are read into a bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, count, printable, report_skipped, size
from memjax.errors import BankError, ConfigError, DataError

LISTED = 5  # changed files that are printed


@dataclass(frozen=True, kw_only=True)
class Build(Command):
    """Read the texts of a folder into a bank, or bring the bank that is there up to date with the folder.

    Text and source code, web pages, notebooks, and PDFs (extra `pdf`).
    """

    folder: Positional[Path]
    """The folder, or one file. What is no text, or in no certain encoding, is skipped and listed."""
    model: Path | None = None
    """Folder of a model that was trained to read a bank. By default the copy inside a bank that is there, and for a new
    one the small model that comes with memjax."""
    bank: Path | None = None
    """The bank to write; default: the folder's name with .bank, in the current directory."""
    overwrite: bool = False
    """Read everything anew, and replace a bank that is there."""

    def run(self) -> None:
        from memjax.in_storage.bank_manifest import NAME
        from memjax.lm.build import build_bank

        out = self.start()
        path = self.bank or Path(f"{self.folder.resolve().name}.bank")
        loaded = _model(path, self.model, new=self.overwrite or not (path / NAME).exists())
        files, skipped = _texts(self.folder)
        report_skipped(out, skipped)
        characters = sum(len(f.text) for f in files)
        out.print(f"{len(files):,} files, {characters:,} characters from {self.folder}", soft_wrap=True)
        with _Interruptible(path):
            unread = [one.path for one in skipped if one.unread]
            made = build_bank(loaded, files, path, overwrite=self.overwrite, unread=unread)
        _report(out, made, self.model)


@dataclass(frozen=True, kw_only=True)
class Append(Command):
    """Add files to a bank; one that it has by the same path is replaced where its text is another.

    A file is named as `build` would name it: by its path below the folder that is given, or by its name. What was
    appended stays when `build` brings the bank up to date.
    """

    bank: Positional[Path]
    files: Positional[tuple[Path, ...]]
    """Files, or folders of them."""
    model: Path | None = None
    """Folder of the model that built the bank; by default the copy inside the bank."""

    def run(self) -> None:
        from memjax.lm.build import append_files

        out = self.start()
        if not self.files:
            raise ConfigError("FILES: names nothing to append")
        loaded = _model(self.bank, self.model, new=False)
        files, skipped = [], []
        for place in self.files:
            for found, all_ in zip(_texts(place), (files, skipped), strict=True):
                all_ += found
        report_skipped(out, skipped)
        with _Interruptible(self.bank):
            made = append_files(loaded, files, self.bank)
        _report(out, made, self.model)


# ---------------------------------------------------------------------------------------------- files and the model


def _texts(place: Path) -> tuple[list[Any], list[Any]]:
    """What `read_folder` finds, without banks, which are no texts wherever they lie.

    Raises DataError where nothing is left, as `read_folder` does.
    """
    from memjax.data import read_folder
    from memjax.in_storage.bank_manifest import is_bank

    files, skipped = read_folder(place)
    folders = {folder for one in (*files, *skipped) for folder in Path(one.path).parents}
    banks = {folder for folder in folders if place.is_dir() and is_bank(place / folder)}
    files, skipped = ([one for one in of if banks.isdisjoint(Path(one.path).parents)] for of in (files, skipped))
    if not files:
        raise DataError(f"{place}: the folder holds no text file but in a bank")
    return files, skipped


def _model(bank: Path, folder: Path | None, new: bool) -> Any:
    """The model that reads the files. new: the bank may become another model's; the packaged one, if it has none."""
    from memjax.in_storage.bank_manifest import read_manifest
    from memjax.lm.bank_model import model_of
    from memjax.lm.files import load_model
    from memjax.lm.packaged import PACKAGED

    if folder is not None:
        return load_model(folder)
    try:
        return model_of(bank, read_manifest(bank), None)
    except BankError:  # none, damaged, or of another version
        if not new:
            raise
    return load_model(PACKAGED)


# ---------------------------------------------------------------------------------------------- what was done


class _Interruptible:
    """Says after Ctrl-C what there is now."""

    def __init__(self, bank: Path):
        self.bank = bank

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, *_) -> None:
        from memjax.in_storage.bank_files import unfinished
        from memjax.in_storage.bank_manifest import NAME

        if kind is not None and issubclass(kind, KeyboardInterrupt):
            kept = "the bank is as it was" if (self.bank / NAME).exists() else "no bank was written"
            read = unfinished(self.bank)
            then = f"goes on behind {count(read, 'document')} that were read" if read else "begins anew"
            raise KeyboardInterrupt(f"{kept}; the same command {then}") from None


def _report(out: Console, made: Any, model: Path | None) -> None:
    files = made.files
    if done := [f"{len(paths):,} {kind}" for kind, paths in vars(files).items() if paths and kind != "unchanged"]:
        unchanged = f", {len(files.unchanged):,} unchanged" if files.unchanged else ""
        resumed = f", {count(made.resumed, 'document')} of an interrupted run" if made.resumed else ""
        out.print(f"files: {', '.join(done)}{unchanged}; {count(made.read, 'document')} read{resumed}")
        for kind, paths in (("changed", files.changed), ("removed", files.removed)):
            _list(out, kind, paths)
    else:
        out.print(f"nothing to do: {count(len(files.unchanged), 'file')} unchanged")
    counts = f"{count(made.documents, 'document')}, {made.tokens:,} tokens in {made.chunks:,} chunks"
    out.print(f"{made.path}: {counts}, {size(made.bytes)}, {made.seconds:.1f} s", style="green", soft_wrap=True)
    then = "" if made.has_model or model is None else f" --model {model}"
    out.print(f'next: memjax bank ask {made.path} "..."{then}', style="dim", soft_wrap=True)


def _list(out: Console, kind: str, paths: Sequence[str]) -> None:
    for path in paths[:LISTED]:
        out.print(Text(f"  {kind} {printable(path)}", "dim"), soft_wrap=True)
    if len(paths) > LISTED:
        out.print(f"  and {len(paths) - LISTED:,} more {kind}", style="dim")
