"""RetNet, the layer."""

from __future__ import annotations

from memjax.in_state.retnet import RetNet
from tests.adapters import Arrays, Results, convolutions, expect, layer


def retnet_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    fixed = {"decay_exponent_offset": 5, "feature_map": None, "gate_activation": "silu"}
    fixed |= {"conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k", "v"]}
    expect("retnet_layer", cfg, **fixed, rotary=True, rotary_interleaved=False)
    memory = RetNet(
        dim=cfg["dim"],
        heads=cfg["heads"],
        kv_heads=cfg["kv_heads"],
        expand_k=float(cfg["expand_k"]),
        expand_v=float(cfg["expand_v"]),
        theta=float(cfg["rotary_base"]),
        use_short_conv=cfg["use_short_conv"],
        conv_size=cfg.get("conv_size", 4),
        use_gate=cfg["use_gate"],
        norm_eps=cfg["norm_eps"],
    )
    expect("retnet_layer", cfg, head_k_dim=memory.k, head_v_dim=memory.v, rotary_dim=memory.k, scale=memory.k**-0.5)

    def outputs(state):
        return {"out_state": state.S} | (convolutions(state.conv, memory.qkv) if memory.use_short_conv else {})

    return layer(memory, arrays, outputs)


SYSTEMS = {"retnet_layer": retnet_layer}
