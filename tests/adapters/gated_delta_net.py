"""Gated DeltaNet, the layer."""

from __future__ import annotations

from memjax.in_state.gated_delta_net import GatedDeltaNet
from tests.adapters import Arrays, Results, convolutions, expect, layer


def gated_delta_net_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    fixed = {"use_short_conv": True, "conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k", "v"]}
    expect("gated_delta_net_layer", cfg, **fixed, qk_norm="l2", l2_eps=1e-6, gate_activation="silu")
    memory = GatedDeltaNet(
        dim=cfg["dim"],
        heads=cfg["heads"],
        v_heads=cfg["v_heads"],
        head_dim=cfg["head_dim"],
        expand_v=float(cfg["expand_v"]),
        conv_size=cfg["conv_size"],
        allow_neg_eigval=cfg["allow_neg_eigval"],
        use_gate=cfg["use_gate"],
        norm_eps=cfg["norm_eps"],
    )
    expect("gated_delta_net_layer", cfg, head_v_dim=memory.v, scale=memory.head_dim**-0.5)
    return layer(memory, arrays, lambda state: {"out_state": state.S} | convolutions(state.conv, memory.qkv))


SYSTEMS = {"gated_delta_net_layer": gated_delta_net_layer}
