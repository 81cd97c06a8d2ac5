"""The cases of `memjax bench ops`: an entry is one form of an op, with the inputs it is run on.

    CASES["delta_rule/head"].draw(numpy.random.default_rng(0), Shape(1, 4096, 4, 64))

Every input is differentiated. Those in GATES and the state stay float32 where the others are bfloat16, as in a model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

CHUNK = 64  # the ops' default
Contents = Literal["usual", "hard", "alike"]
CONTENTS: tuple[Contents, ...] = ("usual", "hard", "alike")
GATES = ("log_decay", "phase", "beta", "erase", "write")
STATES = ("initial_state", "cache")


class Shape(NamedTuple):
    """b rows of t tokens, h heads, keys and values of d; ops without heads see h * d channels."""

    b: int
    t: int
    h: int
    d: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"b={self.b} t={self.t} h={self.h} d={self.d} {self.dtype}"


SHAPES = {
    "quick": [Shape(1, 256, 2, 32)],
    # 3 chunks, and heads and channels that are no powers of two; no rest, which peers refuse
    "tests": [Shape(2, 3 * CHUNK, 3, 24)],
    "cpu": [Shape(1, 4096, 4, 64)],
    # benchmarks/ops/registry.py of flash-linear-attention, so that figures can be set side by side
    "fla": [
        Shape(b, t, h, d, "bfloat16")
        for b, t, h, d in (
            (1, 8192, 96, 128),
            (2, 16384, 16, 128),
            (4, 2048, 16, 128),
            (4, 4096, 64, 128),
            (8, 2048, 32, 256),
            (8, 1024, 8, 64),
        )
    ],
}
CHECKED = Shape(2, 3 * CHUNK + 7, 3, 24)
SCALED = [Shape(1, t << 10, 4, 64) for t in (4, 8, 16, 32, 64)]


class Draw:
    """Random inputs of one shape.

    contents: "hard" and "alike" are what breaks chunked forms. hard: keys with a cosine of 0.9 between any two; gates
    of 0, of -20 and mild ones mixed inside a chunk; rates of 0 and 1 (2 where the rule allows that); a state 100 times
    as large. alike: such keys too, with hardly a decay and the largest rate for every token, so that nothing in a chunk
    parts its tokens; the inverse of a chunk's matrix is as ill-conditioned as it gets.
    """

    def __init__(self, rng: np.random.Generator, shape: Shape, contents: Contents):
        self.rng, self.contents = rng, contents
        self.b, self.t, self.h, self.d = shape[:4]

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def rows(self, steps: int = 1) -> np.ndarray:
        """[b t*steps h d]"""
        return self.normal(self.b, self.t * steps, self.h, self.d)

    def keys(self, steps: int = 1) -> np.ndarray:
        """[b t*steps h d], of length 1."""
        keys = _unit(self.rows(steps))
        return keys if self.contents == "usual" else _unit(keys + 3 * self.d**-0.5)

    def rate(self, *shape: int, most: float = 1.0) -> np.ndarray:
        """Between 0 and 1; hard ones are also 0 and `most`; alike ones `most`."""
        if self.contents == "alike":
            return np.full(shape, most)
        rate = self.rng.random(shape)
        which = self.rng.integers(3, size=shape)
        return np.where(which == 0, 0.0, np.where(which == 1, most, rate)) if self.contents == "hard" else rate

    def log_decay(self, *shape: int) -> np.ndarray:
        if self.contents == "alike":
            return -0.01 * self.rng.random(shape)
        mild = -0.1 * self.normal(*shape) ** 2
        which = self.rng.integers(3, size=shape)
        return np.where(which == 0, 0.0, np.where(which == 1, -20.0, mild)) if self.contents == "hard" else mild

    def state(self, *shape: int) -> np.ndarray:
        return self.normal(*shape) * (100.0 if self.contents == "hard" else 1.0)

    def attention(self, steps: int = 1) -> dict[str, np.ndarray]:
        """q, k, v and the state of a recurrence with keys and values."""
        q = self.rows() * self.d**-0.5
        state = self.state(self.b, self.h, self.d, self.d)
        return {"q": q, "k": self.keys(steps), "v": self.rows(steps), "initial_state": state}

    def gate(self, decay: str | None) -> dict[str, np.ndarray]:
        """log_decay for no head, each head, or each channel."""
        shapes = {"head": (self.b, self.t, self.h), "channel": (self.b, self.t, self.h, self.d)}
        return {"log_decay": self.log_decay(*shapes[decay])} if decay else {}


class Case(NamedTuple):
    """One form of an op.

    name: OP or OP/FORM. inputs: the arrays by the names of the op's arguments, float64; one may be a tuple of arrays.
    options: settings of the op. peer: its name in fla_peer.PEERS, or "associative_scan".
    widen: times as many heads where t doubles. An op that only passes through its arrays is as fast as the memory they
    lie in: they outgrow the cache at the shortest length already, so that all lengths compare.
    """

    name: str
    inputs: Callable[[Draw], dict[str, Any]]
    options: Mapping[str, Any] = {}
    peer: str | None = None
    widen: int = 1

    @property
    def op(self) -> str:
        return self.name.partition("/")[0]

    def implementations(self) -> tuple[str, ...]:
        """The names that the op takes as `implementation`."""
        return importlib.import_module(f"pallas_kernels.{self.op}").IMPLEMENTATIONS

    def bind(self, implementation: str | None) -> Callable[..., Any]:
        """The op with its settings, as a function of arrays by name."""
        op = getattr(pallas_kernels, self.op)
        options = {**self.options, "implementation": implementation}
        return lambda **arrays: op(**arrays, **options)

    def draw(self, rng: np.random.Generator, shape: Shape, contents: Contents = "usual") -> dict[str, Any]:
        """Inputs in numbers that shape.dtype can hold, as numpy arrays that are float64 still."""
        inputs = self.inputs(Draw(rng, shape, contents))
        narrow = {name: functools.partial(_round, dtype=dtype_of(name, shape.dtype)) for name in inputs}
        return {name: jax.tree.map(narrow[name], x) for name, x in inputs.items()}


def dtype_of(name: str, dtype: str) -> str:
    """The dtype of an input where those of a model's width have `dtype`."""
    return "float32" if name in GATES or name in STATES else dtype


def on_device(arrays: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The inputs as jax arrays, each in its dtype; dtype "float64" makes all of them that."""
    found = {}
    for name, x in arrays.items():
        own = dtype if dtype == "float64" else dtype_of(name, dtype)
        found[name] = jax.tree.map(lambda a, own=own: jnp.asarray(a, own), x)
    return found


def masks(rng: np.random.Generator, shape: Shape, contents: Contents = "usual") -> dict[str, np.ndarray]:
    """valid and start [b t]: a tenth of the tokens is padding; documents begin at a chunk's edge and inside chunks.

    Where contents are alike, one document has every token: a mask would part them.
    """
    if contents == "alike":
        return {"valid": np.ones((shape.b, shape.t), bool), "start": np.zeros((shape.b, shape.t), bool)}
    at = np.arange(shape.t)
    start = np.stack([(at == CHUNK) | (at % 41 == 5) if row % 2 == 0 else at == CHUNK + 3 for row in range(shape.b)])
    return {"valid": rng.random((shape.b, shape.t)) < 0.9, "start": start}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _round(a: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.float32).astype(dtype)).astype(np.float64)


def _linear_attention(decay: str | None) -> Callable[[Draw], dict[str, Any]]:
    return lambda draw: draw.attention() | draw.gate(decay)


def _delta_rule(decay: str | None, steps: int = 1) -> Callable[[Draw], dict[str, Any]]:
    def inputs(draw: Draw) -> dict[str, Any]:
        beta = draw.rate(draw.b, draw.t * steps, draw.h, most=2.0)
        return draw.attention(steps) | draw.gate(decay) | {"beta": beta}

    return inputs


def _erase_write(draw: Draw) -> dict[str, Any]:
    rates = {name: draw.rate(draw.b, draw.t, draw.h, draw.d) for name in ("erase", "write")}
    return draw.attention() | draw.gate("channel") | rates


def _dplr(draw: Draw) -> dict[str, Any]:
    """As in RWKV-7: what is removed lies along what was read."""
    direction = draw.keys()
    b = direction * draw.rate(draw.b, draw.t, draw.h, 1)
    return draw.attention() | draw.gate("channel") | {"a": -direction, "b": b}


def _taylor(draw: Draw) -> dict[str, Any]:
    """Keys of 16 at most, as in Based: their features are 273. The state is that of a few tokens, its z positive."""
    d = min(draw.d, 16)
    found = {name: x[..., :d] if name in ("q", "k") else x for name, x in draw.attention().items()}
    keys, values = draw.normal(draw.b, 8, draw.h, d), draw.normal(draw.b, 8, draw.h, draw.d)
    with_one = np.concatenate([values, np.ones((*values.shape[:-1], 1))], -1)
    scale = 100.0 if draw.contents == "hard" else 1.0
    features = np.asarray(pallas_kernels.taylor_features(jnp.asarray(keys, jnp.float32)), np.float64)
    return found | {"initial_state": scale * np.einsum("bthf,bthv->bhfv", features, with_one)}


def _scan(parts: int) -> Callable[[Draw], dict[str, Any]]:
    def inputs(draw: Draw) -> dict[str, Any]:
        width = draw.h * draw.d
        found = {"log_decay": draw.log_decay(draw.b, draw.t, width)}
        if parts == 1:
            return found | {"x": draw.normal(draw.b, draw.t, width), "initial_state": draw.state(draw.b, width)}
        x = tuple(draw.normal(draw.b, draw.t, width) for _ in range(2))
        phase = np.pi * (2 * draw.rng.random((draw.b, draw.t, width)) - 1)
        return found | {"x": x, "phase": phase, "initial_state": tuple(draw.state(draw.b, width) for _ in range(2))}

    return inputs


def _short_conv(draw: Draw) -> dict[str, Any]:
    width, taps = draw.h * draw.d, 4
    x, weight = draw.normal(draw.b, draw.t, width), draw.normal(taps, width) * taps**-0.5
    return {"x": x, "weight": weight, "cache": draw.state(draw.b, taps - 1, width)}


CASES = {
    case.name: case
    for case in (
        Case("linear_attention", _linear_attention(None)),
        Case("linear_attention/head", _linear_attention("head"), peer="simple_gla"),
        Case("linear_attention/channel", _linear_attention("channel")),
        Case("delta_rule", _delta_rule(None), peer="delta_rule"),
        Case("delta_rule/head", _delta_rule("head"), peer="gated_delta_rule"),
        Case("delta_rule/channel", _delta_rule("channel"), peer="kda"),
        Case("delta_rule/householder", _delta_rule("head", 2), {"num_householder": 2}),
        Case("delta_rule/erase_write", _erase_write, peer="gdn2"),
        Case("dplr_delta_rule", _dplr, peer="dplr"),
        Case("taylor_attention", _taylor),
        Case("diagonal_scan/real", _scan(1), peer="associative_scan", widen=4),
        Case("diagonal_scan/complex", _scan(2), peer="associative_scan", widen=4),
        Case("short_conv", _short_conv, widen=4),
    )
}
"""By name, in the order of the tables."""


def select(names: tuple[str, ...]) -> list[Case]:
    """The cases with these names, or of ops with these names; all without names. KeyError names an unknown one."""
    for name in names:
        if not any(name in (case.name, case.op) for case in CASES.values()):
            raise KeyError(name)
    return [case for case in CASES.values() if not names or case.name in names or case.op in names]
