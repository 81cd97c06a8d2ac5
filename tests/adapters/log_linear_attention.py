"""Log-linear attention, the op: from no state, as the reference has none."""

from __future__ import annotations

import jax.numpy as jnp

from memjax.in_state.log_linear_attention import LogLinearAttention, level, log_linear_attention
from tests.adapters import Arrays, GoldenError, Results, each, expect, given, value_and_grads

CHUNK = 16  # the files have 37 tokens: chunks are crossed, and the last one is not full


def op(arrays: Arrays, cfg: dict) -> Results:
    expect("log_linear_attention", cfg, gate="scalar_log_decay")
    (b, t, h, e), (*_, g, d), levels = arrays["in_v"].shape, arrays["in_q"].shape, arrays["in_level_scales"].shape[-1]
    if t > 1 << levels - 1:
        raise GoldenError(f"log_linear_attention: {levels} levels, {t} tokens need {(t - 1).bit_length() + 1}")
    inputs = given(arrays, "q", "k", "v", "g", "level_scales")

    def compute(implementation: str | None) -> Results:
        def run(a):
            S, count = jnp.zeros((b, levels - 1, h, d, e), a["v"].dtype), jnp.zeros(b, jnp.int32)
            q, k = (jnp.repeat(x, h // g, 2) for x in (a["q"] * cfg["scale"], a["k"]))
            args, how = (q, k, a["v"], a["g"], a["level_scales"], S, count), {"implementation": implementation}
            return log_linear_attention(*args, chunk_size=CHUNK, **how)[0], None

        o, _, grads = value_and_grads(run, inputs, jnp.asarray(arrays["in_do"]))
        tokens = jnp.arange(t, dtype=jnp.int32)
        found = jnp.tril(level(tokens[:, None], tokens[None]))
        return {"out_o": o, "out_level": found, **{f"grad_{n}": a for n, a in grads.items()}}

    return each((*LogLinearAttention.implementations, None), compute)


SYSTEMS = {"log_linear_attention": op}
