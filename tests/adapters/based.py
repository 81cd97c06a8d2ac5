"""Based: the layer, its attention as an op, and the sliding window beside it."""

from __future__ import annotations

import jax.numpy as jnp

from memjax.in_state.based import Based
from memjax.layers import Ring, attention, heads, linear, ring_append
from memjax.tensors import read
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.taylor_attention import IMPLEMENTATIONS, taylor_attention, taylor_features
from tests.adapters import Arrays, Results, each, expect, given, in_dtype, layer, parameters, value_and_grads

CHUNK = 16  # the files have 33 tokens: chunks are crossed, and the last one is not full


def based(arrays: Arrays, cfg: dict) -> Results:
    return attention_layer(arrays, cfg["layer"]) | op(arrays, cfg["op"]) | window(arrays, cfg["swa"])


def attention_layer(arrays: Arrays, cfg: dict) -> Results:
    """The layer, and the features of the key of the first token."""
    memory = Based(
        dim=cfg["dim"],
        heads=cfg["heads"],
        feature_dim=cfg["feature_dim"],
        head_v_dim=cfg["head_v_dim"],
        compressed=cfg["compressed"],
        eps=cfg["eps"],
    )
    expect("based", cfg, feature_map="taylor", feature_count=memory.state_specs(1).S.shape[2])
    k = linear(given(arrays, "x")["x"][:, 0], read(memory.tensors(), parameters(arrays))["w_k"])
    phi = taylor_features(heads(k, memory.heads), memory.compressed)
    return layer(memory, arrays, sums) | {"out_phi_k0": phi}


def sums(state) -> Results:
    """S and z, which stand side by side in the state."""
    return {"out_kv_state": state.S[..., :-1], "out_k_state": state.S[..., -1]}


def op(arrays: Arrays, cfg: dict) -> Results:
    """Normalised, by either set of features; and not, as the linear attention of the features."""
    expect("based", cfg, feature_map="taylor", normalize=True)
    inputs = given(arrays, "q", "k", "v")
    scale = cfg["scale"] * cfg["feature_dim"] ** 0.5  # beside our own

    def compute(label: str | None) -> Results:
        compressed, name = label == "compressed", None if label == "compressed" else label
        settings = {"eps": cfg["eps"], "compressed": compressed, "chunk_size": CHUNK, "implementation": name}
        run = lambda a: (taylor_attention(a["q"] * scale, a["k"], a["v"], **settings)[0], {})  # noqa: E731
        o, _, grads = value_and_grads(run, inputs, jnp.asarray(arrays["in_op_do"]))
        phi_q, phi_k = (taylor_features(a, compressed) for a in (inputs["q"] * scale, inputs["k"]))
        plain, _ = linear_attention(phi_q, phi_k, inputs["v"], chunk_size=CHUNK, implementation=name)
        return {"out_op_o": o, "out_op_o_unnormalised": plain, **{f"grad_{name}": g for name, g in grads.items()}}

    return each((*IMPLEMENTATIONS, "compressed", None), compute)


def window(arrays: Arrays, cfg: dict) -> Results:
    """Attention over a ring of the tokens that the window sees, the current one included."""
    qkv = given(arrays, "swa_q", "swa_k", "swa_v")
    q, k, v = qkv["swa_q"], qkv["swa_k"], qkv["swa_v"]
    expect("based", cfg, window_keys=cfg["window_left"] + 1, heads=q.shape[2], head_dim=q.shape[3])
    rows = Ring.specs(len(q), cfg["window_keys"], cfg["heads"], cfg["head_dim"])
    empty = Ring(*(jnp.zeros(slot.shape, slot.dtype) for slot in rows))
    k, v, visible, _ = ring_append(in_dtype(empty, q.dtype), k, v)
    return {"out_swa_o": attention(q, k, v, visible, cfg["scale"])}


SYSTEMS = {"based": based}
