"""Any memory of the catalog with a given number of heads, for the experiments that compare them at one size."""

from __future__ import annotations

import inspect
from typing import Any

from memjax.catalog import CATALOG
from memjax.lm.model import LanguageModel
from memjax.lm.small import small_mixers, small_model
from memjax.memory import Memory


def mixers(
    name: str, *, dim: int, heads: int, head_dim: int, window: int, vocab: int = 1, layers: int = 1
) -> tuple[Memory, ...]:
    """The memory of each layer, with `heads` heads of head_dim x head_dim where its class has fields for that.

    window: of memories that have one. vocab: of those indexed by tokens.
    """
    parameters = inspect.signature(CATALOG[name].cls).parameters
    share = heads * head_dim / dim
    usual = {"heads": heads, "kv_heads": heads, "expand_k": share}
    if "head_dim" not in parameters:
        usual["expand_v"] = share
    fields: dict[str, Any] = {field: value for field, value in usual.items() if field in parameters}
    return small_mixers(name, dim=dim, head_dim=head_dim, window=window, vocab=vocab, layers=layers, **fields)


def language_model(
    name: str, *, vocab: int, dim: int, layers: int, heads: int, head_dim: int, window: int
) -> LanguageModel:
    """Layers of the memory with a feed-forward block of 4 dim behind each."""
    found = mixers(name, dim=dim, heads=heads, head_dim=head_dim, window=window, vocab=vocab, layers=layers)
    return small_model(found, vocab, hidden=4 * dim)
