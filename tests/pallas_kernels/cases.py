"""Named cases of the recurrences: the lengths, gates, masks and keys that break chunked forms."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_rule import delta_rule as delta
from pallas_kernels.dplr_delta_rule import dplr_delta_rule as dplr
from pallas_kernels.linear_attention import linear_attention as linear

CHUNK = 16
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1)
T = 3 * CHUNK + 7


class Case(NamedTuple):
    """An op with one set of arguments. What comes after `n` doesn't change a shape, except t and state = 0."""

    name: str
    op: Callable[..., Any]
    rates: str = "none"  # none; beta; gates: erase and write in place of beta
    decay: str = "head"  # none, head, channel
    groups: int = 1  # value heads per key head
    n: int = 1  # updates a token
    t: int = T
    gates: str = "mixed"  # mild; strong: -20 throughout; mixed: 0, -20 and mild; zero
    start: str = "none"  # none; edges: of chunks; inside; dense: a third of all tokens
    valid: str = "all"  # all; left, middle, right: where invalid tokens are; random: a third of all tokens
    keys: str = "random"  # random unit vectors; similar: with pairwise cosine 0.9
    beta: float | None = None  # None: between 0 and 1
    state: float = 1.0  # scale of the initial state; 0: none is given
    chunk_size: int = CHUNK


VARIANTS = [
    Case("linear-none", linear, decay="none"),
    Case("linear-head", linear),
    Case("linear-channel", linear, decay="channel"),
    Case("beta-none", delta, "beta", "none"),
    Case("beta-head", delta, "beta"),
    Case("beta-channel", delta, "beta", "channel"),
    Case("gates-none", delta, "gates", "none"),
    Case("gates-head", delta, "gates"),
    Case("gates-channel", delta, "gates", "channel"),
    Case("beta-head-groups", delta, "beta", groups=3),
    Case("beta-channel-groups", delta, "beta", "channel", groups=2),
    Case("beta-head-twice", delta, "beta", n=2),
    Case("gates-channel-thrice-groups", delta, "gates", "channel", groups=2, n=3),
    Case("dplr", dplr, decay="channel"),
]

_MAIN = [
    variant
    for variant in VARIANTS
    if variant.groups * variant.n == 1 and variant.name not in ("gates-none", "gates-head")
]

# 28 chunks: more than are computed side by side, so that there is a loop over spans of them
MANY_CHUNKS = [
    variant._replace(name=f"{variant.name}-many-chunks", chunk_size=2)
    for variant in VARIANTS
    if variant.name in ("linear-head", "linear-channel", "beta-head", "dplr")
]

# of the main variants: each length is a program of its own
_LENGTHS: dict[str, dict[str, Any]] = {
    **{f"t{t}": {"t": t} for t in LENGTHS},
    "many-chunks": {"chunk_size": 2, "start": "inside"},
    "many-chunks-left": {"chunk_size": 2, "valid": "left", "gates": "mild"},
    "many-chunks-masks": {"chunk_size": 2, "valid": "random", "start": "dense"},
}
# of all variants: two programs for all
_CONTENTS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "zero": {"gates": "zero"},
    "strong": {"gates": "strong"},
    "large-state": {"gates": "mild", "state": 1e4},
    "similar-beta-1": {"gates": "mild", "keys": "similar", "beta": 1},
    "similar-beta-2": {"gates": "mild", "keys": "similar", "beta": 2, "start": "inside"},
    **{f"start-{s}": {"start": s} for s in ("edges", "inside", "dense")},
    **{f"valid-{v}": {"valid": v, "gates": "mild"} for v in ("left", "middle", "right")},
    "masks": {"valid": "random", "start": "dense"},
}


def _fits(variant: Case, content: dict[str, Any]) -> bool:
    if variant.decay == "none" and content.get("gates") in ("zero", "strong"):
        return False
    return variant.op is not linear or "keys" not in content


NAMED = [
    variant._replace(name=f"{variant.name}-{name}", **content)
    for variants, contents in ((_MAIN, _LENGTHS), (VARIANTS, _CONTENTS))
    for variant in variants
    for name, content in contents.items()
    if _fits(variant, content)
]
PLAIN = {linear: VARIANTS[1], delta: VARIANTS[4], dplr: VARIANTS[-1]}
NAMED += [variant._replace(name=f"{variant.name}-no-state", state=0) for variant in PLAIN.values()]
NAMED += [variant._replace(name=f"{variant.name}-chunk-1", t=5, chunk_size=1) for variant in PLAIN.values()]


def arrays(case: Case, dtype: Any = np.float64) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, ...]]:
    """The arguments of the op, and cotangents of o and the final state.

    q is scaled, keys are normalised; no size is round; what stands at invalid tokens is NaN. With bfloat16, rates,
    decays and states are float32, as in a model.
    """
    b, hk, d, e = 2, 3, 5, 7
    t, rows, h = case.t, case.t * case.n, hk * case.groups
    draw = np.random.default_rng(zlib.crc32(case.name.encode()))

    def normal(*shape):
        return draw.standard_normal(shape)

    def unit_keys(*shape):
        k = normal(*shape, d)
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        if case.keys == "similar":
            k += 3 * d**-0.5
            k /= np.linalg.norm(k, axis=-1, keepdims=True)
        return k

    def rates(*shape):
        return draw.random(shape) if case.beta is None else np.full(shape, case.beta)

    found = {"q": normal(b, t, hk, d) * d**-0.5, "k": unit_keys(b, rows, hk), "v": normal(b, rows, h, e)}
    if case.rates == "beta":
        found["beta"] = rates(b, rows, h)
    elif case.rates == "gates":
        found |= {"erase": rates(b, rows, h, d), "write": rates(b, rows, h, e)}
    elif case.op is dplr:
        a = unit_keys(b, t, h)
        found |= {"a": -a, "b": a * rates(b, t, h, d)}
    if case.decay != "none":
        shape = (b, t, h, d) if case.decay == "channel" else (b, t, h)
        mild = -0.1 * normal(*shape) ** 2
        which = draw.integers(3, size=shape)
        mixed = np.where(which == 0, 0, np.where(which == 1, -20, mild))
        found["log_decay"] = {"mild": mild, "zero": 0 * mild, "strong": 0 * mild - 20, "mixed": mixed}[case.gates]
    if case.state:
        found["initial_state"] = case.state * normal(b, h, d, e)
    wide = np.float32 if dtype == jnp.bfloat16 else dtype
    found = {name: a.astype(dtype if name in "qkvab" else wide) for name, a in found.items()}
    cotangents = normal(b, t, h, e), normal(b, h, d, e)
    return fill(case, found, np.nan), tuple(a.astype(found["v"].dtype) for a in cotangents)


def fill(case: Case, named: dict[str, np.ndarray], value: float) -> dict[str, np.ndarray]:
    """Arguments, or gradients of them, with one value at all invalid tokens."""
    valid = masks(case).get("valid")
    if valid is None:
        return named

    def at_tokens(name, a):
        if "state" in name:
            return a
        mask = np.repeat(valid, a.shape[1] // case.t, 1)
        return np.where(mask.reshape(mask.shape + (1,) * (a.ndim - 2)), a, np.asarray(value, a.dtype))

    return {name: at_tokens(name, a) for name, a in named.items()}


def masks(case: Case) -> dict[str, np.ndarray]:
    """`valid` and `start`: both, or none of them, so that cases of one shape share programs."""
    if case.start == "none" and case.valid == "all":
        return {}
    at, third = np.arange(case.t), np.random.default_rng(zlib.crc32(case.name.encode())).random((2, 2, case.t)) < 1 / 3
    start = {
        "none": [at < 0, at < 0],
        # row 0 begins with a document, row 1 carries its state into the second chunk
        "edges": [at % CHUNK == 0, (at == CHUNK) | (at == 2 * CHUNK)],
        "inside": [at % 13 == 5, (at == 3) | (at == 2 * CHUNK + 1) | (at == case.t - 1)],
        "dense": third[0],
    }[case.start]
    invalid = {
        "all": [at < 0, at < 0],
        "left": [at < 3, at < CHUNK + 1],
        "middle": [(at > 4) & (at < 2 * CHUNK + 3), (at >= CHUNK) & (at < 2 * CHUNK)],
        "right": [at >= case.t - 2, at >= CHUNK],
        "random": third[1],
    }[case.valid]
    return {"valid": ~np.array(invalid), "start": np.array(start)}
