"""`memjax bank`: a bank is asked, and says what it holds. Others: `bank_change`, `bank_care`, `bank_serve`."""

from __future__ import annotations

import time
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
from memjax.cli.console import Command, printable, size, write_stream


@dataclass(frozen=True, kw_only=True)
class Ask(Asking):
    """Ask a bank: the answer, and below it the passages that were read to give it."""

    question: Positional[str]

    def run(self) -> None:
        from memjax.lm.asking import ask, word_index

        out = self.start()
        loaded, opened = self.open()
        documents, began = int((opened.bank.doc_len > 0).sum()), time.perf_counter()
        tokens = int(opened.documents.tokens[opened.bank.doc_len > 0].sum())
        out.print(f"searching {documents:,} documents, {tokens:,} tokens, on {self.location} ...", style="dim")
        index = word_index(loaded, opened) if self.words else None
        asked = ask(loaded, opened, self.question, self.passages, words=index)
        out.print("answer", style="bold green")
        first = write_stream(asked.answer)
        out.print("\nread from", style="bold")
        for place, passage in enumerate(asked.passages, start=1):
            _print_passage(out, place, passage, self.question)
        word = "no word" if first is None else f"first word after {first - began:.1f} s"
        out.print(f"\n{word}, {time.perf_counter() - began:.1f} s in all, compilation included", style="dim")


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


def excerpt(text: str, question: str, width: int | None = None) -> Text:
    """The part of a text that has most of the question's words, on one line, these words marked."""
    from memjax.lm.asking import SHOWN, excerpt

    pieces = excerpt(printable(text), question, width or SHOWN)
    return Text.assemble(*((piece, "bold yellow" if marked else "") for piece, marked in pieces))


def _print_passage(out: Console, place: int, passage: Any, question: str) -> None:
    document, score = passage.document, f"   score {passage.score:.3f}"
    out.print(
        Text.assemble(f"  {place}  ", (printable(document.citation), "bold magenta"), (score, "dim")), soft_wrap=True
    )
    out.print(Text.assemble("     ", excerpt(document.text, question)), soft_wrap=not out.is_terminal)
