"""`memjax bank`: a bank is asked, and says what it holds. Others: `bank_change`, `bank_care`, `bank_serve`."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, subcommand

from memjax.cli.bank_care import Compact, Delete, Verify
from memjax.cli.bank_change import Append, Build
from memjax.cli.bank_serve import Asking, Serve
from memjax.cli.console import Command, error, printable, size, write_stream
from memjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ask(Asking):
    """Ask a bank: the answer, and below it the passages that were read to give it.

    Without a question, each line of standard input is one, until it ends: only the first waits for compilation.
    """

    question: Positional[str | None] = None

    def run(self) -> int:
        from memjax.lm.asking import ask, word_index

        out = self.start()
        loaded, opened = self.open()
        documents, tokens = int((opened.bank.doc_len > 0).sum()), opened.documents.tokens[opened.bank.doc_len > 0].sum()
        out.print(f"searching {documents:,} documents, {tokens:,} tokens, on {self.location} ...", style="dim")
        index = word_index(loaded, opened) if self.words else None
        many = self.question is None

        def answer(question: str, compiles: bool) -> None:
            began = time.perf_counter()
            asked = ask(loaded, opened, question, self.passages, words=index, same_shapes=many)
            out.print("answer", style="bold green")
            first = write_stream(without_blank_lines(asked.answer))
            out.print("\nread from", style="bold")
            for place, passage in enumerate(asked.passages, start=1):
                _print_passage(out, place, passage, question)
            word = "no word" if first is None else f"first word after {first - began:.2f} s"
            including = ", compilation included" if compiles else ""
            out.print(f"\n{word}, {time.perf_counter() - began:.2f} s in all{including}", style="dim")

        if self.question is not None:
            answer(self.question, compiles=True)
            return 0
        compiles, code = True, 0
        for question in lines(out):
            try:
                answer(question, compiles)
                compiles = False
            except ConfigError as why:  # of this question; the next may be a good one
                error(str(why))
                code = 2
        return code


def lines(out: Console) -> Iterator[str]:
    """The lines of standard input that are not empty; on a terminal behind a prompt, and with a history."""
    asks = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines
    while True:
        try:
            line = input("\n? " if asks else "").strip()
        except EOFError:
            break
        if line:
            if not asks:
                out.print(Text(f"\n? {printable(line)}", "bold"), soft_wrap=True)
            yield line


def without_blank_lines(texts: Iterable[str]) -> Iterator[str]:
    """A text that comes in pieces without its empty lines, and white space at both ends."""
    space, begun = "", False
    for text in texts:
        text = space + text
        told = text.rstrip()
        space = text[len(told) :]
        if told:
            told = re.sub(r"\n\s*\n", "\n", told)
            yield told if begun else told.lstrip()
            begun = True


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """What a bank holds."""

    bank: Positional[Path]

    def run(self) -> None:
        from memjax.in_storage.bank_files import open_bank, unfinished
        from memjax.lm.bank_model import copied_model
        from memjax.lm.files import is_model

        out = self.start()
        opened = open_bank(self.bank)
        manifest, documents, found = opened.manifest, opened.documents, opened.bank.doc_len > 0
        living, files = opened.living(), {}
        for i in living.tolist():
            files[documents.path[i]] = files.get(documents.path[i], 0) + int(documents.tokens[i])
        notes = [f"{len(manifest['deleted']):,} deleted"] if manifest["deleted"] else []
        notes += [f"{shared:,} with a text that another has"] if (shared := len(living) - int(found.sum())) else []
        notes += [f"{waiting:,} of an unfinished change"] if (waiting := unfinished(self.bank)) else []
        heads = f"{manifest['layers']} router layers, {manifest['kv_heads']} heads of {manifest['head_dim']}"
        stored = sum(f.stat().st_size for f in self.bank.rglob("*") if f.is_file())
        copy = is_model(copied_model(self.bank, manifest["model"]["hash"]))
        inside = "a copy is in the bank" if copy else "not in the bank"
        said = f" ({', '.join(notes)})" if notes else ""
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in (
            ("documents", f"{len(living):,} of {len(files):,} files{said}"),
            ("tokens", f"{int(documents.tokens[found].sum()):,} in {int(documents.chunks[found].sum()):,} chunks"),
            ("vectors", f"{heads}, {manifest['dtype']}"),
            ("on disk", f"{size(stored)}, segments: {len(manifest['segments'])}"),
            ("model", f"{manifest['model']['hash'][:12]}, {inside}"),
            ("tokenizer", f"{manifest['tokenizer']['hash'][:12]}, {manifest['vocab']:,} tokens"),
        ):
            table.add_row(Text(name, "bold"), value)
        largest = sorted(files.items(), key=lambda item: -item[1])[:5]
        for i, (path, tokens) in enumerate(largest):
            table.add_row(Text("" if i else "largest files", "bold"), Text(f"{printable(path)}  {tokens:,} tokens"))
        out.print(Text(str(self.bank), "bold magenta"), soft_wrap=True)
        out.print(table)


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Read a folder into a bank, ask it, and keep it up to date."""

    command: (
        Annotated[Build, subcommand("build")]
        | Annotated[Ask, subcommand("ask")]
        | Annotated[Serve, subcommand("serve")]
        | Annotated[Info, subcommand("info")]
        | Annotated[Append, subcommand("append")]
        | Annotated[Delete, subcommand("delete")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Compact, subcommand("compact")]
    )

    def run(self) -> int | None:
        return self.command.run()


def marked_excerpt(text: str, question: str) -> Text:
    """The part of a text that has most of the question's words, on one line, these words marked."""
    from memjax.lm.asking import excerpt

    pieces = excerpt(printable(text), question)
    return Text.assemble(*((piece, "bold yellow" if marked else "") for piece, marked in pieces))


def _print_passage(out: Console, place: int, passage: Any, question: str) -> None:
    document, score = passage.document, f"   score {passage.score:.3f}"
    out.print(
        Text.assemble(f"  {place}  ", (printable(document.citation), "bold magenta"), (score, "dim")), soft_wrap=True
    )
    out.print(Text.assemble("     ", marked_excerpt(document.text, question)), soft_wrap=not out.is_terminal)
