"""`memjax bank`: a folder becomes a bank, and the bank is asked."""

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

from memjax.cli.console import Command, printable, report_skipped, size, write_stream
from memjax.errors import BankError, CheckpointError, ConfigError

BLOCK = 4  # tokens of an answer decoded between two prints
SHOWN = 240  # characters of a passage
USUAL = frozenset("about does from have that their there they this what when where which will with".split())


@dataclass(frozen=True, kw_only=True)
class Build(Command):
    """Read the texts of a folder into a new bank: text and source code, web pages, notebooks, PDFs."""

    folder: Positional[Path]
    """The folder, or one file. What is no text, or in no certain encoding, is skipped and listed."""
    model: Path
    """Folder of a model that was trained to read a bank."""
    bank: Path | None = None
    """The bank to write; default: the folder's name with .bank, in the current directory."""
    overwrite: bool = False
    """Replace a bank that is there."""

    def run(self) -> None:
        from memjax.data import read_folder
        from memjax.lm.build import build_bank
        from memjax.lm.files import load_model

        out = self.start()
        path = self.bank or Path(f"{self.folder.resolve().name}.bank")
        if path.exists() and not self.overwrite:
            raise BankError(f"{path}: exists; --overwrite replaces a bank")
        loaded = load_model(self.model)
        files, skipped = read_folder(self.folder)
        own = tuple(f"{_below(self.folder, path)}{end}" for end in ("/", ".partial-", ".old-"))
        files = [f for f in files if not f.path.startswith(own)]  # a bank inside its folder is not a text
        report_skipped(out, [s for s in skipped if not s.path.startswith(own)])
        characters = sum(len(f.text) for f in files)
        out.print(f"{len(files):,} files, {characters:,} characters from {self.folder}", soft_wrap=True)
        try:
            made = build_bank(loaded, files, path, overwrite=self.overwrite)
        except KeyboardInterrupt:
            kept = "the old bank is as it was" if path.exists() else "no bank was written"
            raise KeyboardInterrupt(f"{kept}; the same command begins anew") from None
        counts = f"{made.documents:,} documents, {made.tokens:,} tokens in {made.chunks:,} chunks"
        out.print(f"{made.path}: {counts}, {size(made.bytes)}, {made.seconds:.1f} s", style="green", soft_wrap=True)
        model = "" if made.has_model else f" --model {self.model}"
        out.print(f'next: memjax bank ask {made.path} "..."{model}', style="dim", soft_wrap=True)


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
        tokens = int(opened.documents.tokens.sum())
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
        from memjax.lm.files import is_model, load_model

        if self.passages is not None and self.passages < 1:
            raise ConfigError(f"--passages is {self.passages}, needs at least 1")
        opened = open_bank(self.bank)
        own = self.bank / "model"
        if self.model is None and not is_model(own):
            raise CheckpointError(f"{self.bank}: holds no copy of its model, name it with --model")
        loaded = load_model(self.model or own)
        for kind, hash_ in (("model", loaded.hash), ("tokenizer", loaded.tokenizer.hash)):
            if (built := opened.manifest[kind]["hash"]) != hash_:
                found = f"was built with {kind} {built[:12]}, {self.model or own} has {kind} {hash_[:12]}"
                raise BankError(f"{self.bank}: {found}; ask with the model that built it, or build it anew")
        if loaded.reading is None:
            raise ConfigError(f"{self.model or own}: has no reading settings, so it can't ask a bank")
        return loaded, opened if self.location == "disk" else open_bank(self.bank, location=self.location)


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """What a bank holds."""

    bank: Positional[Path]

    def run(self) -> None:
        from memjax.in_storage.bank_files import open_bank
        from memjax.lm.files import is_model

        out = self.start()
        opened = open_bank(self.bank)
        manifest, documents = opened.manifest, opened.documents
        files: dict[str, int] = {}
        for path, tokens in zip(documents.path, documents.tokens.tolist(), strict=True):
            files[path] = files.get(path, 0) + tokens
        deleted = f" ({len(manifest['deleted']):,} deleted)" if manifest["deleted"] else ""
        heads = f"{manifest['layers']} router layers, {manifest['kv_heads']} heads of {manifest['head_dim']}"
        stored = sum(f.stat().st_size for f in self.bank.rglob("*") if f.is_file())
        inside = "a copy is in the bank" if is_model(self.bank / "model") else "not in the bank"
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in (
            ("documents", f"{len(documents.path):,}{deleted} of {len(files):,} files"),
            ("tokens", f"{int(documents.tokens.sum()):,} in {int(documents.chunks.sum()):,} chunks"),
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
    """Read a folder into a bank, and ask it."""

    command: (
        Annotated[Build, subcommand("build")] | Annotated[Ask, subcommand("ask")] | Annotated[Info, subcommand("info")]
    )

    def run(self) -> None:
        self.command.run()


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


def _below(folder: Path, path: Path) -> str:
    """The path as `read_folder` names what lies in the folder; one that no name begins with, if it lies elsewhere."""
    folder, path = folder.resolve(), path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else "\0"
