"""Programs of an op, and how they are timed.

Contestants take turns, and every turn begins with the next of them, A-B-C-B-C-A, so that whatever else the machine does
meets all of them alike, and so does what the one before has left behind. On CPUs a sample is one call, milliseconds
long. On accelerators a call is shorter than the host needs to start it: there a sample is a loop of calls inside one
program, whose inputs pass an optimization barrier together with the results of the call before, so that no call can be
left out, hoisted or overlapped. A decode step is short everywhere: a sample is a chain of calls, each of which takes
over the state of the one before, and the cost of calling is in it.

The C library gives large arrays back to the system as soon as they are freed, and the next call then pays for every
page anew: up to most of the time of an op that only passes through its arrays, and differently at every size. A
benchmark on CPUs begins with keep_memory(), and the peers' process with KEEP_MEMORY.
"""

from __future__ import annotations

import ctypes
import functools
import random
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import lax

from pallas_kernels.compat import QUICK_COMPILE

MODES = ("forward", "residuals", "both", "decode")
"""forward: outputs. residuals: outputs and what the backward needs. both: outputs and all gradients. decode: a step."""

WARM_UP = 2
SAMPLE_SECONDS = 0.02  # of a loop or a chain
PAUSE_SECONDS = 0.002  # before a sample, so that the threads of the contestant before have gone to sleep

# The environment variables, and the numbers by which mallopt of glibc knows them.
_MALLOC = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, -1), "MALLOC_ARENA_MAX": (-8, 1)}
KEEP_MEMORY = {name: str(value % 2**64) for name, (_, value) in _MALLOC.items()}
"""The environment of a process whose C library keeps freed memory, as keep_memory() has it."""

Call = Callable[[], float]
"""Runs once and returns the seconds that one call of the op took."""


def keep_memory() -> bool:
    """Has this process keep the memory of freed arrays for later ones; False where the C library can't be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(number, value) for number, value in _MALLOC.values())


def program(mode: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """The function (inputs by name, cotangents like the outputs of op, masks by name) that `mode` names."""

    def run(inputs: Mapping[str, Any], cotangents: Any, masks: Mapping[str, Any] = MappingProxyType({})) -> Any:
        if mode == "forward":
            return op(**inputs, **masks)
        outputs, vjp = jax.vjp(lambda inputs: op(**inputs, **masks), inputs)
        return (outputs, vjp) if mode == "residuals" else (outputs, vjp(cotangents)[0])

    return run


@functools.lru_cache(maxsize=16)
def compiled(mode: str, op: Callable[..., Any], hasty: bool = False) -> Any:
    """The program as jax.jit has it; hasty leaves out what makes it fast."""
    return jax.jit(program(mode, op), compiler_options=_options(hasty))


def caller(mode: str, op: Callable[..., Any], inputs: Mapping[str, Any], cotangents: Any, hasty: bool = False) -> Call:
    """Compiles a program of t tokens, or the step of "decode", for these inputs."""
    if mode == "decode":
        return _chained(op, inputs, hasty)
    if jax.default_backend() != "cpu":
        return _looped(program(mode, op), inputs, cotangents)
    run = compiled(mode, op, hasty)

    def call() -> float:
        began = time.perf_counter()
        kept = jax.block_until_ready(run(inputs, cotangents))
        seconds = time.perf_counter() - began
        del kept  # freed after the clock has stopped
        return seconds

    call()
    return call


def interleave(calls: Mapping[Any, Call], repeats: int) -> dict[Any, list[float]]:
    """`repeats` samples of each, in seconds, taken in turns after WARM_UP rounds that don't count.

    The order of each turn is drawn anew, the same in every run: what a call leaves in the caches would otherwise always
    be a burden to the same neighbour.
    """
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(0)
    for turn in range(-WARM_UP, repeats):
        for name in order:
            time.sleep(PAUSE_SECONDS)
            seconds = calls[name]()
            if turn >= 0:
                samples[name].append(seconds)
        rng.shuffle(order)
    return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile and the samples themselves, in seconds."""
    p20, median, p80 = np.percentile(samples, (20, 50, 80)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "samples": [float(f"{s:.6g}") for s in samples]}


def _options(hasty: bool) -> dict[str, Any] | None:
    return QUICK_COMPILE if hasty and jax.default_backend() == "cpu" else None


def _enough(one: Callable[[int], float]) -> int:
    """How many calls make a sample of SAMPLE_SECONDS, if one(n) takes the seconds of n calls."""
    one(4)  # compiles
    return max(1, min(10_000, round(SAMPLE_SECONDS / max(one(4) / 4, 1e-6))))


def _looped(run: Callable[..., Any], inputs: Mapping[str, Any], cotangents: Any) -> Call:
    def turn(_: Any, carry: Any) -> Any:
        now, _ = lax.optimization_barrier(carry)
        return now, jax.tree.leaves(run(*now))

    # A number of turns that the compiler knows spares an accelerator asking the host, or itself, whether to go on.
    @functools.partial(jax.jit, static_argnums=0)
    def loop(n: int, inputs: Any, cotangents: Any) -> Any:
        now = inputs, cotangents
        return lax.fori_loop(1, n, turn, (now, jax.tree.leaves(run(*now))))[1]

    def seconds(n: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop(n, inputs, cotangents))
        return time.perf_counter() - began

    n = _enough(seconds)
    seconds(n)  # compiles
    return lambda: seconds(n) / n


def _chained(op: Callable[..., Any], inputs: Mapping[str, Any], hasty: bool) -> Call:
    name = "cache" if "cache" in inputs else "initial_state"
    rest = {other: x for other, x in inputs.items() if other != name}
    step = jax.jit(lambda state, rest: op(**rest, **{name: state}), donate_argnums=0, compiler_options=_options(hasty))

    def seconds(n: int) -> float:
        state = jax.tree.map(lambda a: a.copy(), inputs[name])  # a step takes its memory away
        began = time.perf_counter()
        for _ in range(n):
            o, state = step(state, rest)
        jax.block_until_ready((o, state))
        return time.perf_counter() - began

    n = _enough(seconds)
    return lambda: seconds(n) / n
