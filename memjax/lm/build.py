"""Texts to a bank: cut into documents, read by a model block by block, written with where each came from.

A bank that is there is brought up to date: what its files hold is told by their hashes, and only texts that the bank
has not seen are read by the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memjax.data.corpus import File, TokenizedDocuments
from memjax.errors import BankError, ConfigError
from memjax.in_storage.bank_files import Change, OpenBank, Source, open_bank
from memjax.in_storage.bank_manifest import NAME
from memjax.in_storage.bank_writer import new_manifest
from memjax.in_storage.msa import MSA
from memjax.lm import pooling
from memjax.lm.bank_model import copied_model, copy_model, settle_model
from memjax.lm.files import LoadedModel, ReadingSettings, is_model
from memjax.lm.sources import FileChanges, chosen, compare, cut_files, sources_of
from memjax.memory import to_config

TOKENS = 1 << 14  # read in one block: enough to keep a device busy, few enough for the memory of a laptop


class BankSummary(NamedTuple):
    """What a bank holds now, and what was done for it.

    documents: that live. read: documents that the model read for this call; resumed: those that an interrupted call
    had read before. bytes: on disk, the model's copy included. has_model: the bank can be asked without `model`.
    """

    path: Path
    documents: int
    chunks: int
    tokens: int
    bytes: int
    seconds: float
    has_model: bool
    files: FileChanges
    read: int
    resumed: int


def build_bank(
    loaded: LoadedModel,
    files: Sequence[File],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    unread: Collection[str] = (),
    progress: bool = True,
) -> BankSummary:
    """Read files into a bank, or bring the bank that is there up to date with them.

    They are cut at lines into documents of the model's `document_tokens`; a text that stands twice is read and found
    once. Of a bank that is there, files with the same path and text are left alone, documents of others are deleted,
    and new and changed files are appended, all in one step; where nothing changed, nothing is compiled. Files that
    were appended (`append_files`) stay. An exception, an interrupt or a kill leaves the bank as it was, or none, and
    the same call goes on behind the last segment that was written. Held in memory: the ids of all new documents, and
    one block of vectors. A model of less than 64 MB is copied into the bank, to PATH/model.

    Args:
      files: as `memjax.data.read_folder` gives them.
      path: of the bank.
      overwrite: read everything anew, with any model; the bank that is there is replaced at the end.
      unread: files, and folders, that are there and could not be read (`memjax.data.Skipped`): what a bank has of them
        stays.
      progress: show documents, tokens, tokens/s and bytes.

    Raises:
      ConfigError: the model reads no bank, or its store is too small for one document.
      BankError: the bank is another model's, or cut otherwise, or damaged; or there is something else at `path`.
      DataError: the files hold no text, or two have one path.
    """
    return _write(loaded, files, Path(path), overwrite=overwrite, unread=unread, progress=progress)


def append_files(
    loaded: LoadedModel, files: Sequence[File], path: str | os.PathLike[str], *, progress: bool = True
) -> BankSummary:
    """Add files to a bank; one of the same path is left alone where its text is the same, and replaced where not.

    No other file is touched, and `build_bank` does not remove what was appended. Arguments and errors of `build_bank`.
    """
    return _write(loaded, files, Path(path), appended=True, progress=progress)


def _write(
    loaded: LoadedModel,
    files: Sequence[File],
    path: Path,
    *,
    overwrite: bool = False,
    appended: bool = False,
    unread: Collection[str] = (),
    progress: bool,
) -> BankSummary:
    began = time.perf_counter()
    reading, layer, rows = reading_shape(loaded)
    sources = sources_of(files, appended)
    fresh = overwrite or not (appended or (path / NAME).exists())
    with Change(path, _manifest(loaded, reading, layer) if fresh else None, overwrite) as change:
        opened = None if fresh else _opened(path, loaded, reading)
        changes, gone = compare(opened, sources, keep_others=appended, unread=unread)
        differ = {*changes.new, *changes.changed}
        todo = [f for f in files if f.path in differ]
        read = resumed = 0
        if todo or gone or fresh:
            documents, shas = cut_files(todo, loaded.tokenizer, reading.document_tokens, needed=fresh)
            known = set() if opened is None else set(opened.documents.sha256)
            first = dict(reversed([(sha, i) for i, sha in enumerate(shas)]))
            fresh_rows = [i for i, sha in enumerate(shas) if sha not in known and first[sha] == i]
            owner = [loaded.hash, loaded.tokenizer.hash, reading.document_tokens, appended]
            plan = json.dumps([owner, [sources[f.path] for f in todo], [shas[i] for i in fresh_rows]])
            resumed = change.resume(hashlib.sha256(plan.encode()).hexdigest())
            read = len(fresh_rows) - resumed
            _read(change, loaded, chosen(documents, fresh_rows), sources, resumed, rows, progress)
            for i in sorted({*range(len(shas))} - {*fresh_rows}):
                source = sources[documents.paths[documents.path_index[i]]]
                change.refer(source, int(documents.first_line[i]), int(documents.last_line[i]), shas[i])
            change.delete(gone)
            copy_model(path, loaded, anew=fresh)
            change.finish()
        elif not appended:
            change.resume("")  # an update that was interrupted and is no longer wanted
        settle_model(path, loaded.hash)
    return _summary(path, time.perf_counter() - began, changes, read, resumed)


def _manifest(loaded: LoadedModel, reading: ReadingSettings, layer: MSA) -> dict:
    return new_manifest(
        layers=len(pooling.router_layers(loaded.model)),
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        vocab=loaded.tokenizer.vocab_size,
        model_hash=loaded.hash,
        model_config=to_config(loaded.model),
        tokenizer_hash=loaded.tokenizer.hash,
        document_tokens=reading.document_tokens,
    )


def _opened(path: Path, loaded: LoadedModel, reading: ReadingSettings) -> OpenBank:
    """The bank that is there, if it can be added to."""
    opened = open_bank(path)
    for kind, hash_ in (("model", loaded.hash), ("tokenizer", loaded.tokenizer.hash)):
        if (built := opened.manifest[kind]["hash"]) != hash_:
            raise BankError(f"{path}: was built with {kind} {built[:12]}, not {hash_[:12]}; overwrite builds it anew")
    if (built := opened.manifest["document_tokens"]) not in (0, reading.document_tokens):
        now = f"the model's reading settings say {reading.document_tokens}"
        raise BankError(f"{path}: was cut into documents of {built} tokens, {now}; overwrite builds it anew")
    return opened


def _read(
    change: Change,
    loaded: LoadedModel,
    documents: TokenizedDocuments,
    sources: dict[str, Source],
    done: int,
    rows: int,
    progress: bool,
) -> None:
    """The model reads all but the first `done` documents, in blocks that do not depend on `done`."""
    from memjax.train.progress import Progress

    n = len(documents.lengths)
    if done >= n:
        return
    rows = min(rows, 1 << (n - 1).bit_length())  # a small folder is not padded to a large block
    tokens = size = 0
    first: tuple[float, int] | None = None  # when the first block, which waits for a compiler, was done
    left = chosen(documents, list(range(done, n)))
    with Progress(n, "reading", unit="document", done=done, enabled=progress) as bar:
        for block in pooling.pool_blocks(loaded.model, loaded.params, left, rows):
            change.append(block, sources)
            tokens += sum(map(len, block.ids))
            size += sum(a.nbytes for a in block[:3])
            now = time.perf_counter()
            then, before = first = first or (now, tokens)
            speed = {"tokens_per_second": (tokens - before) / (now - then)} if tokens > before else {}
            bar.update(len(block.doc_len), tokens=tokens, **speed, bytes=size)


def _summary(path: Path, seconds: float, changes: FileChanges, read: int, resumed: int) -> BankSummary:
    opened = open_bank(path)
    lives = np.asarray(opened.bank.doc_len) > 0
    tokens, chunks = (int(a[lives].sum()) for a in (opened.documents.tokens, opened.documents.chunks))
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    has_model = is_model(copied_model(path, opened.manifest["model"]["hash"]))
    return BankSummary(path, len(opened.living()), chunks, tokens, size, seconds, has_model, changes, read, resumed)


def reading_shape(loaded: LoadedModel) -> tuple[ReadingSettings, MSA, int]:
    """The settings, the router layer that all others equal in shape, and how many documents its store takes at once.

    Raises ConfigError for a model that can't build a bank.
    """
    if loaded.reading is None:
        raise ConfigError("model: has no reading settings, so it was not trained to read a bank")
    try:
        layers = pooling.router_layers(loaded.model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    shapes = {(m.kv_heads, m.head_dim, m.pool, m.capacity, m.documents, m.top_k) for m in layers}
    if len(shapes) > 1:
        raise ConfigError(f"model: its router layers differ in shape: {sorted(shapes)}; one bank holds one shape")
    layer, width = layers[0], loaded.reading.document_tokens
    chunks = -(-width // layer.pool)
    if layer.capacity < chunks:
        raise ConfigError(
            f"model: capacity is {layer.capacity}, needs {chunks} chunks for a document of {width} tokens"
        )
    return loaded.reading, layer, min(layer.documents, layer.capacity // chunks, max(1, TOKENS // width))
