"""Writing a bank from nothing: a stream of blocks into a new directory, or in the place of another bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from memjax.in_storage.bank_change import Change
from memjax.in_storage.bank_manifest import FORMAT, VERSION, plain_json


def new_manifest(
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    model_hash: str,
    model_config: Any,
    tokenizer_hash: str,
    document_tokens: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> dict:
    """The manifest of a bank that is begun (`Change`, whose arguments see in `BankWriter`)."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"hash": model_hash, "config": plain_json(model_config)},
        "tokenizer": {"hash": tokenizer_hash},
        "document_tokens": document_tokens,
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "vocab": vocab,
        "segments": [],
        "deleted": [],
    }


class BankWriter(Change):
    """Writes a bank, and gives it its manifest when it is whole.

        with BankWriter("corpus.bank", layers=2, kv_heads=4, head_dim=24, vocab=8192,
                        model_hash=h, model_config=config, tokenizer_hash=t) as writer:
            for block in blocks:
                writer.append(block)

    Leaving the block finishes the bank; leaving it by an exception, or by an interrupt, removes what was written. A
    killed process leaves a folder without a manifest, which nobody takes for a bank and the next writer clears. With a
    plan (see `Change.resume`) what was written stays and is gone on with. Memory: 16384 chunks and a block.

    Args:
      path: a directory that does not exist or is empty; with overwrite=True it may be another bank, which is there as
        before until the new one takes its place in one step.
      vocab: token ids are below it, and stored as uint16 up to 65536.
      model_hash, tokenizer_hash: whatever the caller compares when it opens the bank. model_config: any JSON.
      document_tokens: the length that texts were cut to, for whoever changes the bank later; 0: not said.

    Raises:
      BankError: the target exists, a block does not fit the bank or itself, no document was written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
        model_hash: str,
        model_config: Any,
        tokenizer_hash: str,
        document_tokens: int = 0,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        overwrite: bool = False,
        plan: str = "",
    ):
        new = new_manifest(
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=vocab,
            model_hash=model_hash,
            model_config=model_config,
            tokenizer_hash=tokenizer_hash,
            document_tokens=document_tokens,
            dtype=dtype,
        )
        super().__init__(Path(path), new, overwrite)
        try:
            self.done = self.resume(plan)
        except BaseException as error:
            Change.__exit__(self, type(error))
            raise

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(self, kind, *rest) -> None:
        try:
            if kind is None and not self.finished:
                self.finish()
        except BaseException as error:
            super().__exit__(type(error), error)
            raise
        super().__exit__(kind, *rest)
