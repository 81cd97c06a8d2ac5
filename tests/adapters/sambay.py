"""The parts of SambaY: gated memory units, differential attention, and Mamba handing on what it has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memjax import tensors
from memjax.in_context.differential_attention import LAMBDAS, DifferentialAttention
from memjax.in_state.mamba import Mamba
from memjax.in_state.sambay import GatedMemoryUnit
from memjax.layers import ring_append
from memjax.memory import Flow, How, Memory, NoState
from tests.adapters import Arrays, Results, each, expect, given, in_dtype, parameters, value_and_grads


def part(memory: Memory, arrays: Arrays, name: str) -> dict[str, Any]:
    """The parameters of one of the parts, which the file calls param_<name>.*"""
    found = {n.removeprefix(f"{name}."): a for n, a in parameters(arrays).items() if n.startswith(f"{name}.")}
    return tensors.read(memory.tensors(), found)


def gated_memory_unit(arrays: Arrays, cfg: Mapping[str, Any], name: str) -> Results:
    expect("sambay", cfg, norm=name == "ngmu", gate_activation="silu")
    norm = {"groups": cfg["n_groups"], "norm_eps": cfg["norm_eps"]} if cfg["norm"] else {}
    memory = GatedMemoryUnit(cfg["dim"], cfg["memory_dim"], cfg["norm"], **norm)
    params = part(memory, arrays, name)

    def run(a):
        return memory.apply(params, NoState(), Flow(a["x"], {"memory": a["mem"]}))[0].x, {}

    y, _, grads = value_and_grads(run, given(arrays, "x", "mem"), *given(arrays, "do").values())
    return {f"out_{name}": y, f"grad_{name}_x": grads["x"], f"grad_{name}_mem": grads["mem"]}


def differential_attention(arrays: Arrays, cfg: Mapping[str, Any]) -> Results:
    left, t = int(arrays["out_da_window_left"]), arrays["in_da_q"].shape[1]
    expect("sambay", cfg, window=None if left < 0 else left + 1)
    memory = DifferentialAttention(
        dim=cfg["heads"] * cfg["head_dim"],
        heads=cfg["heads"],
        kv_heads=cfg["kv_heads"],
        head_dim=cfg["head_dim"],
        window=t if left < 0 else left + 1,
        layer=cfg["depth"],
        rotary=False,
        norm_eps=cfg["norm_eps"],
    )
    expect("sambay", cfg, scale=memory.d**-0.5)
    names = {name: f"da.{name}" for name in LAMBDAS} | {"norm": "da.subln.weight"}

    def run(a):
        state = in_dtype(memory.init_state(len(a["q"])), a["q"].dtype)
        k, v, visible, _ = ring_append(state, a["k"], a["v"])
        return memory.difference({n: a["params"][file] for n, file in names.items()}, a["q"], k, v, visible), {}

    inputs = {name.removeprefix("da_"): a for name, a in given(arrays, "da_q", "da_k", "da_v").items()}
    inputs["params"] = {name: a for name, a in parameters(arrays).items() if name.startswith("da.")}
    o, _, grads = value_and_grads(run, inputs, *given(arrays, "da_do").values())
    of_params = {f"grad_param_{name}": g for name, g in grads.pop("params").items()}
    lambda_init = np.asarray(memory.lambda_init, o.dtype)
    return {"out_da_o": o, "out_da_lambda_init": lambda_init, **of_params} | {
        f"grad_da_{name}": g for name, g in grads.items()
    }


def mamba(arrays: Arrays, cfg: Mapping[str, Any]) -> Results:
    expect("sambay", cfg, conv_bias=True, conv_activation="silu", gmu_save=True)
    sizes = {"state_size": cfg["state_size"], "conv_size": cfg["conv_size"], "expand": cfg["expand"]}
    memory = Mamba(cfg["dim"], **sizes, dt_rank=cfg["dt_rank"], hands_on=True)
    expect("sambay", cfg, inner_dim=memory.inner)
    params = part(memory, arrays, "mamba")

    def compute(implementation: str | None) -> Results:
        def run(a):
            state = in_dtype(memory.init_state(len(a["x"])), a["x"].dtype)
            flow, _ = memory.apply(params, state, Flow(a["x"], {}), how=How(implementation))
            return {"do": flow.x, "mamba_dmem": flow.shared["memory"]}, {}

        out, _, grads = value_and_grads(run, given(arrays, "x"), given(arrays, "do", "mamba_dmem"))
        return {"out_mamba_y": out["do"], "out_mamba_mem": out["mamba_dmem"], "grad_mamba_x": grads["x"]}

    return each((*memory.implementations, None), compute)


def sambay(arrays: Arrays, cfg: dict) -> Results:
    units = [gated_memory_unit(arrays, cfg[name], name) for name in ("gmu", "ngmu")]
    return units[0] | units[1] | differential_attention(arrays, cfg["da"]) | mamba(arrays, cfg["mamba"])


SYSTEMS = {"sambay": sambay}
