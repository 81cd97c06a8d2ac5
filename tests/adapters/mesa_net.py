"""MesaNet, the op and the layer."""

from __future__ import annotations

import jax.numpy as jnp

from memjax.in_state.mesa_net import MesaNet, mesa
from tests.adapters import Arrays, Results, convolutions, each, expect, given, layer, value_and_grads

CHUNK = 8  # the files have 32 tokens


def op(arrays: Arrays, cfg: dict) -> Results:
    """The exact solution, direct and by conjugate gradients to the end; and as far as few steps of those come."""
    expect("mesa_net", cfg, scale=1.0, qk_l2norm=False, gate="scalar_log_decay")
    names = ("q", "k", "v", "beta", "g", "lamb", "h_kk0", "h_kv0")
    inputs = given(arrays, *names)

    def run(a, **how):
        o, *states = mesa(*(a[name] for name in names), chunk_size=CHUNK, **how)
        return o, states

    def exact(solver: str | None) -> Results:
        steps = {"direct": None, "conjugate gradients": 4 * cfg["head_k_dim"]}[str(solver)]
        o, states, grads = value_and_grads(lambda a: run(a, steps=steps), inputs, jnp.asarray(arrays["in_do"]))
        named = zip(("out_h_kk", "out_h_kv"), states, strict=True)
        return {"out_o_exact": o, **dict(named), **{f"grad_{name}": g for name, g in grads.items()}}

    results = each(("direct", "conjugate gradients"), exact)
    for name in ("cg30", "cg5"):
        expect("mesa_net", cfg[name], solver="cg", cg_start="zero")
        results[f"out_o_{name}"] = run(inputs, steps=cfg[name]["cg_steps"], guard=cfg[name]["cg_guard"])[0]
    return results


def mesa_net_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, two streams in one convolution."""
    fixed = {"use_short_conv": True, "conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k"]}
    fixed |= {"head_v_dim": cfg["head_dim"], "scale": 1.0, "qk_norm": "l2", "l2_eps": 1e-6, "gate_activation": "silu"}
    expect("mesa_net_layer", cfg, **fixed, solver="exact")
    memory = MesaNet(
        dim=cfg["dim"],
        heads=cfg["heads"],
        head_dim=cfg["head_dim"],
        conv_size=cfg["conv_size"],
        lambda_lower_bound=cfg["lambda_lower_bound"],
        steps=None,
        use_gate=cfg["use_gate"],
        norm_eps=cfg["norm_eps"],
    )

    def outputs(state):
        return {"out_state0": state.H_kk, "out_state1": state.H_kv} | convolutions(state.conv, (memory.inner,) * 2)

    return layer(memory, arrays, outputs)


SYSTEMS = {"mesa_net": op, "mesa_net_layer": mesa_net_layer}
