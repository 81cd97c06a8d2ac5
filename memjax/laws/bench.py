"""One memory on the bench: its parameters, a state in mid-stream, contents for calls, and the compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.laws.compare import count, is_float, named, path_name, to_numpy
from memjax.memory import How, Memory
from pallas_kernels.compat import QUICK_COMPILE

B, T, CUT = 4, 12, 7  # rows, tokens, and the length of the first piece where a sequence is really cut


class Case(NamedTuple):
    """The contents of one call of [B, T] tokens, numpy arrays. fresh: over restarted rows instead of in mid-stream."""

    x: np.ndarray
    ids: np.ndarray | None
    valid: np.ndarray
    start: np.ndarray
    fresh: bool = False

    def map(self, f: Callable, *others: Case) -> Case:
        """f of every array (ids may be None), and of those of other cases beside it."""
        x, ids, valid, start = jax.tree.map(f, self[:4], *(other[:4] for other in others))
        return Case(x, ids, valid, start, self.fresh)

    def __str__(self) -> str:
        live = self.valid | self.start
        rows, length = live.any(1), 1 + int(np.flatnonzero(live.any(0)).max(initial=0))
        holes, begins = int((~self.valid[rows, :length]).sum()), np.argwhere(self.start)
        return ", ".join(
            [
                f"{count(int(rows.sum()), 'row')} of {count(length, 'token')}",
                f"{count(holes, 'invalid token')}" if holes else "no padding",
                "start at " + " ".join(f"({r},{t})" for r, t in begins) if len(begins) else "no start",
                *(["fresh rows"] if self.fresh else []),
            ]
        )


# ---------------------------------------------------------------------------------------------- the programs


def apply(memory, how, params, state, x, ids, valid, start):
    """One call with everything given."""
    return memory.apply(params, state, x, ids=ids, valid=valid, start=start, how=how)


def write(memory, how, params, state, x, ids, valid, start):
    """Documents into the store."""
    return memory.write(params, state, x, ids=ids, valid=valid, start=start, how=how)


def scan_of_step(memory, how, params, state, x, ids, valid, start):
    """The same call, token by token."""

    def one(state, now):
        x, ids, valid, start = now
        y, state = memory.step(params, state, x, ids=ids, valid=valid, start=start, how=how)
        return state, y

    by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, ids, valid, start))
    state, y = lax.scan(one, state, by_time)
    return jnp.moveaxis(y, 0, 1), state


def graded(run, memory, how, params, state, x, ids, valid, start):
    """Values and gradients of a fixed linear function of the valid outputs and the final state."""

    wide = jnp.result_type(float)  # float64 where it is on

    def weigh(a):
        a = a.astype(wide)
        return jnp.sum(a * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape))

    def loss(params, state, x):
        y, new = run(memory, how, params, state, x, ids, valid, start)
        seen = jnp.where(valid.reshape(valid.shape + (1,) * (y.ndim - 2)), y, jnp.zeros((), y.dtype))
        floats = [a for a in jax.tree.leaves(new) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(map(weigh, floats), weigh(seen)), (y, new)

    (value, (y, new)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(params, state, x)
    leaves = [pair for label, g in zip(("params", "state", "x"), grads, strict=True) for pair in named(g, label)]
    return value, y, new, {name: g for name, g in leaves if g.dtype != jax.dtypes.float0}


GRADED = {f: functools.partial(graded, f) for f in (apply, scan_of_step)}


# ---------------------------------------------------------------------------------------------- the bench


class Bench:
    """One memory with its parameters, a state in mid-stream, and the programs that were compiled for it."""

    def __init__(self, memory: Memory, seed: int = 0, bfloat16_error: float = 3e-2):
        self.memory, self.rng, self.bfloat16_error = memory, np.random.default_rng(seed), bfloat16_error
        self.options = QUICK_COMPILE if jax.default_backend() == "cpu" else {}
        self.programs: dict[Any, Callable] = {}
        self.traces = 0
        noise = lambda a: np.asarray(a) + 0.1 * self.rng.standard_normal(a.shape).astype(np.float32)  # noqa: E731
        params = jax.jit(memory.init, compiler_options=self.options)(jax.random.key(seed))
        self.params = jax.tree.map(lambda a: jnp.asarray(noise(a)), params)
        state = to_numpy(memory.init_state(B))
        for verb in (write, apply) if memory.has_store else (apply,):
            state = self.run(verb, self.contents(), state=state)[1]
        self.warm = state

    @functools.cached_property
    def fresh(self):
        return to_numpy(self.memory.restart(self.warm, B))

    def contents(self, valid=None, start=None, fresh: bool = False, rng: np.random.Generator | None = None) -> Case:
        """Random tokens, all of them valid and in the document already open unless masks say otherwise."""
        m, rng = self.memory, rng or self.rng
        ids = rng.integers(0, m.reads_ids, (B, T), np.int32) if m.reads_ids else None
        valid = np.ones((B, T), bool) if valid is None else valid
        start = np.zeros((B, T), bool) if start is None else start
        if m.takes_ids and ids is not None:
            return Case(ids, None, valid, start, fresh)
        return Case(rng.standard_normal((B, T, m.dim)).astype(np.float32), ids, valid, start, fresh)

    @functools.cached_property
    def cases(self) -> list[Case]:
        """Padding nowhere, right, left, in the middle, anywhere; starts nowhere, at the first, at any token."""
        at, lengths = np.arange(T), np.array([T, 1, 0, CUT])[:, None]
        anywhere = np.argsort(np.argsort(self.rng.random((B, T)), 1), 1)
        begins = lambda: self.rng.random((B, T)) < 0.15  # noqa: E731
        masks = [
            (at < T, False),
            (at < T, False),
            (at < CUT, False),
            (at >= T - CUT, False),
            ((at < 3) | (at >= T - CUT + 3), False),
            (anywhere < CUT, False),
            (at < lengths, at == 0),
            (at >= T - lengths, begins()),
            (self.rng.random((B, T)) < 0.7, begins()),
        ]
        full = [[np.broadcast_to(np.asarray(a), (B, T)).copy() for a in pair] for pair in masks]
        return [self.contents(*pair, fresh=i % 3 == 1) for i, pair in enumerate(full)]

    def cases_of(self, law: str) -> list[Case]:
        """All of them, or for the slower laws, where contents matter less, the plainest and the least plain."""
        slow = law in ("gradients", "precision", "kernels", "sharded")
        return [self.cases[1], self.cases[-1]] if slow else self.cases

    def run(self, f: Callable, case: Case, state=None, memory: Memory | None = None, how: How = How(), cut=slice(None)):
        """One of the programs above on a case; the masks are left out where `cut` takes a piece of a plain sequence."""
        state = (self.fresh if case.fresh else self.warm) if state is None else state
        tokens = list(case.map(lambda a: a[:, cut])[:4])
        if cut != slice(None):
            tokens[2:] = None, None
        return to_numpy(self.program(f)(memory or self.memory, how, self.params, state, *tokens))

    def program(self, f: Callable) -> Callable:
        if f not in self.programs:

            def counted(memory, how, *arrays):
                self.traces += 1
                return f(memory, how, *arrays)

            self.programs[f] = jax.jit(counted, static_argnums=(0, 1), compiler_options=self.options)
        return self.programs[f]

    @contextlib.contextmanager
    def float64(self):
        """Accelerators have no float64: on the host."""
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            yield

    def grade(
        self, run, case: Case, memory: Memory | None = None, how: How = How(), dtype: Any = np.float32, moves=None
    ):
        """value, y, state and gradients by name, in float32 or float64; `moves` is added to the arrays it names."""

        def wide(tree, label):
            return jax.tree_util.tree_map_with_path(lambda path, a: one(np.asarray(a), path_name(path, label)), tree)

        def one(a, name):
            return np.asarray(a, dtype) + (moves or {}).get(name, 0) if is_float(a) else a

        state = self.fresh if case.fresh else self.warm
        inputs = [wide(self.params, "params"), wide(state, "state"), wide(case.x, "x")]
        run = GRADED[run]
        memory = memory or with_dtype(self.memory, np.dtype(dtype).name)
        with self.float64() if dtype == np.float64 else contextlib.nullcontext():
            return to_numpy(self.program(run)(memory, how, *inputs, *case[1:4]))

    def rows(self, state, index):
        """Rows of a state; what is shared by all rows is kept whole."""
        take = lambda a, s: np.take(a, index, s.axes.index("batch")) if "batch" in s.axes else a  # noqa: E731
        return jax.tree.map(take, state, self.memory.state_specs(B))

    def join(self, a, b):
        """The rows of two states, one after another."""
        both = lambda a, b, s: np.concatenate([a, b], s.axes.index("batch")) if "batch" in s.axes else a  # noqa: E731
        return jax.tree.map(both, a, b, self.memory.state_specs(B))


def has_dtype(memory: Memory) -> bool:
    """Whether a memory is told its compute dtype by a field."""
    return memory.takes_ids and any(f.name == "dtype" for f in dataclasses.fields(memory))


def with_dtype(memory: Memory, dtype: str) -> Memory:
    """A language model computes in the dtype of its field, since ids have none to give."""
    return dataclasses.replace(memory, dtype=dtype) if has_dtype(memory) else memory
