"""Gated DeltaNet, the layer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.memory import How
from tests.adapters import Arrays, Results, Tail, each, expect, given, in_dtype, parameters, value_and_grads


def layer(arrays: Arrays, cfg: dict) -> Results:
    """out_y, the state, and the gradients of sum(y do). The weights of the file are [out, in]."""
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
    inputs = given(arrays, "x", "do")
    ends_of_q_and_k = np.cumsum(memory.qkv)[:-1].tolist()

    def run(a, implementation):
        theirs, x = a["params"], a["x"]
        params = {f"w_{n}": theirs[f"{n}_proj.weight"].T for n in ("qkvabgo" if memory.use_gate else "qkvabo")}
        params |= {"A_log": theirs["A_log"], "dt_bias": theirs["dt_bias"], "norm": theirs["o_norm.weight"]}
        params["conv"] = jnp.concatenate([theirs[f"{n}_conv1d.weight"][:, 0].T for n in "qkv"], -1)
        state = in_dtype(memory.init_state(x.shape[0]), x.dtype)
        return memory.apply(params, state, x, how=How(implementation))

    def compute(implementation: str) -> Results:
        given_to_run = {"x": inputs["x"], "params": parameters(arrays)}
        y, state, grads = value_and_grads(lambda a: run(a, implementation), given_to_run, inputs["do"])
        conv = jnp.split(jnp.swapaxes(state.conv, 1, 2), ends_of_q_and_k, 1)
        return {
            "out_y": y,
            "out_state": state.S,
            "grad_x": grads["x"],
            **{f"out_conv{i}": Tail(a) for i, a in enumerate(conv)},
            **{f"grad_param_{n}": g for n, g in grads["params"].items()},
        }

    return each(memory.implementations, compute)


SYSTEMS = {"gated_delta_net_layer": layer}
