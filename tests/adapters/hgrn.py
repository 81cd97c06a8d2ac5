"""HGRN and HGRN2, the layers, under the bound that the layers of a model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from memjax.in_state.hgrn import HGRN
from memjax.in_state.hgrn2 import HGRN2
from memjax.memory import Flow, How, Memory
from tests.adapters import Arrays, Results, convolutions, expect, given, layer


@dataclass(frozen=True)
class Bounded(Memory):
    """A layer that finds the stream "lower_bounds" as if layers below had handed it on."""

    memory: HGRN | HGRN2
    lower_bounds: Any

    @property
    def dim(self):
        return self.memory.dim

    @property
    def implementations(self):
        return self.memory.implementations

    def param_specs(self):
        return self.memory.param_specs()

    def state_specs(self, batch):
        return self.memory.state_specs(batch)

    def tensors(self):
        return self.memory.tensors()

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        flow = Flow(x, {"lower_bounds": self.lower_bounds})
        flow, state = self.memory.apply(params, state, flow, valid=valid, start=start, how=how)
        return flow.x, state


def bounded(memory: HGRN | HGRN2, arrays: Arrays) -> Memory:
    """The layer with the file's bound in its row, if it has one."""
    if not memory.layer:
        return memory
    bound = given(arrays, "lower_bound")["lower_bound"]
    return Bounded(memory, jnp.zeros((memory.layers, len(bound)), bound.dtype).at[memory.layer].set(bound))


def place(cfg: dict) -> dict[str, int]:
    """Where the layer stands: alone without a bound, or last of the layers below it and itself."""
    above = cfg["layer_idx"] if cfg["use_lower_bound"] else 0
    return {"layer": above, "layers": above + 1}


def hgrn_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    expect("hgrn_layer", cfg, input_activation="silu", gate_activation="silu", conv_bias=False, conv_activation=None)
    memory = HGRN(
        dim=cfg["dim"],
        expand_ratio=cfg["expand_ratio"],
        **place(cfg),
        use_short_conv=cfg["use_short_conv"],
        conv_size=cfg.get("conv_size", 4),
        norm_eps=cfg["norm_eps"],
    )

    def outputs(state) -> dict[str, jax.Array]:
        return {"out_state": state.h} | (convolutions(state.conv, [memory.d] * 2) if memory.use_short_conv else {})

    return layer(bounded(memory, arrays), arrays, outputs)


def hgrn2_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer of flash-linear-attention, several streams in one convolution."""
    expect("hgrn2_layer", cfg, q_activation="silu", use_gate=False, conv_bias=False, conv_activation=None)
    memory = HGRN2(
        dim=cfg["dim"],
        expand_ratio=cfg["expand_ratio"],
        **place(cfg),
        use_short_conv=cfg["use_short_conv"],
        conv_size=cfg.get("conv_size", 4),
        norm_eps=cfg["norm_eps"],
    )
    k = memory.expand_ratio
    expect("hgrn2_layer", cfg, heads=memory.heads, head_k_dim=k, head_v_dim=k, scale=k**-0.5)

    def outputs(state) -> dict[str, jax.Array]:
        return {"out_state": state.S} | (convolutions(state.conv, [memory.dim] * 3) if memory.use_short_conv else {})

    return layer(bounded(memory, arrays), arrays, outputs)


SYSTEMS = {"hgrn_layer": hgrn_layer, "hgrn2_layer": hgrn2_layer}
