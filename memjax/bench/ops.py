"""Checks and times the ops of pallas_kernels; what `memjax bench ops` prints and records comes from here.

    errors    every implementation against the token recurrence in float64, outputs and gradients
    times     forward, forward with residuals, forward and backward, one decode step, beside peers, taken in turns;
              and the memory that the compiler plans for forward and backward
    scaling   time while t doubles

Each part is a generator of rows, dicts ready for JSON; it yields one list of rows a unit of work. Inputs come from a
seed for each case and shape.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any, NamedTuple

import jax
import numpy as np

from memjax.bench import peers
from memjax.bench.cases import CHECKED, CHUNK, CONTENTS, GATES, SCALED, STATES, Case, Shape, masks, on_device
from memjax.bench.timing import MODES, caller, compiled, interleave, summary

REFERENCE, DEFAULT = "reference", "default"
KEPT_BYTES = 8e9  # the most that states of all tokens may take, kept by a gradient of the plain scan

# Relative to the norm. Hard outputs leave room for kernels that sum logs of strong gates; ours so far multiply factors.
_FLOAT32 = {"outputs": 1e-5, "inputs": 5e-5, "gates": 2e-4, "state": 5e-5}
_BFLOAT16 = {"outputs": 5e-3, "inputs": 8e-3, "gates": 2e-2, "state": 8e-3}
ALLOWED = {
    "usual": {"float32": _FLOAT32, "bfloat16": _BFLOAT16},
    "hard": {"float32": _FLOAT32 | {"outputs": 1e-4}, "bfloat16": _BFLOAT16},
    "alike": {"float32": {"outputs": 1e-5, "inputs": 2e-5, "gates": 2e-5, "state": 2e-5}, "bfloat16": _BFLOAT16},
}
"""By contents, dtype and group: outputs (o and final state), and the gradients of inputs, gates and initial state."""


class Plan(NamedTuple):
    """What is measured, beside which peers.

    hasty: only to see that all runs; nothing is optimised, and the default alone is timed. peers: lax.associative_scan
    is timed, and flash-linear-attention where `fla` is its process.
    """

    cases: tuple[Case, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    checked: Shape = CHECKED
    scaled: tuple[Shape, ...] = tuple(SCALED)
    repeats: int = 20
    hasty: bool = False
    peers: bool = True
    fla: peers.Fla | None = None


Row = dict[str, Any]


def errors(plan: Plan) -> Iterator[list[Row]]:
    """A list for each case and dtype."""
    for case in plan.cases:
        for dtype in plan.dtypes:
            yield _errors_of(case, plan.checked._replace(dtype=dtype), plan.hasty)


def times(plan: Plan) -> Iterator[list[Row]]:
    """A list for each shape and case.

    A peer has a row with its "error"; one that differs is not timed, nor one that has "refused" the shape, or to go on.
    Rows of "both" have "memory", in bytes: peak, inputs, outputs, and what one state a chunk would take.
    """
    for shape in plan.shapes:
        for case in plan.cases:
            yield _times_of(case, shape, plan)


def scaling(plan: Plan) -> Iterator[list[Row]]:
    """A list for each case: the op as it comes, "forward" and "both", at every length."""
    for case in plan.cases:
        calls, shapes = {}, {}
        for shape in plan.scaled:
            shapes[shape.t] = shape = shape._replace(h=shape.h * case.widen)
            inputs = _without_state(case.draw(_rng(case, shape), shape), shape)
            cotangents = _cotangents(case, inputs, shape)
            for mode in ("both",) if plan.hasty else ("forward", "both"):
                calls[mode, shape.t] = caller(mode, case.bind(None), inputs, cotangents, plan.hasty)
        found = {key: summary(s) for key, s in interleave(calls, plan.repeats).items()}
        rows = []
        for (mode, t), seconds in found.items():
            half = found.get((mode, t // 2))
            ratio = seconds["median"] / half["median"] if half else None
            rows.append({
                "case": case.name, "shape": shapes[t]._asdict(), "mode": mode, "t": t, "ratio": ratio, **seconds,
            })  # fmt: skip
        yield rows


PARTS: dict[str, Callable[[Plan], Iterator[list[Row]]]] = {
    "errors": errors,
    "times": times,
    "scaling": scaling,
}


def units(part: str, plan: Plan) -> int:
    """How many lists of rows a part yields."""
    shapes = {"errors": len(plan.dtypes), "scaling": 1}.get(part, len(plan.shapes))
    return len(plan.cases) * shapes


def allowed(row: Row) -> float:
    """The error that a row of `errors` may have."""
    return ALLOWED[row["contents"]][row["dtype"]][row["group"]]


def too_large(rows: list[Row]) -> list[Row]:
    """The rows of `errors` that are above what is allowed."""
    return [row for row in rows if not row["error"] <= allowed(row)]


def _errors_of(case: Case, shape: Shape, hasty: bool) -> list[Row]:
    forms = {name: op for name, op in _forms(case).items() if name != REFERENCE or not hasty}
    programs = {name: compiled("both", op, hasty) for name, op in forms.items()}
    exact = compiled("both", case.bind(REFERENCE), hasty=True)
    rows = []
    for contents in CONTENTS:
        rng = _rng(case, shape)
        drawn, masked = case.draw(rng, shape, contents), masks(rng, shape, contents)
        inputs = on_device(drawn, shape.dtype)
        cotangents = _cotangents(case, inputs, shape)
        with jax.enable_x64(True), jax.default_device(_host()):
            wide = jax.tree.map(lambda a: np.asarray(a, np.float64), cotangents)
            want = _run(exact, on_device(drawn, "float64"), masked, wide)
        for name, run in programs.items():
            got = _run(run, inputs, masked, cotangents)
            worst: dict[str, tuple[float, str]] = {}
            for array, ref in want.items():
                found = (peers.error(got[array], ref), array)
                worst[_group(array)] = max(found, worst.get(_group(array), (-1.0, "")))
            for group, (error, array) in worst.items():
                rows.append({
                    "case": case.name, "who": name, "dtype": shape.dtype, "contents": contents,
                    "group": group, "error": error, "worst": array,
                })  # fmt: skip
    return rows


def _times_of(case: Case, shape: Shape, plan: Plan) -> list[Row]:
    drawn = case.draw(_rng(case, shape), shape)
    inputs = _without_state(drawn, shape)
    cotangents = _cotangents(case, inputs, shape)
    one = on_device(case.draw(_rng(case, shape), shape._replace(t=1)), shape.dtype)
    about = {"case": case.name, "shape": shape._asdict()}
    rows: list[Row] = []
    ours = {name: op for name, op in _forms(case).items() if name == DEFAULT or not plan.hasty}
    who, peer = _peer_of(case, shape, plan, inputs, cotangents)
    if peer:
        want = peers.results(*compiled("both", ours[DEFAULT], plan.hasty)(inputs, cotangents))
        try:
            got = peer("results")
            apart = max(peers.error(got[name], ref) for name, ref in want.items())
            rows.append(about | {"who": who, "error": apart})
            peer = peer if apart <= peers.TOLERANCE else None
        except peers.PeerError as refusal:
            rows.append(about | {"who": who, "refused": str(refusal)})
            peer = None
    for mode in MODES:
        calls, needs = {}, {}
        for name, op in ours.items():
            if name != REFERENCE or mode in ("forward", "decode") or _fits(case, shape):
                calls[name] = caller(mode, op, one if mode == "decode" else inputs, cotangents, plan.hasty)
                if mode == "both":
                    needs[name] = _memory_of(case, shape, op, inputs, cotangents, plan.hasty)
        if peer and mode != "decode":
            calls[who] = peer(mode)
        try:
            taken = interleave(calls, plan.repeats)
        except peers.PeerError as refusal:
            rows.append(about | {"who": who, "refused": str(refusal)})
            peer = None
            del calls[who]
            taken = interleave(calls, plan.repeats)
        for name, samples in taken.items():
            memory = {"memory": needs[name]} if name in needs else {}
            rows.append(about | {"mode": mode, "who": name, **memory, **summary(samples)})
    return rows


def uses_fla(case: Case, shape: Shape) -> bool:
    """Whether flash-linear-attention has the case and can run this shape: its chunk forms under PyTorch, on CPUs."""
    named = case.peer not in (None, "associative_scan")
    return named and shape.dtype == "float32" and jax.default_backend() == "cpu"


def _peer_of(case: Case, shape: Shape, plan: Plan, inputs: Any, cotangents: Any) -> tuple[str, Any]:
    """The name of the peer, and a function that makes its "results" or, of a mode, its call; None: there is none."""
    if plan.peers and case.peer == "associative_scan":
        op = peers.associative_scan

        def ours(what: str) -> Any:
            if what != "results":
                return caller(what, op, inputs, cotangents, plan.hasty)
            return peers.results(*compiled("both", op, plan.hasty)(inputs, cotangents))

        return case.peer, ours
    fla, name = plan.fla, case.peer
    if name is None or fla is None or fla.gone or not uses_fla(case, shape):
        return "", None

    def theirs(what: str) -> Any:
        return fla.prepare(name, inputs, cotangents) if what == "results" else functools.partial(fla.run, what)

    return f"fla {name}", theirs


def _memory_of(case: Case, shape: Shape, op: Callable[..., Any], inputs: Any, cotangents: Any, hasty: bool) -> Row:
    found = compiled("both", op, hasty).lower(inputs, cotangents).compile().memory_analysis()
    given, made = found.argument_size_in_bytes, found.output_size_in_bytes
    peak = given + made + found.temp_size_in_bytes - found.alias_size_in_bytes
    chunk_states = _state_bytes(case, shape) * ceil(shape.t / CHUNK)
    return {"peak": peak, "inputs": given, "outputs": made, "chunk_states": chunk_states}


def _forms(case: Case) -> dict[str, Callable[..., Any]]:
    """The implementations by name, and what the op takes by itself."""
    return {name: case.bind(name) for name in case.implementations()} | {DEFAULT: case.bind(None)}


def _rng(case: Case, shape: Shape) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{case.name} {shape}".encode()))


def _without_state(drawn: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """As a training step begins, and as every peer can: without an initial state, where the op needs none."""
    return on_device({name: x for name, x in drawn.items() if name != "initial_state"}, shape.dtype)


def _cotangents(case: Case, inputs: Mapping[str, Any], shape: Shape) -> Any:
    outputs = jax.eval_shape(case.bind(None), **inputs)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jax.numpy.asarray(rng.standard_normal(a.shape), a.dtype), outputs)


def _run(run: Callable[..., Any], inputs: Mapping[str, Any], masked: Mapping[str, Any], cotangents: Any) -> Row:
    return jax.tree.map(np.asarray, peers.results(*run(inputs, cotangents, masked)))


def _host() -> Any:
    """The CPU, which has float64; None, the default device, where jax was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _group(array: str) -> str:
    name = array.removeprefix("d ")
    return "outputs" if name == array else "state" if name in STATES else "gates" if name in GATES else "inputs"


def _fits(case: Case, shape: Shape) -> bool:
    """Whether the gradient of the plain scan, which keeps the state of every token, has room."""
    return _state_bytes(case, shape) * shape.t <= KEPT_BYTES


def _state_bytes(case: Case, shape: Shape) -> int:
    drawn = on_device(case.draw(_rng(case, shape), shape._replace(t=1)), shape.dtype)
    return sum(a.nbytes for name in STATES if name in drawn for a in jax.tree.leaves(drawn[name]))
