"""STEM."""

from __future__ import annotations

from memjax.in_weights.stem import STEM
from tests.adapters import Arrays, Results, expect, given, parameters, value_and_grads


def layer(arrays: Arrays, cfg: dict) -> Results:
    """out_y and the gradients of sum(y cotangent). The weights of the file are [out, in]."""
    expect("stem", cfg, activation="silu", residual=False, input_norm=False)
    memory = STEM(dim=cfg["dim"], vocab=cfg["vocab_size"], hidden=cfg["ffn_dim"])
    inputs = given(arrays, "x", "ids", "cotangent")

    def run(a):
        params = {"table": a["table"], "w_gate": a["w_gate"].T, "w_down": a["w_down"].T}
        return memory.apply(params, memory.init_state(a["x"].shape[0]), a["x"], ids=inputs["ids"])[0], {}

    y, _, grads = value_and_grads(run, {"x": inputs["x"], **parameters(arrays)}, inputs["cotangent"])
    return {"out_y": y} | {f"grad_{n}": g for n, g in grads.items()}


SYSTEMS = {"stem": layer}
