"""Named cases of the recurrences: the lengths, gates, document borders and keys that break chunked forms."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 16


class Case(NamedTuple):
    name: str
    t: int
    decay: str = "head"  # none, head, channel
    gates: str = "mild"  # mild; strong: -20 throughout; mixed: 0, -20 and mild; zero
    start: str = "none"  # none; edges: of chunks; inside; dense: a third of all tokens
    keys: str = "random"  # random unit vectors; similar: with pairwise cosine 0.9
    beta: float | None = None  # None: between 0 and 1
    groups: int = 1  # value heads per key head
    state: float = 1.0  # scale of the initial state; 0: none is given
    chunk_size: int = CHUNK


LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
T = LENGTHS[-1]

_COMMON = [
    Case("none", T, "none"),
    Case("none-start", T, "none", start="inside"),
    *(Case(f"head-t{t}", t, gates="mixed") for t in LENGTHS),
    *(Case(f"head-start-{s}", T, gates="mixed", start=s) for s in ("edges", "inside", "dense")),
    Case("head-zero", T, gates="zero"),
    Case("head-strong", T, gates="strong"),
    Case("head-large-state", T, state=1e4),
    Case("head-no-state", T, state=0),
    Case("head-chunk-1", 5, chunk_size=1),
]

LINEAR_ATTENTION = [
    *_COMMON,
    *(Case(f"channel-t{t}", t, "channel", gates="mixed") for t in LENGTHS),
    *(Case(f"channel-start-{s}", T, "channel", gates="mixed", start=s) for s in ("edges", "inside", "dense")),
    Case("channel-zero", T, "channel", gates="zero"),
    Case("channel-strong", T, "channel", gates="strong"),
]

DELTA_RULE = [
    *_COMMON,
    Case("similar-beta-1", T, "none", keys="similar", beta=1),
    Case("similar-beta-2", T, keys="similar", beta=2, start="inside"),
    Case("groups", T, gates="mixed", start="inside", groups=3),
    Case("none-groups", CHUNK + 1, "none", groups=2),
]


def arrays(case: Case, delta: bool, dtype=np.float64) -> tuple[dict, tuple]:
    """The arguments of the op, and cotangents of o and the final state. q is scaled, k normalised; nothing is round."""
    b, hk, d, e = 2, 3, 5, 7
    t, h = case.t, hk * case.groups
    draw = np.random.default_rng(zlib.crc32(case.name.encode()))

    def normal(*shape):
        return draw.standard_normal(shape)

    q, k, v = normal(b, t, hk, d) * d**-0.5, normal(b, t, hk, d), normal(b, t, h, e)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    if case.keys == "similar":
        k += 3 * d**-0.5
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    found = {"q": q, "k": k, "v": v}
    if delta:
        found["beta"] = draw.random((b, t, h)) if case.beta is None else np.full((b, t, h), case.beta)
    if case.decay != "none":
        shape = (b, t, h, d) if case.decay == "channel" else (b, t, h)
        mild = -0.1 * normal(*shape) ** 2
        which = draw.integers(3, size=shape)
        mixed = np.where(which == 0, 0, np.where(which == 1, -20, mild))
        found["log_decay"] = {"mild": mild, "zero": 0 * mild, "strong": 0 * mild - 20, "mixed": mixed}[case.gates]
    if case.state:
        found["initial_state"] = case.state * normal(b, h, d, e)
    cotangents = normal(b, t, h, e), normal(b, h, d, e)
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (found, cotangents))


def start(case: Case):
    if case.start == "none":
        return None
    at = np.arange(case.t)
    if case.start == "edges":  # row 0 begins with a document, row 1 carries its state into the second chunk
        masks = [at % CHUNK == 0, (at == CHUNK) | (at == 2 * CHUNK)]
    elif case.start == "inside":
        masks = [at % 13 == 5, (at == 3) | (at == 2 * CHUNK + 1) | (at == case.t - 1)]
    else:
        masks = np.random.default_rng(0).random((2, case.t)) < 1 / 3
    return jnp.asarray(masks)
