"""Opening a bank on disk: the checks first, then arrays that are read when they are asked for, or at once.

Readers take no lock. An open bank stays as it was while documents are appended or deleted. Where it is compacted or
built anew, its files go: what lies on disk then raises a BankError at the next read, and never gives other numbers,
since no segment ever gets a name that one had before; what was read to the host or a device stays, its token ids
excepted. Open it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from memjax.errors import BankError
from memjax.in_storage.bank import Bank
from memjax.in_storage.bank_arrays import open_arrays
from memjax.in_storage.bank_disk import sha256_of_ids
from memjax.in_storage.bank_manifest import check_owner, read_manifest
from memjax.in_storage.bank_table import Documents, Source, read_documents

CACHE_BYTES = 64 << 20  # of shard indexes and inner chunks, over all arrays of a bank


@dataclass(frozen=True)
class OpenBank:
    """What `open_bank` returns."""

    bank: Bank
    manifest: dict
    documents: Documents
    path: Path
    ids: Any  # [tokens], all documents one after the other, on disk

    def token_ids(self, document: int) -> Int[np.ndarray, " t"]:
        """The ids of one document, int32, checked against its sha256."""
        if not 0 <= document < len(self.documents.tokens):
            raise BankError(f"{self.path}: no document {document}; the bank has {len(self.documents.tokens)}")
        if document in self._deleted:
            raise BankError(f"{self.path}: document {document} is deleted")
        start = int(self._first_token[self.documents.holder[document]])
        ids = self.ids[start : start + int(self.documents.tokens[document])].astype(np.int32)
        if sha256_of_ids(ids) != self.documents.sha256[document]:
            raise BankError(f"{self.path}: field 'sha256' of document {document} does not match its token ids")
        return ids

    def living(self) -> np.ndarray:
        """The documents that are not deleted, those that share a text included."""
        return np.setdiff1d(np.arange(len(self.documents.sha256)), self.manifest["deleted"])

    def files(self) -> dict[Source, list[int]]:
        """Every version of a source file that the bank holds, with its documents; nothing deleted."""
        found: dict[Source, list[int]] = {}
        for i in self.living().tolist():
            found.setdefault(self.documents.source[i], []).append(i)
        return found

    @cached_property
    def _deleted(self) -> frozenset[int]:
        return frozenset(self.manifest["deleted"])

    @cached_property
    def _first_token(self) -> np.ndarray:
        own = np.where(self.documents.holder == np.arange(len(self.documents.tokens)), self.documents.tokens, 0)
        return np.cumsum(own) - own


def open_bank(
    path: str | Path,
    *,
    location: Literal["disk", "host", "device"] = "disk",
    model_hash: str | None = None,
    tokenizer_hash: str | None = None,
) -> OpenBank:
    """Open a bank; the manifest, the table and the sizes of all files are checked, and with a hash, whose bank it is.

    Args:
      location: "disk" reads what is asked for, when it is asked for; "host" reads all into memory as numpy (a copy, not
        a map of the files: checksums are tested on the way); "device" puts all onto the default device. Mixtures are
        a `_replace`: `bank._replace(rk=jnp.asarray(bank.rk[:]))` keeps routing keys on the device, k and v on disk.

    Raises:
      BankError: another model, tokenizer or version; a file missing, truncated or damaged; counts that disagree; a
        bank whose first build is not finished.
    """
    if location not in ("disk", "host", "device"):
        raise ValueError(f"open_bank: location is {location!r}, needs 'disk', 'host' or 'device'")
    path = Path(path)
    manifest = read_manifest(path)
    check_owner(path, manifest, model_hash, tokenizer_hash)
    documents = read_documents(path, manifest)
    start, length, chunk_doc = _places(documents, manifest["deleted"])
    arrays = open_arrays(path, manifest, CACHE_BYTES if location == "disk" else 0)
    ids = arrays.pop("ids")
    if location != "disk":
        arrays = {name: a[:] for name, a in arrays.items()}
        arrays["rk"][:, chunk_doc < 0] = 0
    bank = Bank(**arrays, chunk_doc=chunk_doc, doc_start=start, doc_len=length)
    return OpenBank(jax.device_put(bank) if location == "device" else bank, manifest, documents, path, ids)


def _places(documents: Documents, deleted: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """doc_start, doc_len and chunk_doc, int32.

    Documents that share a text share its chunks, which belong to the first of them that lives (the holder before
    others): a search finds a text once, and as long as any file has it.
    """
    number = np.arange(len(documents.chunks))
    own = np.where(documents.holder == number, documents.chunks, 0)
    start = (np.cumsum(own) - own)[documents.holder]
    lives = np.ones(len(number), bool)
    lives[deleted] = False
    owner = np.where(lives, number, -1)  # of the chunks of a holder
    for i in np.flatnonzero((documents.holder != number) & lives):
        if owner[documents.holder[i]] < 0:
            owner[documents.holder[i]] = i
    length = np.where(owner[documents.holder] == number, documents.chunks, 0)
    chunk_doc = np.repeat(owner, own)
    return start.astype(np.int32), length.astype(np.int32), chunk_doc.astype(np.int32)
