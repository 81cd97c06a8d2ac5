"""Measures which form of each op is fastest on CPUs where no gradient is taken: the table behind implementation=None.

    python -m experiments.measure_forms

Writes pallas_kernels/measured_on_cpu.json, milliseconds of every form by tokens and elements of state. Takes about
eight minutes on a quiet machine with two cores; tests/pallas_kernels/test_dispatch.py reads what it wrote.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

from memjax.bench.cases import CASES, Case, Shape, on_device
from memjax.bench.timing import caller, interleave
from memjax.record import environment

TABLE = Path(__file__).parents[1] / "pallas_kernels" / "measured_on_cpu.json"
FORMS = {  # the name under which an op asks, and the case that stands for it
    "linear_attention": "linear_attention/head",
    "linear_attention without decay": "linear_attention",
    "linear_attention per channel": "linear_attention/channel",
    "delta_rule": "delta_rule/head",
    "delta_rule without decay": "delta_rule",
    "delta_rule per channel": "delta_rule/channel",
    "dplr_delta_rule": "dplr_delta_rule",
    "diagonal_scan": "diagonal_scan/real",
    "short_conv": "short_conv",
}
SHAPES = [
    Shape(1, t, heads, d)
    for t in (32, 128, 512, 2048)
    for heads, d in ((2, 16), (4, 32), (4, 64), (16, 64), (8, 128), (32, 128))
]
REPEATS = 11


def measure(case: Case, shape: Shape) -> dict[str, Any]:
    """Tokens, elements of state, and the median milliseconds of each form."""
    inputs = on_device(case.draw(np.random.default_rng(0), shape), shape.dtype)
    calls = {name: caller("forward", case.bind(name), inputs, None) for name in case.implementations()}
    size = inputs.get("initial_state", inputs.get("cache")).size
    samples = interleave(calls, REPEATS)
    return {
        "t": shape.t,
        "size": size,
        "milliseconds": {name: float(f"{1e3 * np.median(seconds):.3g}") for name, seconds in samples.items()},
    }


def main() -> None:
    if jax.default_backend() != "cpu":
        raise SystemExit("measure_forms: the table is for CPUs; set JAX_PLATFORMS=cpu")
    where = environment()
    found: dict[str, Any] = {
        "measured": {name: where[name] for name in ("cpu", "cores", "python")} | {"jax": where["versions"]["jax"]},
        "forward": {name: [] for name in FORMS},
    }
    for name, shape in track([(name, shape) for name in FORMS for shape in SHAPES], "forms"):
        found["forward"][name].append(measure(CASES[FORMS[name]], shape))
    rows = ",\n".join(
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for name, rows in found["forward"].items()
    )
    partial = TABLE.with_suffix(".partial")
    partial.write_text(f'{{\n "measured": {json.dumps(found["measured"])},\n "forward": {{\n{rows}\n }}\n}}\n')
    os.replace(partial, TABLE)
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
