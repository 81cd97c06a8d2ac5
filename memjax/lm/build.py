"""Texts to a bank: cut into documents, read by a model block by block, streamed to disk with where each came from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memjax.data.corpus import File, cut
from memjax.errors import ConfigError
from memjax.in_storage.bank_files import BankWriter
from memjax.in_storage.msa import MSA
from memjax.lm import reader
from memjax.lm.files import LoadedModel, ReadingSettings, save_model
from memjax.memory import to_config

TOKENS = 1 << 14  # read in one block: enough to keep a device busy, few enough for the memory of a laptop
COPIED_MODEL = 64 << 20  # bytes of parameters up to which a bank carries its model


class BankSummary(NamedTuple):
    """What was built. bytes: on disk, the model's copy included. has_model: the bank can be asked without `model`."""

    path: Path
    documents: int
    chunks: int
    tokens: int
    bytes: int
    seconds: float
    has_model: bool


def build_bank(
    loaded: LoadedModel,
    files: Sequence[File],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> BankSummary:
    """Read files into a new bank.

    They are cut at lines into documents of the model's `document_tokens`; exact duplicates are dropped. An exception or
    an interrupt leaves no bank, and the old one where it was to be replaced. Held in memory: the ids of all documents,
    and one block of vectors. A model of less than 64 MB is copied into the bank, to PATH/model.

    Args:
      files: as `memjax.data.read_folder` gives them.
      path: of the bank; it must not exist, or be a bank where overwrite is True.
      progress: show documents, tokens, tokens/s and bytes.

    Raises:
      ConfigError: the model reads no bank, or its store is too small for one document.
      BankError: the target exists.
      DataError: the files hold no text.
    """
    from memjax.train.progress import Progress

    began, path = time.perf_counter(), Path(path)
    reading, layer, rows = reading_shape(loaded)
    documents = cut(files, loaded.tokenizer, reading.document_tokens)
    n = len(documents.lengths)
    rows = min(rows, 1 << (n - 1).bit_length())  # a small folder is not padded to a large block
    writer = BankWriter(
        path,
        layers=len(reader.router_layers(loaded.model)),
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        vocab=loaded.tokenizer.vocab_size,
        model_hash=loaded.hash,
        model_config=to_config(loaded.model),
        tokenizer_hash=loaded.tokenizer.hash,
        overwrite=overwrite,
    )
    chunks = tokens = size = 0
    first: tuple[float, int] | None = None  # when the first block, which waits for a compiler, was done
    with writer, Progress(n, "reading", unit="document", enabled=progress) as bar:
        for block in reader.pool_blocks(loaded.model, loaded.params, documents, rows):
            writer.append(block)
            chunks += block.k.shape[1]
            tokens += sum(map(len, block.ids))
            size += sum(a.nbytes for a in block[:3])
            now = time.perf_counter()
            then, before = first = first or (now, tokens)
            speed = {"tokens_per_second": (tokens - before) / (now - then)} if tokens > before else {}
            bar.update(len(block.doc_len), tokens=tokens, **speed, bytes=size)
    if has_model := loaded.model.param_bytes() < COPIED_MODEL:
        save_model(path / "model", loaded.model, loaded.params, loaded.tokenizer, reading=reading)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return BankSummary(path, n, chunks, tokens, size, time.perf_counter() - began, has_model)


def reading_shape(loaded: LoadedModel) -> tuple[ReadingSettings, MSA, int]:
    """The settings, the router layer that all others equal in shape, and how many documents its store takes at once.

    Raises ConfigError for a model that can't build a bank.
    """
    if loaded.reading is None:
        raise ConfigError("model: has no reading settings, so it was not trained to read a bank")
    try:
        layers = reader.router_layers(loaded.model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    shapes = {(m.kv_heads, m.head_dim, m.pool, m.capacity, m.documents) for m in layers}
    if len(shapes) > 1:
        raise ConfigError(f"model: its router layers differ in shape: {sorted(shapes)}; one bank holds one shape")
    layer, width = layers[0], loaded.reading.document_tokens
    chunks = -(-width // layer.pool)
    if layer.capacity < chunks:
        raise ConfigError(
            f"model: capacity is {layer.capacity}, needs {chunks} chunks for a document of {width} tokens"
        )
    return loaded.reading, layer, min(layer.documents, layer.capacity // chunks, max(1, TOKENS // width))
