"""RecurrentGemma: the RG-LRU, real and complex, its recurrent block, and its local attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memjax import tensors
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.recurrentgemma_lru import RecurrentGemmaLRU
from memjax.memory import How
from memjax.tensors import same
from tests.adapters import Arrays, Results, each, expect, given, in_dtype, value_and_grads

GATES = {"w_a": "a_gate_w", "b_a": "a_gate_b", "w_i": "input_gate_w", "b_i": "input_gate_b", "a_param": "a_param"}
KERNELS = {"x": "linear_x", "y": "linear_y", "o": "linear_out"}


def recurrentgemma_lru(arrays: Arrays, cfg: dict) -> Results:
    """All four; a document begins where in_segment_pos is 0."""
    everything = (*RecurrentGemmaLRU.implementations, None)
    attention = local_attention(arrays, cfg["localattn"])
    return each(everything, lambda name: lru(arrays, cfg, name) | block(arrays, cfg["block"], name)) | attention


def of_settings(cfg: dict) -> RecurrentGemmaLRU:
    expect("recurrentgemma_lru", cfg, max_sqrt_gradient=1000.0, reset_on_segment_start=True)
    only_real = cfg.get("only_real", True)
    return RecurrentGemmaLRU(dim=cfg["width"], heads=cfg["heads"], c=float(cfg["c"]), only_real=only_real)


def lru(arrays: Arrays, cfg: dict, implementation: str | None) -> Results:
    """The recurrence alone: from zeros, from in_h0 with gradients, and of complex numbers."""
    fresh, continued = (jnp.asarray(arrays[f"in_segment_pos{s}"]) == 0 for s in ("", "_cont"))

    def run(a, memory, names, start):
        table = {ours: same(theirs) for ours, theirs in names.items()}
        params = tensors.read(table, a)
        y, h = memory.rg_lru(params, a["x"], a["h0"], start, start=start, how=How(implementation))
        return {"y": y, "h": h}, {}

    inputs = given(arrays, "x", "h0")
    cotangents = {"y": jnp.asarray(arrays["in_cotangent"]), "h": jnp.asarray(arrays["in_cotangent_state"])}
    real, imaginary = of_settings(cfg["lru"]), of_settings(cfg["complex"])
    results = {}
    for label, memory, names, kept, start in (
        ("{}", real, GATES, 0, fresh),
        ("{}_h0", real, GATES, 1, continued),
        ("complex_{}", imaginary, GATES | {"a_imag": "a_imag_param"}, 0, fresh),
    ):
        prefix = "complex_" if memory is imaginary else ""
        a = {n: jnp.asarray(arrays[f"param_{prefix}{n}"]) for n in names.values()}
        a |= inputs | {"h0": kept * inputs["h0"]}
        of = lambda a, memory=memory, names=names, start=start: run(a, memory, names, start)  # noqa: E731
        out, _, grads = value_and_grads(of, a, cotangents)
        results |= {f"out_{label.format(n)}": value for n, value in out.items()}
        if kept:
            results |= {f"grad_h0case_{n if n in inputs else f'param_{n}'}": g for n, g in grads.items()}
    return results


def block(arrays: Arrays, cfg: dict, implementation: str | None) -> Results:
    """The recurrent block over in_x, then one token more."""
    expect("recurrentgemma_lru", cfg, conv_activation=None, activation="gelu_tanh")
    memory = RecurrentGemmaLRU(
        dim=cfg["width"],
        heads=cfg["heads"],
        lru_width=cfg["lru_width"],
        conv_size=cfg["conv_size"],
        c=float(cfg["c"]),
    )
    table = {ours: same(f"rg_lru_{theirs}") for ours, theirs in GATES.items()}
    table |= {f"w_{ours}": same(f"{theirs}_kernel") for ours, theirs in KERNELS.items()}
    table |= {f"b_{ours}": same(f"{theirs}_bias") for ours, theirs in KERNELS.items()}
    table |= {"conv": same("conv_1d_w"), "conv_bias": same("conv_1d_b")}
    params = tensors.read(table, {n.removeprefix("param_block_"): a for n, a in arrays.items()})
    start = jnp.asarray(arrays["in_segment_pos"]) == 0

    @jax.jit
    def run(x, more):
        state = in_dtype(memory.init_state(len(x)), x.dtype)
        y, state = memory.apply(params, state, x, start=start, how=How(implementation))
        return (y, state), memory.apply(params, state, more, how=How(implementation))

    x, more = (jnp.asarray(arrays[name]) for name in ("in_x", "in_block_x_next"))
    return {
        f"out_block_{name}{suffix}": a
        for suffix, (y, state) in zip(("", "_next"), run(x, more), strict=True)
        for name, a in (("y", y), ("rg_lru_state", state.h), ("conv1d_state", state.conv))
    }


def local_attention(arrays: Arrays, cfg: dict) -> Results:
    """Its window of w tokens sees w + 1 keys."""
    expect("recurrentgemma_lru", cfg, window_keys=cfg["window_size"] + 1)
    memory = SlidingWindowAttention(
        dim=cfg["dim"],
        heads=cfg["heads"],
        kv_heads=cfg["kv_heads"],
        head_dim=cfg["head_dim"],
        window=cfg["window_keys"],
        theta=cfg["rope_theta"],
        rotary_share=cfg["rope_fraction"],
        output_bias=True,
    )
    names = {"w_q": "q_kernel", "w_k": "k_kernel", "w_v": "v_kernel", "w_o": "final_kernel", "b_o": "final_bias"}
    params = {ours: jnp.asarray(arrays[f"param_localattn_proj_{theirs}"]) for ours, theirs in names.items()}
    x, start = jnp.asarray(arrays["in_x"]), jnp.asarray(arrays["in_segment_pos"]) == 0
    state = in_dtype(memory.init_state(len(x)), x.dtype)
    y, _ = jax.jit(memory.apply)(params, state, x, start=start)
    return {"out_localattn_y": y}


SYSTEMS = {"recurrentgemma_lru": recurrentgemma_lru}
