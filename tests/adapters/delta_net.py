"""DeltaNet, the layer."""

from __future__ import annotations

from memjax.in_state.delta_net import DeltaNet
from tests.adapters import Arrays, Results, convolutions, expect, layer


def delta_net_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    fixed = {"use_short_conv": True, "conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k", "v"]}
    if cfg["qk_activation"] != "silu":  # the convolution's own is then that of v alone
        fixed.pop("conv_activation")
    expect("delta_net_layer", cfg, **fixed, l2_eps=1e-6, gate_activation="silu")
    memory = DeltaNet(
        dim=cfg["dim"],
        heads=cfg["heads"],
        expand_k=float(cfg["expand_k"]),
        expand_v=float(cfg["expand_v"]),
        conv_size=cfg["conv_size"],
        qk_activation=cfg["qk_activation"],
        qk_norm=cfg["qk_norm"],
        use_beta=cfg["use_beta"],
        allow_neg_eigval=cfg["allow_neg_eigval"],
        use_gate=cfg["use_gate"],
        norm_eps=cfg["norm_eps"],
    )
    expect("delta_net_layer", cfg, head_k_dim=memory.k, head_v_dim=memory.v, scale=memory.k**-0.5)
    return layer(memory, arrays, lambda state: {"out_state": state.S} | convolutions(state.conv, memory.qkv))


SYSTEMS = {"delta_net_layer": delta_net_layer}
