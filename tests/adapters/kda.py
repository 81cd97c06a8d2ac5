"""Kimi Delta Attention, the layer."""

from __future__ import annotations

from memjax.in_state.kda import KDA
from tests.adapters import Arrays, Results, convolutions, expect, layer


def kda_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    fixed = {"use_short_conv": True, "conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k", "v"]}
    expect("kda_layer", cfg, **fixed, qk_norm="l2", l2_eps=1e-6, use_gate=True, gate_activation="sigmoid")
    expect("kda_layer", cfg, safe_gate=cfg["lower_bound"] is not None)
    memory = KDA(
        dim=cfg["dim"],
        heads=cfg["heads"],
        v_heads=cfg["v_heads"],
        head_dim=cfg["head_dim"],
        expand_v=float(cfg["expand_v"]),
        conv_size=cfg["conv_size"],
        allow_neg_eigval=cfg["allow_neg_eigval"],
        lower_bound=None if cfg["lower_bound"] is None else float(cfg["lower_bound"]),
        norm_eps=cfg["norm_eps"],
    )
    expect("kda_layer", cfg, head_v_dim=memory.v, scale=memory.head_dim**-0.5)
    return layer(memory, arrays, lambda state: {"out_state": state.S} | convolutions(state.conv, memory.qkv))


SYSTEMS = {"kda_layer": kda_layer}
