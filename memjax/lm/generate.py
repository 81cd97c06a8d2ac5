"""Generation through `step`: greedy or sampled, ragged prompts, whole or streamed, from the beginning or from a prefix.

A language model is any Memory over token ids with logits as y. States are donated: a decoded token copies no cache.
What has been read is a `Prefix`: it can be continued, forked into several rows, and saved (`memjax.lm.prefix`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Key

from memjax.data.tokenizer import DecodeStream, Tokenizer
from memjax.memory import How, Memory


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary; `stop` is the token that ends a row."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: int | None = None

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"{self}: needs temperature >= 0, 0 < top_p <= 1, top_k >= 0")


class Prefix(NamedTuple):
    """What rows have read: the state behind it, and the logits of the token that comes next."""

    state: Any
    logits: Float[Array, "b v"]


def sample(logits: Float[Array, "b v"], key: Array, how: Sampling = Sampling()) -> Int[Array, " b"]:
    """One token a row from its logits."""
    if how.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k:
        kth = lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        p = jax.nn.softmax(ordered, -1)
        kept = jnp.cumsum(p, -1) - p < how.top_p  # the token that crosses top_p is kept
        smallest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "how"))
def prefill(
    model: Memory, params: dict, state: Any, prompt: Int[Array, "b t"], valid: Bool[Array, "b t"], how: How = How()
) -> tuple[Float[Array, "b v"], Any]:
    """Read prompts (padding anywhere, valid False) and return the logits after the last valid token of each row."""
    y, state = model.apply(params, state, prompt, valid=valid, how=how)
    last = jnp.where(valid, jnp.arange(prompt.shape[1], dtype=jnp.int32)[None], 0).max(1)
    return jax.vmap(lambda y, i: y[i])(y, last), state


def read(
    model: Memory,
    params: dict,
    state: Any,
    prompt: Int[Array | np.ndarray, "b t"],
    *,
    valid: Bool[Array | np.ndarray, "b t"] | None = None,
    block: int | None = None,
    how: How = How(),
) -> Prefix:
    """Read more: the prefix behind it.

    Args:
      state: of the rows so far, or a `Prefix`, whose rows may be left without a token. It stays usable.
      valid: padding of ragged prompts, on either side.
      block: read so many tokens at a time, so that a long prompt takes no more memory than a short one; not for
        memories that decide once over a whole question.

    Raises ValueError where a row has nothing to begin with.
    """
    state, logits = state if isinstance(state, Prefix) else (state, None)
    prompt = jnp.asarray(prompt, jnp.int32)
    valid = jnp.ones(prompt.shape, jnp.bool_) if valid is None else jnp.asarray(valid)
    if logits is None and (empty := np.flatnonzero(~np.asarray(valid).any(1))).size:
        raise ValueError(f"read: row {empty[0]} of the prompt has no token to begin with")
    t = prompt.shape[1]
    if block is not None:
        padding = ((0, 0), (0, -t % block))
        prompt, valid = jnp.pad(prompt, padding), jnp.pad(valid, padding)
    for at in range(0, t, block or t):
        now = slice(at, at + (block or t))
        new, state = prefill(model, params, state, prompt[:, now], valid[:, now], how=how)
        logits = new if logits is None else jnp.where(valid[:, now].any(1)[:, None], new, logits)
    assert logits is not None  # a prompt has a token
    return Prefix(state, logits)


def fork(model: Memory, prefix: Prefix, rows: int | Sequence[int]) -> Prefix:
    """The rows of a prefix with these numbers, each as often as it is named. One number n: n copies of its only row.

    What all rows share (a store) is not copied. Raises ValueError where there is no such row.
    """
    b = prefix.logits.shape[0]
    if isinstance(rows, int):
        if b != 1:
            raise ValueError(f"fork: the prefix has {b} rows, needs 1 for {rows} copies of it, or the numbers of rows")
        rows = [0] * rows
    if not rows or not all(0 <= i < b for i in rows):
        raise ValueError(f"fork: rows are {list(rows)}, needs at least one, each of them from 0 to {b - 1}")
    index = jnp.asarray(rows, jnp.int32)
    take = lambda s, a: jnp.take(a, index, s.axes.index("batch")) if "batch" in s.axes else a  # noqa: E731
    return Prefix(jax.tree.map(take, model.state_specs(b), prefix.state), prefix.logits[index])


@functools.partial(jax.jit, static_argnames=("model", "sampling", "how"), donate_argnames=("state",))
def decode(
    model: Memory,
    params: dict,
    state: Any,
    logits: Float[Array, "b v"],
    done: Bool[Array, " b"],
    keys: Key[Array, " n"],
    *,
    sampling: Sampling = Sampling(),
    how: How = How(),
) -> tuple[Int[Array, "b n"], Any, Float[Array, "b v"], Bool[Array, " b"]]:
    """A token for each key after `logits`: tokens [b, n] (-1 after the stop token), the state, the next logits, which
    rows ended.

    A row that has ended reads no more tokens: its state and its logits stay as they were. The state that is given is
    consumed.
    """

    def body(carry, key):
        state, logits, done = carry
        token = sample(logits, key, sampling)
        out = jnp.where(done, -1, token)
        done = done if sampling.stop is None else done | (token == sampling.stop)
        new, state = model.step(params, state, token, valid=~done, how=how)
        return (state, jnp.where(done[:, None], logits, new), done), out

    (state, logits, done), tokens = lax.scan(body, (state, logits, done), keys)
    return tokens.T, state, logits, done


def generate(
    model: Memory,
    params: dict,
    state: Any,
    prompt: Int[Array | np.ndarray, "b t"] | None = None,
    *,
    steps: int,
    valid: Bool[Array | np.ndarray, "b t"] | None = None,
    key: Array | None = None,
    sampling: Sampling = Sampling(),
    how: How = How(),
) -> tuple[Int[Array, "b n"], Prefix]:
    """Read `prompt` after `state`, then decode `steps` tokens: tokens [b, steps] (-1 after the stop token), the prefix.

    Args:
      state: of the rows so far, or a `Prefix`, after which the prompt may be left out. It stays usable.
      valid: padding of ragged prompts, on either side.
      key: needed when sampling.
    """
    pieces = stream(
        model, params, state, prompt, steps=steps, block=steps, valid=valid, key=key, sampling=sampling, how=how
    )
    ((tokens, prefix),) = pieces
    return tokens, prefix


def stream(
    model: Memory,
    params: dict,
    state: Any,
    prompt: Int[Array | np.ndarray, "b t"] | None = None,
    *,
    steps: int,
    block: int = 1,
    valid: Bool[Array | np.ndarray, "b t"] | None = None,
    key: Array | None = None,
    sampling: Sampling = Sampling(),
    how: How = How(),
) -> Iterator[tuple[Int[Array, "b n"], Prefix]]:
    """The tokens of `generate`, `block` at a time: yields (tokens [b, block], prefix) until every row has ended.

    The prefix that is yielded last may be continued; earlier ones are consumed by the next piece.
    """
    if steps < 1 or block < 1:
        raise ValueError(f"generate: steps is {steps} and block {block}, needs at least 1")
    if key is None:
        if sampling.temperature:
            raise ValueError("generate: sampling needs a key")
        key = jax.random.key(0)
    if prompt is not None:
        state, logits = read(model, params, state, prompt, valid=valid, how=how)
    elif isinstance(state, Prefix):
        state, logits = jax.tree.map(jnp.copy, state.state), state.logits  # the state is consumed below
    else:
        raise ValueError("generate: needs a prompt, or a Prefix to go on from")
    done = jnp.zeros(logits.shape[0], jnp.bool_)
    keys = jax.random.split(key, steps)
    for at in range(0, steps, block):
        now = lax.dynamic_slice_in_dim(keys, at, min(block, steps - at))  # one program for every `at`
        tokens, state, logits, done = decode(model, params, state, logits, done, now, sampling=sampling, how=how)
        yield tokens, Prefix(state, logits)
        if sampling.stop is not None and bool(np.all(np.asarray(done))):
            return


def stream_text(pieces: Iterable[tuple[Int[Array, "b n"], Prefix]], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the first row of `stream`, piece by piece; some pieces are empty, none ends inside a character."""
    decoder = DecodeStream(tokenizer)
    for tokens, _ in pieces:
        yield "".join(decoder.push(i) for i in np.asarray(tokens)[0].tolist() if i >= 0)
    yield decoder.finish()
