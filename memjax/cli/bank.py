"""`memjax bank`: a bank is asked, and says what it holds. What changes it: `bank_change`, `bank_care`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, subcommand

from memjax.cli.bank_care import Compact, Delete, Verify
from memjax.cli.bank_change import Append, Build, model_of
from memjax.cli.console import Command, printable, size, write_stream
from memjax.errors import ConfigError

BLOCK = 4  # tokens of an answer decoded between two prints
SHOWN = 240  # characters of a passage
USUAL = frozenset("about does from have that their there they this what when where which will with".split())


@dataclass(frozen=True, kw_only=True)
class Ask(Command):
    """Ask a bank: the answer, and below it the passages that were read to give it."""

    bank: Positional[Path]
    question: Positional[str]
    model: Path | None = None
    """Folder of the model that built the bank; by default the copy inside the bank."""
    passages: int | None = None
    """Documents that are read before answering; by default as in training."""
    location: Literal["disk", "host", "device"] = "disk"
    """Where the bank lies while it is searched."""

    def run(self) -> None:
        out = self.start()
        loaded, opened = self._open()
        documents, began = int((opened.bank.doc_len > 0).sum()), time.perf_counter()
        tokens = int(opened.documents.tokens[opened.bank.doc_len > 0].sum())
        out.print(f"searching {documents:,} documents, {tokens:,} tokens, on {self.location} ...", style="dim")
        pieces, passages = answer(loaded, opened, self.question, self.passages or loaded.reading.passages)
        out.print("answer", style="bold green")
        write_stream(pieces, loaded.tokenizer)
        out.print("\nread from", style="bold")
        for place, (document, score) in enumerate(passages, start=1):
            _print_passage(out, place, score, _document(opened, loaded.tokenizer, document), self.question)
        out.print(f"\n{time.perf_counter() - began:.1f} s, compilation included", style="dim")

    def _open(self) -> tuple[Any, Any]:
        from memjax.in_storage.bank_files import open_bank

        if self.passages is not None and self.passages < 1:
            raise ConfigError(f"--passages is {self.passages}, needs at least 1")
        opened = open_bank(self.bank)
        loaded = model_of(self.bank, opened.manifest, self.model)
        if loaded.reading is None:
            raise ConfigError(f"{self.model or self.bank}: its model has no reading settings, so it can't ask a bank")
        return loaded, opened if self.location == "disk" else open_bank(self.bank, location=self.location)


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
        | Annotated[Info, subcommand("info")]
        | Annotated[Append, subcommand("append")]
        | Annotated[Delete, subcommand("delete")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Compact, subcommand("compact")]
    )

    def run(self) -> int | None:
        return self.command.run()


def answer(loaded: Any, opened: Any, question: str, count: int) -> tuple[Any, list[tuple[int, float]]]:
    """The pieces of an answer as they are decoded, and the passages it is read from, (document, score), best first."""
    from memjax.lm.generate import stream
    from memjax.lm.reader import prepare

    model, params, steps = loaded.model, loaded.params, loaded.reading.answer_tokens
    got = prepare(model, params, opened.bank, loaded.tokenizer, [question], opened.token_ids, read=count, steps=steps)
    pieces = stream(
        model, params, got.state, got.prompt, steps=steps, block=BLOCK, valid=got.valid, sampling=got.sampling
    )
    return pieces, got.passages[0]


def excerpt(text: str, question: str, width: int = SHOWN) -> Text:
    """The part of a text that has most of the question's words, on one line, these words marked."""
    text = " ".join(printable(text).split())
    words = {w for w in re.findall(r"\w+", question.lower()) if (len(w) > 3 or w.isdigit()) and w not in USUAL}
    pattern = "|".join(rf"\b{re.escape(w)}\b" for w in sorted(words, key=len, reverse=True)) or r"(?!)"
    hits = [(m.start(), m.group().lower()) for m in re.finditer(pattern, text, re.IGNORECASE)]
    begins = [max(0, min(at - width // 4, len(text) - width)) for at, _ in hits] or [0]
    begin = max(begins, key=lambda b: len({word for at, word in hits if b <= at <= b + width - len(word)}))
    shown = ("… " if begin else "") + text[begin : begin + width] + (" …" if begin + width < len(text) else "")
    marked = Text(shown)
    marked.highlight_regex(re.compile(pattern, re.IGNORECASE), "bold yellow")
    return marked


def _document(opened: Any, tokenizer: Any, i: int) -> Any:
    from memjax.data import Document

    table = opened.documents
    text = tokenizer.decode(opened.token_ids(i))
    return Document(table.path[i], int(table.first_line[i]), int(table.last_line[i]), text)


def _print_passage(out: Console, place: int, score: float, document: Any, question: str) -> None:
    out.print(
        Text.assemble(f"  {place}  ", (printable(document.citation), "bold magenta"), (f"   score {score:.3f}", "dim")),
        soft_wrap=True,
    )
    out.print(Text.assemble("     ", excerpt(document.text, question)), soft_wrap=not out.is_terminal)
