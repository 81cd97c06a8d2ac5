"""Named cases of the recurrences: the lengths, gates, document borders and keys that break chunked forms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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


def arrays(case: Case, delta: bool, dtype=jnp.float64) -> tuple[dict, tuple]:
    """The arguments of the op, and cotangents of o and the final state. q is scaled, k normalised; nothing is round."""
    b, hk, d, e = 2, 3, 5, 7
    t, h = case.t, hk * case.groups
    key = iter(jax.random.split(jax.random.key(len(case.name) + t), 12))

    def normal(*shape):
        return jax.random.normal(next(key), shape, dtype)

    q, k, v = normal(b, t, hk, d) * d**-0.5, normal(b, t, hk, d), normal(b, t, h, e)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    if case.keys == "similar":
        k = k + 3.0 * jnp.ones((1, 1, 1, d), dtype) * d**-0.5
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    found = {"q": q, "k": k, "v": v}
    beta = jax.random.uniform(next(key), (b, t, h), dtype) if case.beta is None else jnp.full((b, t, h), case.beta, dtype)
    if delta:
        found["beta"] = beta
    if case.decay != "none":
        g = -0.1 * normal(b, t, h, d) ** 2 if case.decay == "channel" else -0.1 * normal(b, t, h) ** 2
        which = jax.random.randint(next(key), g.shape, 0, 3)
        zero, strong = jnp.zeros_like(g), jnp.full_like(g, -20)
        mixed = jnp.where(which == 0, zero, jnp.where(which == 1, strong, g))
        found["log_decay"] = {"mild": g, "zero": zero, "strong": strong, "mixed": mixed}[case.gates]
    if case.state:
        found["initial_state"] = case.state * normal(b, h, d, e)
    return found, (normal(b, t, h, e), normal(b, h, d, e))


def start(case: Case):
    if case.start == "none":
        return None
    at = jnp.arange(case.t)
    if case.start == "edges":  # row 0 begins with a document, row 1 carries its state into the second chunk
        return jnp.stack([at % CHUNK == 0, (at == CHUNK) | (at == 2 * CHUNK)])
    if case.start == "inside":
        return jnp.stack([at % 13 == 5, (at == 3) | (at == 2 * CHUNK + 1) | (at == case.t - 1)])
    return jax.random.bernoulli(jax.random.key(case.t), 1 / 3, (2, case.t))
