"""MoM over Gated DeltaNet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from memjax import tensors
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_state.mom import MoM
from memjax.memory import How
from memjax.tensors import Tensor, matrix
from tests.adapters import Arrays, Results, each, expect, given, in_dtype, parameters, value_and_grads


def table(memory: MoM) -> dict[str, Tensor]:
    """Where flash-linear-attention keeps the parameters: those of memory e have its number in their name."""
    inner = memory.memory.tensors()
    own = {} if memory.single_kv_proj else {name: inner.pop(name).parts[0][0] for name in memory.memory.own}
    found = {"router": matrix("gate.weight")} | {f"common {name}": tensor for name, tensor in inner.items()}
    for name, file in own.items():
        for e in range(memory.num_memories):
            found[f"memories {name} {e}"] = matrix(file.replace(".", f".{e}."))
        if memory.shared_memory:
            found[f"shared {name}"] = matrix("shared_" + file.replace("_proj", ""))
    return found


def nested(memory: MoM, flat: dict[str, Any]) -> dict[str, Any]:
    """The parameters of `memory` from those of its table."""
    specs = memory.param_specs()
    stacked = {
        name: jnp.stack([flat[f"memories {name} {e}"] for e in range(memory.num_memories)])
        for name in specs["memories"]
    }
    common, shared = ({n: flat[f"{part} {n}"] for n in specs.get(part, {})} for part in ("common", "shared"))
    return {
        "router": flat["router"],
        "memories": stacked,
        "common": common,
        **({"shared": shared} if memory.shared_memory else {}),
    }


def mom(arrays: Arrays, cfg: dict) -> Results:
    fixed = {"use_short_conv": True, "conv_bias": False, "conv_activation": "silu", "conv_streams": ["q", "k", "v"]}
    expect("mom", cfg, **fixed, memory="gated_delta_net", renormalize=True, conv_across_segments=False)
    expect("mom", cfg, qk_norm="l2", l2_eps=1e-6, gate_activation="silu")
    inner = GatedDeltaNet(
        dim=cfg["dim"],
        heads=cfg["heads"],
        head_dim=cfg["head_dim"],
        expand_v=float(cfg["expand_v"]),
        conv_size=cfg["conv_size"],
        allow_neg_eigval=cfg["allow_neg_eigval"],
        use_gate=cfg["use_gate"],
        norm_eps=cfg["norm_eps"],
    )
    expect("mom", cfg, head_v_dim=inner.v, scale=inner.head_dim**-0.5)
    memory = MoM(inner, cfg["num_memories"], cfg["top_k"], cfg["shared_memory"], cfg["single_kv_proj"])

    def run(a, how):
        params = nested(memory, tensors.read(table(memory), a["params"]))
        state = in_dtype(memory.init_state(len(a["x"])), a["x"].dtype)
        y, state, aux = memory.apply_with_aux(params, state, a["x"], how=how)
        return {"y": y, "loss": aux["load_balance"]}, (state, memory.route(params, a["x"]))

    def compute(implementation: str | None) -> Results:
        inputs = {"params": parameters(arrays), **given(arrays, "x")}
        (do,) = given(arrays, "do").values()
        run_here = lambda a: run(a, How(implementation))  # noqa: E731
        out, (state, route), grads = value_and_grads(run_here, inputs, {"y": do, "loss": jnp.zeros((), do.dtype)})
        balance = {"y": jnp.zeros_like(do), "loss": jnp.ones((), do.dtype)}
        of_loss = value_and_grads(run_here, inputs, balance)[2]["params"]
        return {
            "out_y": out["y"],
            "out_router_logits": route.logits,
            "out_topk_index": route.index,
            "out_topk_weight": route.weight,
            "out_mem_state": state.memories.S,
            **({"out_shared_state": state.shared.S} if memory.shared_memory else {}),
            "out_token_count": jax.nn.one_hot(route.index, memory.num_memories, dtype=jnp.int32).sum((1, 2)),
            "out_aux_loss": out["loss"],
            "grad_x": grads["x"],
            **{f"grad_param_{name}": g for name, g in grads["params"].items()},
            "grad_aux_gate.weight": of_loss["gate.weight"],
        }

    return each((*memory.implementations, None), compute)


SYSTEMS = {"mom": mom}
