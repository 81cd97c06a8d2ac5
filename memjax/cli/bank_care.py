"""`memjax bank delete | verify | compact`: what keeps a bank in order, and needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, count, printable, size
from memjax.errors import ConfigError, MemjaxError


@dataclass(frozen=True, kw_only=True)
class Delete(Command):
    """Hide documents of a bank: from now on they are not found and not shown.

    The others keep their numbers and their answers. The space comes back with `memjax bank compact`; a file that still
    lies in its folder comes back with `memjax bank build`.
    """

    bank: Positional[Path]
    patterns: Positional[tuple[str, ...]] = ()
    """Files or folders as the bank names them, or patterns such as "notes/*.md" ("*" stands for "/" too)."""
    document: tuple[int, ...] = ()
    """Single documents, by number."""

    def run(self) -> None:
        from memjax.in_storage.bank_files import delete_documents, delete_files

        out = self.start()
        if not self.patterns and not self.document:
            raise ConfigError("PATTERNS: names nothing to delete; give paths, patterns, or --document NUMBER")
        if self.patterns and self.document:
            raise ConfigError("--document: give either paths or numbers of documents")
        if self.document:
            files, documents = 0, delete_documents(self.bank, self.document)
        else:
            files, documents = delete_files(self.bank, self.patterns)
        of = f" of {count(files, 'file')}" if files else ""
        done = f"deleted {count(documents, 'document')}{of}" if documents else "nothing to do, all of it is deleted"
        out.print(f"{self.bank}: {done}", style="green", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Read every byte of a bank and compare all checksums; the exit status is 1 if anything is wrong."""

    bank: Positional[Path]

    def run(self) -> int:
        from memjax.in_storage.bank_files import verify
        from memjax.in_storage.bank_manifest import read_manifest
        from memjax.lm.bank_model import copied_model
        from memjax.lm.files import load_model

        out = self.start()
        found = verify(self.bank)
        problems = list(found.problems)
        try:
            manifest = read_manifest(self.bank)
            copy = copied_model(self.bank, manifest["model"]["hash"])
            if copy.exists() and (hash_ := load_model(copy).hash) != manifest["model"]["hash"]:
                problems.append(f"{copy}: is model {hash_[:12]}, the bank is of {manifest['model']['hash'][:12]}")
        except MemjaxError as error:
            problems += [str(error)] if str(error) not in problems else []
        for line in problems:
            out.print(Text(printable(line), "red"), soft_wrap=True)
        for line in found.leftovers:
            out.print(Text(printable(line), "yellow"), soft_wrap=True)
        what = f"{count(found.documents, 'document')}, {size(found.bytes)} of arrays read"
        said = f"{count(len(problems), 'problem')} found" if problems else "whole"
        out.print(f"{self.bank}: {said}, {what}", style="red" if problems else "green", soft_wrap=True)
        return int(bool(problems))


@dataclass(frozen=True, kw_only=True)
class Compact(Command):
    """Write what lives in a bank into one segment and free the space of deleted documents.

    Documents are numbered anew. It needs room for the old bank and the new one, and ends an unfinished change.
    """

    bank: Positional[Path]

    def run(self) -> None:
        from memjax.in_storage.bank_files import compact

        out = self.start()
        before = _bytes(self.bank)
        done = compact(self.bank)
        if done.dropped or done.segments > 1:
            was = f"{count(done.segments, 'segment')} became one, {size(before)} became {size(_bytes(self.bank))}"
            said = f"{count(done.documents, 'document')} kept, {done.dropped:,} dropped, {was}"
        else:
            said = "nothing to do, one segment without deleted documents"
        out.print(f"{self.bank}: {said}", style="green", soft_wrap=True)


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
