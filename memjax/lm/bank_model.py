"""The copy of a model inside the bank that it built: PATH/model.

Where a bank is built anew with another model, the new copy stands beside the old one, as PATH/model.new, until the
bank is the new one: whatever happens in between, a bank and the copy with its hash are there together.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from memjax.errors import BankError, CheckpointError
from memjax.in_storage.bank_manifest import MODEL_COPIES
from memjax.lm.files import LoadedModel, is_model, load_model, model_hash, save_model

COPIED_MODEL = 64 << 20  # bytes of parameters up to which a bank carries its model
COPY, NEXT = MODEL_COPIES


def copied_model(bank: Path, hash_: str) -> Path:
    """Where the copy of the bank's model is, if there is one. hash_: the model's, as the bank's manifest has it."""
    return bank / (NEXT if model_hash(bank / NEXT) == hash_ else COPY)


def model_of(bank: Path, manifest: dict, folder: Path | None = None) -> LoadedModel:
    """The model of a bank, from a folder or from the copy inside the bank; an error if it is another."""
    own = copied_model(bank, manifest["model"]["hash"])
    if folder is None and not is_model(own):
        raise CheckpointError(f"{bank}: holds no copy of its model, name it with --model")
    loaded = load_model(folder or own)
    for kind, hash_ in (("model", loaded.hash), ("tokenizer", loaded.tokenizer.hash)):
        if (built := manifest[kind]["hash"]) != hash_:
            found = f"was built with {kind} {built[:12]}, {folder or own} has {kind} {hash_[:12]}"
            raise BankError(f"{bank}: {found}; use the model that built it, or build it anew with --overwrite")
    return loaded


def copy_model(bank: Path, loaded: LoadedModel, anew: bool) -> None:
    """Put a copy into the bank, before its manifest says whose bank it is; not of a large model.

    anew: even where a copy with its hash is there, which may be damaged, or read documents of another length.
    """
    there = not anew and model_hash(copied_model(bank, loaded.hash)) == loaded.hash
    if there or loaded.model.param_bytes() >= COPIED_MODEL:
        return
    place = bank / (NEXT if (bank / COPY).exists() else COPY)
    if place.exists():  # of a change that came to nothing
        shutil.rmtree(place)
    save_model(place, loaded.model, loaded.params, loaded.tokenizer, reading=loaded.reading, dtype=loaded.dtype)


def settle_model(bank: Path, hash_: str) -> None:
    """Remove copies of other models, after the manifest; the bank's own gets its name."""
    if model_hash(bank / NEXT) == hash_:
        shutil.rmtree(bank / COPY, ignore_errors=True)
        (bank / NEXT).rename(bank / COPY)
    shutil.rmtree(bank / NEXT, ignore_errors=True)
    if model_hash(bank / COPY) not in (None, hash_):
        shutil.rmtree(bank / COPY)
