"""RWKV-7's time mixing, the layer."""

from __future__ import annotations

from memjax import tensors
from memjax.in_state.rwkv7 import LEAST_LOG_DECAY, RWKV7
from memjax.memory import Flow, How
from tests.adapters import Arrays, Results, each, expect, given, in_dtype, parameters, value_and_grads


def rwkv7_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, which above the first reads in_v_first."""
    memory = RWKV7(
        dim=cfg["dim"],
        head_dim=cfg["head_dim"],
        value_dim=cfg["heads"] * cfg["head_v_dim"],
        layer=cfg["layer_idx"],
        layers=cfg["layer_idx"] + 1,
        norm_eps=cfg["norm_eps"],
        **{f"{name}_low_rank_dim": cfg[f"{name}_low_rank_dim"] for name in ("decay", "a", "v", "gate")},
    )
    expect("rwkv7_layer", cfg, heads=memory.heads, scale=1.0, decay_factor=LEAST_LOG_DECAY, kk_norm_eps=1e-12)
    expect("rwkv7_layer", cfg, group_norm_eps=memory.head_dim * memory.norm_eps)
    table = memory.tensors()

    def run(a, how):
        state = in_dtype(memory.init_state(len(a["x"])), a["x"].dtype)
        flow = Flow(a["x"], {"v_first": a["v_first"]} if "v_first" in a else {})
        y, state = memory.apply(tensors.read(table, a["params"]), state, flow, how=how)
        return y.x, state

    def compute(implementation: str | None) -> Results:
        inputs = {"params": parameters(arrays), **given(arrays, "x", optional=("v_first",))}
        y, state, grads = value_and_grads(lambda a: run(a, How(implementation)), inputs, **given(arrays, "do"))
        named = {f"param_{name}": g for name, g in grads.pop("params").items()} | grads
        out = {"out_y": y, "out_state": state.S, "out_conv": state.shift[:, 0]}
        return out | {f"grad_{name}": g for name, g in named.items()}

    return each((*memory.implementations, None), compute)


SYSTEMS = {"rwkv7_layer": rwkv7_layer}
