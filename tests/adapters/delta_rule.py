"""The delta rules as ops: DeltaNet, Gated DeltaNet, KDA, Gated DeltaNet-2, Gated DeltaProduct and RWKV-7."""

from __future__ import annotations

from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule
from pallas_kernels.dplr_delta_rule import IMPLEMENTATIONS as DPLR_IMPLEMENTATIONS
from pallas_kernels.dplr_delta_rule import dplr_delta_rule
from tests.adapters import Arrays, Results, expect, given, recurrence

CHUNK = 16  # the files have 37 tokens: chunks are crossed, and the last one is not full


def gated_or_not(arrays: Arrays, cfg: dict) -> Results:
    """With beta, or with the gates b (erase) and w (write) in its place; with decay g per head, per channel or none."""
    expect("delta_rule", cfg, qk_l2norm=False)
    inputs = given(arrays, "q", "k", "v", "h0", optional=("beta", "g", "b", "w"))

    def call(a, implementation):
        return delta_rule(
            a["q"] * cfg["scale"],
            a["k"],
            a["v"],
            a.get("beta"),
            a.get("g"),
            erase=a.get("b"),
            write=a.get("w"),
            num_householder=cfg.get("num_householder", 1),
            initial_state=a["h0"],
            chunk_size=CHUNK,
            implementation=implementation,
        )

    return recurrence(IMPLEMENTATIONS, call, inputs, arrays)


def rwkv7(arrays: Arrays, cfg: dict) -> Results:
    """The readout is called r, the log decay w."""

    def call(x, implementation):
        return dplr_delta_rule(
            x["r"] * cfg["scale"],
            x["k"],
            x["v"],
            x["a"],
            x["b"],
            x["w"],
            initial_state=x["h0"],
            chunk_size=CHUNK,
            implementation=implementation,
        )

    inputs = given(arrays, "r", "k", "v", "a", "b", "w", "h0")
    return recurrence(DPLR_IMPLEMENTATIONS, call, inputs, arrays)


SYSTEMS = {
    "delta_net": gated_or_not,
    "gated_delta_net": gated_or_not,
    "kda": gated_or_not,
    "gdn2": gated_or_not,
    "gated_deltaproduct": gated_or_not,
    "rwkv7": rwkv7,
}
