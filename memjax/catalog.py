"""The map of the field: one row per architecture. What is not here is not in the library.

`memjax list` and the README draw their tables from it, and the law suite runs over it. A row names a class; nothing is
imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from memjax.memory import Memory

PLACES: Mapping[str, str] = MappingProxyType(
    {
        "in_state": "a bounded state, rewritten at every token",
        "in_context": "the exact keys and values of a window",
        "in_storage": "a bank outside the window, searched and read back",
        "in_weights": "parameters that are looked up or edited",
    }
)


@dataclass(frozen=True)
class Entry:
    """One architecture.

    path: its class. summary: one line. paper: where it was published. year: of that. sheet: what its specification is
    called. when: what to choose it for. small: fields of a small instance (dim 16) for the laws. goldens: files in
    tests/goldens that check it.
    """

    path: str
    summary: str
    paper: str
    year: int
    sheet: str
    when: str
    small: Mapping[str, Any] = field(default_factory=dict)
    goldens: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The folder: where the memory lives."""
        return self.path.split(".")[1]

    @property
    def cls(self) -> type[Memory]:
        """The class, imported when asked for."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def build(self, **fields: Any) -> Memory:
        """An instance with these fields."""
        return self.cls(**fields)

    def build_small(self) -> Memory:
        """The small instance that the laws run on."""
        return self.cls(**self.small)


CATALOG: Mapping[str, Entry] = MappingProxyType(
    {
        "gated_delta_net": Entry(
            "memjax.in_state.gated_delta_net.GatedDeltaNet",
            "the delta rule with a scalar forget gate: clear old content, overwrite one association",
            "Yang, Kautz, Hatamizadeh: Gated delta networks, arXiv 2412.06464",
            2024,
            "gated_delta_net",
            "a first choice among linear recurrences; keys that are written again replace their old value",
            {"dim": 16, "heads": 2, "head_dim": 4},
            ("gated_delta_net_a", "gated_delta_net_layer_a"),
        ),
        "gla": Entry(
            "memjax.in_state.gla.GatedLinearAttention",
            "linear attention whose state rows decay by a data-dependent gate per key channel",
            "Yang et al.: Gated linear attention transformers, arXiv 2312.06635",
            2023,
            "gla",
            "a cheap fading memory; it cannot erase one key without fading all",
            {"dim": 16, "heads": 2, "gate_low_rank_dim": 4},
            ("gla_a", "gla_layer_a"),
        ),
        "sliding_window_attention": Entry(
            "memjax.in_context.sliding_window_attention.SlidingWindowAttention",
            "softmax attention over the last tokens of the document, in a ring of keys and values",
            "Beltagy, Peters, Cohan: Longformer, arXiv 2004.05150 (window); Su et al., arXiv 2104.09864 (rotary)",
            2020,
            "_qwen3_backbone",
            "exact recall inside a window of known size, alone or between recurrent layers",
            {"dim": 16, "heads": 4, "kv_heads": 2, "window": 5},
        ),
        "canon": Entry(
            "memjax.in_context.canon.Canon",
            "a short causal convolution added to its input: each token carries a little of its neighbours",
            "Allen-Zhu: Physics of language models, part 4.1 (2025)",
            2025,
            "(none; formula in the file)",
            "in front of attention without rotary positions, which copies and routes better behind it",
            {"dim": 16, "width": 4},
        ),
        "msa": Entry(
            "memjax.in_storage.msa.MSA",
            "documents read once and pooled into a store; a question routes to the best and attends to their chunks",
            "MSA: memory sparse attention for memory scaling to 100M tokens, arXiv 2603.23516",
            2026,
            "msa",
            "questions over a corpus far longer than any window, each answer traceable to the documents that were read",
            {
                "dim": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "window": 24, "template": 2, "query_start": 4,
                "pool": 4, "top_k": 2, "capacity": 32, "documents": 16, "max_chunks": 5,
            },
            ("msa_a",),
        ),
        "stem": Entry(
            "memjax.in_weights.stem.STEM",
            "a feed-forward block whose up-projection is a table indexed by the token",
            "STEM: scaling transformers with embedding modules, arXiv 2601.10639",
            2026,
            "stem",
            "static sparsity without routing: the table can stay on the host, and its rows can be edited per token",
            {"dim": 16, "vocab": 50, "hidden": 24},
            ("stem_a",),
        ),
    }
)  # fmt: skip
