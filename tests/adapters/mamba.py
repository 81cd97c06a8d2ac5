"""Mamba: the selective scan, and a whole block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memjax.in_state.mamba import Mamba, selective_scan
from memjax.layers import row
from memjax.tensors import Tensor
from pallas_kernels.diagonal_scan import IMPLEMENTATIONS
from tests.adapters import Arrays, Results, Tail, each, expect, given, layer, value_and_grads

SPAN = 16  # the files have 24 tokens: more than one span


def mamba(arrays: Arrays, cfg: dict) -> Results:
    """Both, each by its own settings."""
    expect("mamba", cfg["scan"], delta_softplus=True, delta_bias=True, a_is_log=False, d_skip=True, z_gate=True)
    expect("mamba", cfg["scan"], gate_activation="silu")
    return each((*IMPLEMENTATIONS, None), lambda name: scan(arrays, name)) | block(arrays, cfg["block"])


def scan(arrays: Arrays, implementation: str | None) -> Results:
    """From a state of zeros, with a gradient through y alone; from in_h0, with one through the last state too."""

    def run(a):
        dt = jax.nn.softplus(a["delta"] + row(a["delta_bias"], a["delta"]))
        m, last = selective_scan(a["u"], dt, a["A"], a["B"], a["C"], a["h0"], implementation=implementation, span=SPAN)
        return {"y": (m + row(a["D"], m) * a["u"]) * jax.nn.silu(a["z"]), "last_state": last}, {}

    inputs = given(arrays, "u", "delta", "B", "C", "z", "h0")
    inputs |= {name: jnp.asarray(arrays[f"param_{name}"]) for name in ("A", "D", "delta_bias")}
    cotangents = {"y": jnp.asarray(arrays["in_cotangent"]), "last_state": jnp.asarray(arrays["in_cotangent_state"])}
    results = {}
    for suffix, prefix, kept in (("", "", 0), ("_h0", "h0case_", 1)):
        begin = inputs | {"h0": kept * inputs["h0"]}
        out, _, grads = value_and_grads(run, begin, cotangents | {"last_state": kept * cotangents["last_state"]})
        results |= {f"out_{name}{suffix}": a for name, a in out.items()}
        results |= {f"grad_{prefix}{name}": g for name, g in grads.items()}
    return results


def block(arrays: Arrays, cfg: dict) -> Results:
    """The module of state-spaces/mamba, its names with underscores."""
    fixed = {"conv_bias": True, "conv_activation": "silu", "delta_softplus": True, "a_is_log": True}
    expect("mamba", cfg, **fixed, in_proj_order=["x", "z"], x_proj_order=["dt", "B", "C"])
    memory = Mamba(
        dim=cfg["dim"],
        state_size=cfg["state_size"],
        conv_size=cfg["conv_size"],
        expand=cfg["expand"],
        dt_rank=cfg["dt_rank"],
    )
    expect("mamba", cfg, inner_dim=memory.inner)
    table = {
        path: Tensor(tuple((name.replace(".", "_"), width) for name, width in t.parts), t.layout)
        for path, t in memory.tensors().items()
    }
    own = {name.replace("block_", "", 1): a for name, a in arrays.items() if "_block_" in name}
    own["in_do"] = own["in_cotangent"]

    def outputs(state):
        return {"out_conv_state": Tail(jnp.swapaxes(state.conv, 1, 2)), "out_ssm_state": state.ssm}

    return {name.replace("_", "_block_", 1): a for name, a in layer(memory, own, outputs, table).items()}


SYSTEMS = {"mamba": mamba}
