"""Linear attention as an op (no decay, one per head, one per channel), and the layer of gated linear attention."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from memjax.in_state.gla import GatedLinearAttention
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention
from tests.adapters import Arrays, Results, convolutions, each, expect, given, layer, recurrence, value_and_grads

CHUNK = 16  # the files have 37 tokens: chunks are crossed, and the last one is not full


def op(arrays: Arrays, cfg: dict) -> Results:

    def call(a, implementation):
        qkv, log_decay = (a["q"] * cfg["scale"], a["k"], a["v"]), a.get("g", a.get("gk"))
        return linear_attention(*qkv, log_decay, initial_state=a["h0"], chunk_size=CHUNK, implementation=implementation)

    inputs = given(arrays, "q", "k", "v", "h0", optional=("g", "gk"))
    return recurrence(IMPLEMENTATIONS, call, inputs, arrays)


def plain_and_normalised(arrays: Arrays, cfg: dict) -> Results:
    """`op` without decay, and divided by scale q.z + eps, where z, the sum of the keys, is the state of a value 1."""
    expect("linear_attention", cfg["plain"], normalize=False)
    expect("linear_attention", cfg["norm"], normalize=True)
    scale, eps = cfg["norm"]["scale"], cfg["norm"]["eps"]
    inputs = given(arrays, "q_pos", "k_pos", "v", "h0", "z0")

    def compute(implementation: str | None) -> Results:
        def run(a):
            v = jnp.concatenate([a["v"], jnp.ones_like(a["v"][..., :1])], -1)
            state = jnp.concatenate([a["h0"], jnp.moveaxis(a["z0"], 1, -1)], -1)
            q, k = a["q_pos"] * scale, a["k_pos"]
            o, state = linear_attention(q, k, v, initial_state=state, chunk_size=CHUNK, implementation=implementation)
            return o[..., :-1] / (o[..., -1:] + eps), state

        o, state, grads = value_and_grads(run, inputs, jnp.asarray(arrays["in_do"]))
        return {
            "out_o_norm": o,
            "out_final_state_norm": state[..., :-1],
            "out_final_z_norm": jnp.moveaxis(state[..., -1:], -1, 1),
            **{f"grad_norm_{n}": g for n, g in grads.items()},
        }

    return op(arrays, cfg["plain"]) | each((*IMPLEMENTATIONS, None), compute)


def retention(arrays: Arrays, cfg: dict) -> Results:
    """`op` with the fixed decay log(1 - 2**-(offset + h)) of head h; also from a state of zeros."""
    expect("retnet", cfg, rotary=False)
    b, t, h, _ = arrays["in_q"].shape
    log_decay = np.log1p(-(2.0 ** -(cfg["decay_exponent_offset"] + np.arange(h)))).astype(arrays["in_q"].dtype)
    arrays = {**arrays, "in_g": np.broadcast_to(log_decay, (b, t, h))}
    empty = op({**arrays, "in_h0": np.zeros_like(arrays["in_h0"])}, cfg)
    return {**op(arrays, cfg), "out_o_zero_state": empty["out_o"], "out_log_decay": log_decay}


def gla_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    fixed = {"conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k", "v"], "feature_map": None}
    expect("gla_layer", cfg, **fixed, gate_activation="silu")
    memory = GatedLinearAttention(
        dim=cfg["dim"],
        heads=cfg["heads"],
        kv_heads=cfg.get("kv_heads"),
        expand_k=float(cfg["expand_k"]),
        expand_v=float(cfg["expand_v"]),
        gate_low_rank_dim=cfg["gate_low_rank_dim"],
        gate_logit_normalizer=float(cfg["gate_logit_normalizer"]),
        clamp_min=None if cfg["clamp_min"] is None else float(cfg["clamp_min"]),
        use_short_conv=cfg["use_short_conv"],
        conv_size=cfg["conv_size"],
        use_gate=cfg["use_gate"],
        norm_eps=cfg["norm_eps"],
    )
    expect("gla_layer", cfg, head_k_dim=memory.k, head_v_dim=memory.v, scale=memory.k**-0.5)

    def outputs(state):
        return {"out_state": state.S} | (convolutions(state.conv, memory.qkv) if memory.use_short_conv else {})

    return layer(memory, arrays, outputs)


SYSTEMS = {
    "gla": op,
    "gla_layer": gla_layer,
    "linear_attention": plain_and_normalised,
    "retnet": retention,
    "simple_gla": op,
}
