"""The copy of a model inside the bank that it built: PATH/model.

Where a bank is built anew with another model, the new copy stands beside the old one, as PATH/model.new, until the
bank is the new one: whatever happens in between, a bank and the copy with its hash are there together.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from memjax.lm.files import LoadedModel, model_hash, save_model

COPIED_MODEL = 64 << 20  # bytes of parameters up to which a bank carries its model
COPY, NEXT = "model", "model.new"


def copied_model(bank: Path, hash_: str) -> Path:
    """Where the copy of the bank's model is, if there is one. hash_: the model's, as the bank's manifest has it."""
    return bank / (NEXT if model_hash(bank / NEXT) == hash_ else COPY)


def copy_model(bank: Path, loaded: LoadedModel) -> None:
    """Put a copy into the bank, before its manifest says whose bank it is; not of a large model."""
    if loaded.model.param_bytes() >= COPIED_MODEL or model_hash(copied_model(bank, loaded.hash)) == loaded.hash:
        return
    place = bank / (NEXT if (bank / COPY).exists() else COPY)
    if place.exists():  # of a change that came to nothing
        shutil.rmtree(place)
    save_model(place, loaded.model, loaded.params, loaded.tokenizer, reading=loaded.reading)


def settle_model(bank: Path, hash_: str) -> None:
    """Remove copies of other models, after the manifest; the bank's own gets its name."""
    if model_hash(bank / NEXT) == hash_:
        shutil.rmtree(bank / COPY, ignore_errors=True)
        (bank / NEXT).rename(bank / COPY)
    shutil.rmtree(bank / NEXT, ignore_errors=True)
    if model_hash(bank / COPY) not in (None, hash_):
        shutil.rmtree(bank / COPY)
