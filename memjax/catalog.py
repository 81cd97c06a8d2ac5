"""The map of the field: one row per architecture. What is not here is not in the library.

`memjax list` and the README draw their tables from it, and the law suite runs over it. A row names a class; nothing is
imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from memjax.memory import Memory

PLACES: Mapping[str, str] = MappingProxyType(
    {
        "in_state": "a bounded state, rewritten at every token",
        "in_context": "the exact keys and values of a window",
        "in_storage": "a bank outside the window, searched and read back",
        "in_weights": "parameters that are looked up or edited",
    }
)


class Part(NamedTuple):
    """In the fields of a small instance: the small instance of another entry, with fields of its own."""

    name: str
    fields: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Entry:
    """One architecture.

    path: its class. summary: one line. paper: where it was published. year: of that. sheet: what its specification is
    called. when: what to choose it for, and for what not. small: fields of a small instance (dim 16) for the laws,
    with a `Part` where a field is a memory. goldens: files in tests/goldens that check it.
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

    def build_small(self, **fields: Any) -> Memory:
        """The small instance that the laws run on, or one that differs in some fields."""
        build = lambda part: CATALOG[part.name].build_small(**part.fields)  # noqa: E731
        return self.cls(**{name: with_parts(value, build) for name, value in {**self.small, **fields}.items()})


def with_parts(value: Any, build: Callable[[Part], Memory | None]) -> Any:
    """The value of a field with each `Part` in it built."""
    if isinstance(value, Part):
        return build(value)
    return tuple(with_parts(v, build) for v in value) if type(value) is tuple else value


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
        "delta_net": Entry(
            "memjax.in_state.delta_net.DeltaNet",
            "linear attention that writes only the error of what its key recalled, at a learned rate",
            "Yang, Wang, Zhang, Shen, Kim: Parallelizing linear transformers with the delta rule, arXiv 2406.06484",
            2024,
            "delta_net",
            "few associations whose values change, exactly overwritten; what is never written again is never cleared",
            {"dim": 16, "heads": 2, "expand_k": 0.5, "use_gate": True},
            ("delta_net_a", "delta_net_layer_a"),
        ),
        "gated_deltaproduct": Entry(
            "memjax.in_state.gated_deltaproduct.GatedDeltaProduct",
            "Gated DeltaNet with several writes a token: the state is turned by a product of reflections",
            "Siems et al.: DeltaProduct, arXiv 2502.10297",
            2025,
            "gated_deltaproduct",
            "following permutations and other states of a machine; for plain recall the second write only costs time",
            {"dim": 16, "heads": 1, "v_heads": 2, "head_dim": 4, "expand_v": 1.0},
            ("gated_deltaproduct_a", "gated_deltaproduct_layer_a"),
        ),
        "kda": Entry(
            "memjax.in_state.kda.KDA",
            "the delta rule with a data-dependent decay for every key channel",
            "Kimi Team: Kimi Linear, arXiv 2510.26692",
            2025,
            "kda",
            "three of four layers beside full attention; per token dearer than the scalar gate of Gated DeltaNet",
            {"dim": 16, "heads": 1, "v_heads": 2, "head_dim": 8},
            ("kda_a", "kda_layer_a"),
        ),
        "gdn2": Entry(
            "memjax.in_state.gdn2.GatedDeltaNet2",
            "KDA with a gate per key channel for what is erased and one per value channel for what is written",
            "Gated DeltaNet-2: decoupling erase and write in linear attention, arXiv 2605.22791",
            2026,
            "kda",
            "values that change in part while the rest stands; less tried than KDA, and larger",
            {"dim": 16, "heads": 1, "v_heads": 2, "head_dim": 4},
            ("gdn2_a",),
        ),
        "based": Entry(
            "memjax.in_state.based.Based",
            "linear attention with the Taylor expansion of exp as feature map: soft global recall, never sharp",
            "Arora et al.: Simple linear attention language models (Based), arXiv 2402.18668",
            2024,
            "based",
            "recall bought with bytes of state, beside small windows and convolutions; alone it is poor at neighbours",
            {"dim": 16, "heads": 2, "feature_dim": 3},
            ("based_a",),
        ),
        "base_conv": Entry(
            "memjax.in_state.base_conv.BaseConv",
            "a short convolution gated by its own input: the local mixer of Based",
            "Arora et al.: Simple linear attention language models (Based), arXiv 2402.18668",
            2024,
            "based",
            "cheap layers between those that recall; it sees three tokens, so it is no memory by itself",
            {"dim": 16},
        ),
        "jrt_rnn": Entry(
            "memjax.in_state.jrt_rnn.PrefixLinearAttention",
            "Based that reads the prompt as a whole: every token sees the sum of all encoded prompt tokens",
            "Arora et al.: Just read twice (JRT), arXiv 2407.05483",
            2024,
            "jrt_rnn",
            "prompts known whole before the answer, context and question in any order; not for endless streams",
            {"dim": 16, "heads": 2, "feature_dim": 3, "enc_length": 5},
            ("jrt_rnn_a",),
        ),
        "linear_attention": Entry(
            "memjax.in_state.linear_attention.LinearAttention",
            "softmax replaced by a product of feature maps: one matrix sums up the past and forgets nothing",
            "Katharopoulos et al.: Transformers are RNNs, arXiv 2006.16236",
            2020,
            "linear_attention",
            "a baseline and a layer among attention; not for recall of more pairs than a head has features",
            {"dim": 16, "heads": 2, "kv_heads": 1, "feature_map": "elu", "normalize": True},
            ("linear_attention_a",),
        ),
        "retnet": Entry(
            "memjax.in_state.retnet.RetNet",
            "linear attention with rotary positions and one fixed rate of decay per head",
            "Sun et al.: Retentive network, arXiv 2307.08621",
            2023,
            "retnet",
            "smooth signals, and a decay that is known beforehand; not for recall: nothing decides what to keep",
            {"dim": 16, "heads": 2, "kv_heads": 1},
            ("retnet_a", "retnet_layer_a"),
        ),
        "simple_gla": Entry(
            "memjax.in_state.simple_gla.SimpleGatedLinearAttention",
            "linear attention whose heads decay by one data-dependent gate each",
            "Yang et al.: Gated linear attention transformers, arXiv 2312.06635",
            2023,
            "retnet",
            "the cheapest learned forgetting; not for keeping one feature of a head while another fades",
            {"dim": 16, "heads": 2, "kv_heads": 1},
            ("simple_gla_a",),
        ),
        "hgrn": Entry(
            "memjax.in_state.hgrn.HGRN",
            "a gated linear RNN with a vector state, whose forget gates are bounded below by depth",
            "Qin, Yang, Zhong: Hierarchically gated recurrent neural network, arXiv 2311.04823",
            2023,
            "hgrn",
            "the smallest state, 4 bytes a channel, beside attention; not for recall on its own: it has no keys",
            {"dim": 16},
            ("hgrn_a", "hgrn_layer_a"),
        ),
        "hgrn2": Entry(
            "memjax.in_state.hgrn2.HGRN2",
            "HGRN with a matrix state: one minus the forget gate of a key channel is the key",
            "Qin et al.: HGRN2, arXiv 2404.07904",
            2024,
            "hgrn2",
            "the linear layers of a hybrid, 6 to each of attention; not for overwriting: old values only fade",
            {"dim": 16, "expand_ratio": 8, "use_short_conv": True},
            ("hgrn2_layer_a",),
        ),
        "mamba2": Entry(
            "memjax.in_state.mamba2.Mamba2",
            "a selective state-space layer: the token's step size scales what is forgotten and what is written",
            "Dao, Gu: Transformers are SSMs, arXiv 2405.21060",
            2024,
            "mamba2",
            "a plain stack of one kind of layer, its MLP included; not for replacing the value of a key",
            {"dim": 16, "head_dim": 8, "state_size": 6, "groups": 2},
            ("mamba2_a", "mamba2_layer_a"),
        ),
        "mamba": Entry(
            "memjax.in_state.mamba.Mamba",
            "a selective state space model: the token chooses the step, the write and the read of each channel's state",
            "Gu, Dao: Mamba, arXiv 2312.00752",
            2023,
            "mamba",
            "long streams at a small state, also under gated memory units; not for recall of many pairs: see mamba2",
            {"dim": 16, "state_size": 4},
            ("mamba_a",),
        ),
        "recurrentgemma_lru": Entry(
            "memjax.in_state.recurrentgemma_lru.RecurrentGemmaLRU",
            "one gated number a channel behind a short convolution: the recurrent block of Griffin",
            "De et al.: Griffin, arXiv 2402.19427",
            2024,
            "recurrentgemma_lru",
            "two of three layers beside local attention; not alone: a vector state has no keys to recall by",
            {"dim": 16, "heads": 2, "lru_width": 24},
            ("recurrentgemma_lru_a",),
        ),
        "rwkv7": Entry(
            "memjax.in_state.rwkv7.RWKV7",
            "a delta rule with a key to remove by, another to write by, and a decay and a rate for every channel",
            "Peng et al.: RWKV-7 Goose, arXiv 2503.14456",
            2025,
            "rwkv7",
            "whole models of it, and tracking a state; not as one layer among others: all need the values of the first",
            {
                "dim": 16, "head_dim": 8, "decay_low_rank_dim": 4, "a_low_rank_dim": 4, "v_low_rank_dim": 4,
                "gate_low_rank_dim": 4,
            },
            ("rwkv7_a", "rwkv7_layer_a"),
        ),
        "log_linear_attention": Entry(
            "memjax.in_state.log_linear_attention.LogLinearAttention",
            "Mamba-2 with a state for each power of two of distance, each read with a weight of its own",
            "Guo, Yang, Goel, Xing, Dao, Kim: Log-linear attention, arXiv 2506.04761",
            2025,
            "log_linear_attention",
            "what is far is not drowned by what is near; costs as many states as the length has binary digits",
            {"dim": 16, "max_length": 16, "head_dim": 8, "state_size": 4},
            ("log_linear_attention_a",),
        ),
        "mesa_net": Entry(
            "memjax.in_state.mesa_net.MesaNet",
            "every readout solves the least-squares problem of the decayed past by conjugate gradients",
            "von Oswald et al.: MesaNet, arXiv 2506.05233",
            2025,
            "mesa_net",
            "regression in context and keys that resemble each other; not where each token has to be cheap",
            {"dim": 16, "heads": 2, "head_dim": 4},
            ("mesa_net_a", "mesa_net_layer_a"),
        ),
        "mom": Entry(
            "memjax.in_state.mom.MoM",
            "several states of any linear recurrence; a router sends each token to a few, and mixes what they read",
            "Du et al.: MoM, linear sequence modeling with mixture-of-memories, arXiv 2502.13685",
            2025,
            "mom",
            "more to remember at the cost per token of a few states; not where memory is short: all states are kept",
            {"memory": Part("gated_delta_net"), "num_memories": 5, "top_k": 2},
            ("mom_a",),
        ),
        "sambay": Entry(
            "memjax.in_state.sambay.SambaY",
            "a decoder whose upper half gates what the lower half has read and attends to its one key-value cache",
            "Ren et al.: Decoder-hybrid-decoder architecture, arXiv 2507.06607",
            2025,
            "sambay",
            "long answers to long prompts, with one cache to read; not for short texts, where it saves nothing",
            {
                "linear": Part("mamba"), "window": Part("sliding_window_attention", {"rotary": False}),
                "saved": Part("mamba", {"hands_on": True}), "layers": 8, "hidden": 8, "heads": 4, "kv_heads": 2,
                "capacity": 24,
            },
            ("sambay_a",),
        ),
        "hybrid_stack": Entry(
            "memjax.in_state.hybrid_stack.HybridStack",
            "layers of a linear recurrence with one of full attention every few layers",
            "A systematic analysis of hybrid linear attention, arXiv 2507.06457",
            2025,
            "hybrid_stack",
            "recall near that of attention with a third or less of its cache; pure stacks where no cache may grow",
            {
                "linear": Part("hgrn"), "full": Part("sliding_window_attention"), "layers": 5, "hidden": 8, "ratio": 1,
            },
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
        "differential_attention": Entry(
            "memjax.in_context.differential_attention.DifferentialAttention",
            "the difference of two softmax maps over a window: what both see by accident cancels",
            "Ye et al.: Differential transformer, arXiv 2410.05258; Ren et al., arXiv 2507.06607 (interleaved heads)",
            2024,
            "sambay",
            "attention that distractors lead astray less; it has half as many readings as heads, so not with few heads",
            {"dim": 16, "heads": 4, "kv_heads": 2, "window": 5, "layer": 1},
            ("sambay_a",),
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
