"""Mamba-2: its recurrence, and the layer."""

from __future__ import annotations

import jax.numpy as jnp

from memjax.in_state.mamba2 import Mamba2, ssd
from memjax.memory import How
from tests.adapters import Arrays, Results, Tail, expect, given, layer, recurrence


def mamba2(arrays: Arrays, cfg: dict) -> Results:
    """The recurrence on final values: the step sizes after softplus, A after the exponential."""
    expect("mamba2", cfg, scale=1.0, dt_softplus=False, dt_bias=False, a_is_log=False, d_skip=True)

    def call(a, implementation):
        return ssd(**{n: a[n] for n in ("x", "dt", "A", "B", "C", "D")}, initial_state=a["h0"], how=How(implementation))

    inputs = given(arrays, "x", "dt", "A", "B", "C", "D", "h0")
    results = recurrence(Mamba2.implementations, call, inputs, arrays)
    return {"out_y" if name == "out_o" else name: result for name, result in results.items()}


def mamba2_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, which keeps one more row of the convolution, and its states transposed."""
    fixed = {"conv_bias": True, "conv_activation": "silu", "proj_bias": False, "scale": 1.0}
    fixed |= {"in_proj_order": ["z", "x", "B", "C", "dt"], "norm_before_gate": False, "gate_activation": "silu"}
    expect("mamba2_layer", cfg, **fixed)
    least, most = cfg["dt_limit"]
    memory = Mamba2(
        dim=cfg["dim"],
        expand=cfg["expand"],
        head_dim=cfg["head_dim"],
        state_size=cfg["state_size"],
        groups=cfg["n_groups"],
        conv_size=cfg["conv_size"],
        dt_limit=(float(least), None if most is None else float(most)),
        norm_eps=cfg["norm_eps"],
    )
    expect("mamba2_layer", cfg, heads=memory.heads)

    def outputs(state):
        rows = Tail(jnp.swapaxes(state.conv, 1, 2))
        return {"out_ssm_state": jnp.swapaxes(state.S, 2, 3), "out_conv_state": rows}

    return layer(memory, arrays, outputs)


SYSTEMS = {"mamba2": mamba2, "mamba2_layer": mamba2_layer}
