"""The diagonal scan as an op: HGRN's recurrence."""

from __future__ import annotations

from pallas_kernels.diagonal_scan import IMPLEMENTATIONS, diagonal_scan
from tests.adapters import Arrays, Results, expect, given, recurrence


def hgrn(arrays: Arrays, cfg: dict) -> Results:
    expect("hgrn", cfg, gate="vector_log_decay", input_already_gated=True)

    def call(a, implementation):
        return diagonal_scan(a["x"], a["g"], initial_state=a["h0"], implementation=implementation)

    return recurrence(IMPLEMENTATIONS, call, given(arrays, "x", "g", "h0"), arrays)


SYSTEMS = {"hgrn": hgrn}
