"""The laws of a memory: what "it works" means, as one function for the catalog and for your own memory.

    from memjax import laws

    laws.check(MyMemory(dim=16))  # one line a law: holds, is broken (with the smallest case found), or does not apply

     1 split        apply on x is apply on x[:, :s], then on x[:, s:] with the state carried over
     2 step         apply is a scan of step
     3 causal       an output does not change when later tokens do
     4 batch        each row is what it is alone
     5 padding      invalid tokens, NaN and huge numbers in them, change neither the state nor a valid output
     6 packing      documents packed with `start` are the documents one by one
     7 bounded      the state keeps its shapes, dtypes and `state_bytes`, and grows at most linearly
     8 gradients    finite, equal to finite differences, equal to those through the scan of step (float64)
     9 precision    bfloat16 in, bfloat16 out, near float32, state dtypes kept
    10 kernels      every implementation gives the values, the state and the gradients of "reference"
    11 sharded      rows over devices, and the sequence over devices, give the result of one device (gradients too)
    12 saved        configuration, parameters and state survive the disk, and the sequence continues bit for bit
    13 transformed  jit, vmap, grad, scan, remat, eval_shape; other values do not retrace
    14 golden       it reproduces recorded numbers

Everything runs on [4, 12] tokens in mid-stream (documents written if there is a store, then a call) and on fresh rows.
Most laws are other contents of one compiled call, so a memory takes seconds. Parameters get a little noise: what
begins at zero would hide a mistake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.memory import How, Memory, config_hash, from_config, to_config

B, T, CUT = 4, 12, 7  # rows, tokens, and the length of the first piece where a sequence is really cut
FLOAT32, FLOAT64 = 5e-5, 1e-8  # largest error, relative to the largest number of the array
# Compiling is what takes the time; the XLA passes left out here change speed, not results.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


class Result(NamedTuple):
    """ok is None where the law does not apply; detail is the smallest failing case, or the reason, or what was found."""

    law: str
    ok: bool | None
    detail: str


class Case(NamedTuple):
    """The contents of one call of [B, T] tokens, numpy arrays. fresh: over restarted rows instead of in mid-stream."""

    x: np.ndarray
    ids: np.ndarray | None
    valid: np.ndarray
    start: np.ndarray
    fresh: bool = False

    def __str__(self) -> str:
        live = self.valid | self.start
        rows, length = live.any(1), 1 + int(np.flatnonzero(live.any(0)).max(initial=0))
        holes, begins = int((~self.valid[rows, :length]).sum()), np.argwhere(self.start)
        return ", ".join(
            [
                f"{_count(int(rows.sum()), 'row')} of {_count(length, 'token')}",
                f"{_count(holes, 'invalid token')}" if holes else "no padding",
                "start at " + " ".join(f"({r},{t})" for r, t in begins) if len(begins) else "no start",
                *(["fresh rows"] if self.fresh else []),
            ]
        )


class Broken(Exception):
    """A law does not hold; the message says where."""


class NotApplicable(Exception):
    """A law has nothing to say about this memory; the message says why."""


def check(
    memory: Memory,
    *,
    only: str | Iterable[str] | None = None,
    seed: int = 0,
    exceptions: Mapping[str, str] | None = None,
    golden: Callable[[], Iterable[tuple[str, float, bool]]] | None = None,
    bfloat16_error: float = 3e-2,
    raise_on_failure: bool = False,
    out: TextIO | None = None,
) -> dict[str, Result]:
    """Check a memory against the laws and print one line for each.

    Args:
      memory: any `Memory`, small: dim 16 or so.
      only: the name of a law, or several; None checks all.
      seed: of the parameters and the contents.
      exceptions: law -> the reason why it holds only inside a document that has already begun. It is checked there,
        and has to fail elsewhere: a declaration that isn't needed is itself reported.
      golden: gives (array, error, ok) for each recorded array; None: nothing was recorded.
      bfloat16_error: what law 9 allows, root mean square of the difference over that of the float32 result.
      raise_on_failure: raise AssertionError, naming the broken laws, after all of them were checked.
      out: where to print; None is sys.stdout.

    Returns:
      law -> Result, in the order of the laws.

    Raises:
      ValueError: `only` or `exceptions` names no law, or a law that can't be declared off.
    """
    names = [only] if isinstance(only, str) else list(LAWS if only is None else only)
    exceptions = dict(exceptions or {})
    for label, given, known in (("only", names, LAWS), ("exceptions", exceptions, CONTENTS)):
        if unknown := [n for n in given if n not in known]:
            raise ValueError(f"{label}: {unknown[0]!r} is not one of {', '.join(known)}")
    begin = time.perf_counter()
    print(memory, file=out)
    bench, results = Bench(memory, seed, bfloat16_error), {}
    for name in names:
        r = results[name] = bench.judge(name, exceptions.get(name), golden)
        print(f"  {'–' if r.ok is None else '✓' if r.ok else '✗'} {name:12}{r.detail}".rstrip(), file=out, flush=True)
    broken = [r for r in results.values() if r.ok is False]
    counts = [f"{sum(r.ok is ok for r in results.values())} {word}" for ok, word in ((True, "hold"), (False, "broken"))]
    print(f"  {', '.join(counts)}, of {len(names)} ({time.perf_counter() - begin:.1f} s)", file=out)
    if broken and raise_on_failure:
        raise AssertionError("\n".join([f"{memory} breaks", *(f"  {r.law}: {r.detail}" for r in broken)]))
    return results


# ---------------------------------------------------------------------------------------------- the programs


def apply(memory, how, params, state, x, ids, valid, start):
    return memory.apply(params, state, x, ids=ids, valid=valid, start=start, how=how)


def write(memory, how, params, state, x, ids, valid, start):
    return memory.write(params, state, x, ids=ids, valid=valid, start=start, how=how)


def scan_of_step(memory, how, params, state, x, ids, valid, start):
    def one(state, now):
        x, ids, valid, start = now
        y, state = memory.step(params, state, x, ids=ids, valid=valid, start=start, how=how)
        return state, y

    by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, ids, valid, start))
    state, y = lax.scan(one, state, by_time)
    return jnp.moveaxis(y, 0, 1), state


def graded(run, memory, how, params, state, x, ids, valid, start):
    """Values and gradients of a fixed linear function of the valid outputs and the final state."""

    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32

    def weigh(a):
        a = a.astype(wide)
        return jnp.sum(a * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape))

    def loss(params, state, x):
        y, new = run(memory, how, params, state, x, ids, valid, start)
        seen = jnp.where(valid.reshape(valid.shape + (1,) * (y.ndim - 2)), y, jnp.zeros((), y.dtype))
        floats = [a for a in jax.tree.leaves(new) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(map(weigh, floats), weigh(seen)), (y, new)

    (value, (y, new)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(params, state, x)
    floats = [g for g in jax.tree_util.tree_leaves_with_path(dict(zip(("params", "state", "x"), grads, strict=True)))]
    return value, y, new, {_path(path): g for path, g in floats if g.dtype != jax.dtypes.float0}


class Bench:
    """One memory with its parameters, a state in mid-stream, and the programs that were compiled for it."""

    def __init__(self, memory: Memory, seed: int = 0, bfloat16_error: float = 3e-2):
        self.memory, self.rng, self.bfloat16_error = memory, np.random.default_rng(seed), bfloat16_error
        self.options = FAST if jax.default_backend() == "cpu" else {}
        self.programs: dict[Any, Callable] = {}
        self.traces = 0
        noise = lambda a: np.asarray(a) + 0.1 * self.rng.standard_normal(a.shape).astype(np.float32)  # noqa: E731
        params = jax.jit(memory.init, compiler_options=self.options)(jax.random.key(seed))
        self.params = jax.tree.map(lambda a: jnp.asarray(noise(a)), params)
        state = _numpy(memory.init_state(B))
        for verb in (write, apply) if memory.has_store else (apply,):
            state = self.run(verb, self.contents(), state=state)[1]
        self.warm = state

    @cached_property
    def fresh(self):
        return _numpy(self.memory.restart(self.warm, B))

    def contents(self, valid=None, start=None, fresh: bool = False, rng: np.random.Generator | None = None) -> Case:
        """Random tokens, all of them valid and in the document already open unless masks say otherwise."""
        m, rng = self.memory, rng or self.rng
        ids = rng.integers(0, m.reads_ids, (B, T), np.int32) if m.reads_ids else None
        valid = np.ones((B, T), bool) if valid is None else valid
        start = np.zeros((B, T), bool) if start is None else start
        if m.takes_ids:
            return Case(ids, None, valid, start, fresh)
        return Case(rng.standard_normal((B, T, m.dim)).astype(np.float32), ids, valid, start, fresh)

    def cases(self) -> list[Case]:
        """Padding nowhere, on the right, on the left, in the middle and anywhere; starts at none, the first, any token."""
        at = np.arange(T)
        begins = lambda: self.rng.random((B, T)) < 0.15  # noqa: E731
        anywhere = np.argsort(np.argsort(self.rng.random((B, T)), 1), 1) < CUT
        lengths = np.array([T, 1, 0, CUT])[:, None]
        masks = [
            (at < CUT, False),
            (at >= T - CUT, False),
            ((at < 3) | (at >= T - CUT + 3), False),
            (anywhere, False),
            (at < lengths, at == 0),
            (at >= T - lengths, begins()),
            (self.rng.random((B, T)) < 0.7, begins()),
        ]
        full = [np.broadcast_to(np.asarray(a), (B, T)).copy() for pair in masks for a in pair]
        masked = [self.contents(*pair, fresh=i % 3 == 2) for i, pair in enumerate(zip(full[::2], full[1::2], strict=True))]
        return [self.contents(), self.contents(fresh=True), *masked]

    def run(self, f: Callable, case: Case, state=None, memory: Memory | None = None, how: How = How(), cut=slice(None)):
        """One of the programs above on a case; the masks are left out where `cut` takes a piece of a plain sequence."""
        state = (self.fresh if case.fresh else self.warm) if state is None else state
        tokens = [a if a is None else a[:, cut] for a in case[:4]]
        if cut != slice(None):
            tokens[2:] = None, None
        return _numpy(self.program(f)(memory or self.memory, how, self.params, state, *tokens))

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

    def grade(self, run, case: Case, memory: Memory | None = None, how: How = How(), dtype=np.float32, moved=None):
        """value, y, state and gradients by name, in float32 or float64; `moved` is added to (params, state, x)."""
        wide = lambda a: np.asarray(a, dtype) if _is_float(a) else np.asarray(a)  # noqa: E731
        state = self.fresh if case.fresh else self.warm
        inputs = jax.tree.map(wide, (self.params, state, case.x))
        if moved is not None:
            inputs = jax.tree.map(np.add, inputs, moved)
        run = GRADED[run]
        memory = memory or _with_dtype(self.memory, np.dtype(dtype).name)
        with self.float64() if dtype == np.float64 else contextlib.nullcontext():
            return _numpy(self.program(run)(memory, how, *inputs, *case[1:4]))

    def rows(self, state, index):
        """Rows of a state; what is shared by all rows is kept whole."""
        take = lambda a, s: np.take(a, index, s.axes.index("batch")) if "batch" in s.axes else a  # noqa: E731
        return jax.tree.map(take, state, self.memory.state_specs(B))

    def join(self, a, b):
        """The rows of two states, one after another."""
        both = lambda a, b, s: np.concatenate([a, b], s.axes.index("batch")) if "batch" in s.axes else a  # noqa: E731
        return jax.tree.map(both, a, b, self.memory.state_specs(B))

    # verdicts ------------------------------------------------------------------------------------

    def judge(self, name: str, exception: str | None = None, golden: Callable | None = None) -> Result:
        """One law, on every case it reads."""
        if name == "golden":
            return _golden(golden)
        if name not in CONTENTS:
            return Result(name, *self._broken(partial(LAWS[name], self)))
        law, cases = partial(LAWS[name], self), self.cases()
        if name in ("gradients", "kernels", "sharded", "precision"):  # these are slower, and contents matter less
            cases = [cases[1], cases[-1]]
        if exception is None:
            return self._over(name, law, cases)
        no_start = np.zeros((B, T), bool)
        inside = self._over(name, law, [c._replace(start=no_start, fresh=False) for c in cases])
        if inside.ok is not True:
            return inside
        outside = [c for c in cases if c.fresh or c.start.any()]
        if all(self._broken(partial(law, c))[0] for c in outside):
            return Result(name, False, f"declared off, but it holds: {exception}")
        return Result(name, True, f"only inside a document: {exception}")

    def _over(self, name: str, law: Callable, cases: Iterable[Case]) -> Result:
        detail = ""
        for case in cases:
            ok, detail = self._broken(partial(law, case))
            if ok is None:
                return Result(name, None, detail)
            if not ok:
                case, detail = self.shrink(law, case, detail)
                return Result(name, False, f"{detail} ({case})")
        return Result(name, True, detail)

    @staticmethod
    def _broken(law: Callable) -> tuple[bool | None, str]:
        """A memory under construction may also raise: that is a broken law, not the end of the check."""
        try:
            return True, law() or ""
        except NotApplicable as reason:
            return None, f"n/a: {reason}"
        except Broken as broken:
            return False, str(broken)
        except Exception as error:
            return False, f"raises {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

    def shrink(self, law: Callable, case: Case, detail: str) -> tuple[Case, str]:
        """A case as small as simple steps make it, in which the law still fails."""
        found = True
        while found:
            found = False
            for smaller in _smaller(case):
                ok, why = self._broken(partial(law, smaller))
                if ok is False:
                    case, detail, found = smaller, why, True
                    break
        return case, detail


def _smaller(case: Case) -> Iterator[Case]:
    """No start, no padding, one row, fewer tokens, one start less: each is simpler, so shrinking ends."""
    live, at = case.valid | case.start, np.arange(T)[None]
    rows, length = np.flatnonzero(live.any(1)), 1 + int(np.flatnonzero(live.any(0)).max(initial=0))
    if case.start.any():
        yield case._replace(start=np.zeros_like(case.start))
    filled = live.any(1)[:, None] & (at < length)
    if (filled & ~case.valid).any():
        yield case._replace(valid=filled)
    keep = [(np.arange(B) == r)[:, None] & (at >= 0) for r in rows] if len(rows) > 1 else []
    keep += [at < n for n in sorted({length // 2, length - 1}) if n > 0]
    for k in keep:
        yield case._replace(valid=case.valid & k, start=case.start & k)
    for r, t in np.argwhere(case.start):
        fewer = case.start.copy()
        fewer[r, t] = False
        yield case._replace(start=fewer)


# ---------------------------------------------------------------------------------------------- laws over contents


def split(bench: Bench, case: Case) -> str:
    y, state = bench.run(apply, case)
    if case.valid.all() and not case.start.any():  # without masks, in shapes of their own
        y1, s = bench.run(apply, case, cut=slice(0, CUT))
        y2, s = bench.run(apply, case, s, cut=slice(CUT, T))
        _same(np.concatenate([y1, y2], 1), y, "y", f", really cut at {CUT}")
        _same_state(s, state, f", really cut at {CUT}")
    for cut in range(1, T):
        left = np.arange(T) < cut
        y1, s = bench.run(apply, case._replace(valid=case.valid & left, start=case.start & left))
        y2, s = bench.run(apply, case._replace(valid=case.valid & ~left, start=case.start & ~left), s)
        _same(np.where(_beside(left[None], y), y1, y2), y, "y", f", cut at {cut}", case.valid)
        _same_state(s, state, f", cut at {cut}")
    return "every cut"


def step(bench: Bench, case: Case) -> str:
    y, state = bench.run(apply, case)
    y1, s = bench.run(scan_of_step, case)
    _same(y1, y, "y", valid=case.valid)
    _same_state(s, state)
    return "every token"


def causal(bench: Bench, case: Case) -> str:
    y, _ = bench.run(apply, case)
    for t in range(1, T):
        rng, later = np.random.default_rng(t), np.broadcast_to(np.arange(T) >= t, (B, T))
        other = bench.contents(rng.random((B, T)) < 0.7, rng.random((B, T)) < 0.2, rng=rng)
        mixed = [a if a is None else np.where(_beside(later, a), b, a) for a, b in zip(case[:4], other[:4], strict=True)]
        seen = case.valid & ~later
        _same(bench.run(apply, Case(*mixed, case.fresh))[0], y, "y", f", other tokens from {t} on", seen)
    return "other tokens behind every token"


def batch(bench: Bench, case: Case) -> str:
    y, state = bench.run(apply, case)
    begin = bench.fresh if case.fresh else bench.warm
    for r in range(B):
        copies = [r] * B
        alike = Case(*(a if a is None else a[copies] for a in case[:4]))
        y1, s = bench.run(apply, alike, bench.rows(begin, copies))
        _same(y1, y[copies], "y", f", row {r} beside copies of itself", alike.valid)
        _same_state(s, bench.rows(state, copies), f", row {r} beside copies of itself")
    return "every row beside copies of itself"


def padding(bench: Bench, case: Case) -> str:
    y, state = bench.run(apply, poisoned := _poison(bench.memory, case))
    if not np.isfinite(y).all():
        r, t = np.argwhere(~np.isfinite(y))[0][:2]
        raise Broken(f"y is not finite at row {r}, token {t}, which is {'' if case.valid[r, t] else 'in'}valid")
    n, left, where = case.valid.sum(1), _to_the_left(case), ", NaN and huge numbers in invalid tokens"
    y1, s = bench.run(apply, left)
    _same(y[case.valid], y1[left.valid], "y", f"{where}, against padding on the right", places=np.argwhere(case.valid))
    _same_state(state, s, f"{where}, against padding on the right")
    if (n == CUT).all() and not case.start.any():
        y1, s = bench.run(apply, left, cut=slice(0, CUT))
        places = np.argwhere(case.valid)
        _same(y[case.valid], y1.reshape(-1, *y1.shape[2:]), "y", f"{where}, against no padding", places=places)
        _same_state(state, s, f"{where}, against no padding")
    never = np.zeros((B, T), bool)
    _, s = bench.run(apply, _poison(bench.memory, poisoned._replace(valid=never, start=never)))
    _same_state(s, bench.fresh if case.fresh else bench.warm, ", nothing valid", error=0.0)
    return "NaN and huge numbers on the left, in the middle, on the right; nothing valid: the same bits"


def packing(bench: Bench, case: Case) -> str:
    y, state = bench.run(apply, case)
    rows = bench.join(bench.fresh if case.fresh else bench.warm, bench.fresh)
    documents = []  # row, first and last token, the row it begins with
    for r in range(B):
        bounds = [0, *np.flatnonzero(case.start[r]), T]
        documents += [(r, lo, hi, r if i == 0 else B + r) for i, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False))]
    for i in range(0, len(documents), B):
        group = (documents[i : i + B] * B)[:B]
        index = [d[0] for d in group]
        inside = np.stack([(np.arange(T) >= lo) & (np.arange(T) < hi) for _, lo, hi, _ in group])
        alone = Case(*(a if a is None else a[index] for a in case[:3]), np.zeros((B, T), bool))
        alone = alone._replace(valid=alone.valid & inside)
        y1, s = bench.run(apply, alone, bench.rows(rows, [d[3] for d in group]))
        for j, (r, lo, hi, _) in enumerate(group):
            where = f", row {r}, document of tokens {lo} to {hi}"
            _same(y[r : r + 1], y1[j : j + 1], "y", where, alone.valid[j : j + 1])
            if hi == T:
                _same_state(bench.rows(state, [r]), bench.rows(s, [j]), where)
    return "every document by itself, begun at valid and invalid tokens"


def gradients(bench: Bench, case: Case) -> str:
    case = _poison(bench.memory, case)
    _, _, _, grads = bench.grade(apply, case, dtype=np.float64)
    for name, g in grads.items():
        if not np.isfinite(g).all():
            raise Broken(f"the gradient of {name} is not finite")
    inputs = (bench.params, bench.fresh if case.fresh else bench.warm, case.x)
    flat, tree = jax.tree.flatten(inputs)
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal(np.shape(a)) if _is_float(a) else None for a in flat]
    length = np.sqrt(sum(float((d * d).sum()) for d in draw if d is not None)) or 1.0
    floats = [i for i, d in enumerate(draw) if d is not None]

    def slopes(which: list[int]) -> tuple[float, float]:
        """Along one direction in the arrays named: the central difference, and what the gradient says."""

        def at(eps):
            moved = [eps / length * d if i in which else np.zeros((), np.int32) for i, d in enumerate(draw)]
            return float(bench.grade(apply, case, dtype=np.float64, moved=tree.unflatten(moved))[0])

        names = list(grads)
        said = sum(float((grads[names[floats.index(i)]] * draw[i]).sum()) for i in which) / length
        return (at(1e-5) - at(-1e-5)) / 2e-5, said

    differ = lambda found, said: not abs(found - said) <= 1e-6 * (1 + abs(found))  # noqa: E731
    if floats and differ(*slopes(floats)):
        for i in floats:  # which of the arrays
            found, said = slopes([i])
            if differ(found, said):
                raise Broken(f"{list(grads)[floats.index(i)]}: the finite difference is {found:.6g}, the gradient says {said:.6g}")
        raise Broken("the gradient is not the finite difference of all arrays together")
    for name, g in bench.grade(scan_of_step, case, dtype=np.float64)[3].items():
        _same(grads[name], g, f"the gradient of {name}", " from that through the scan of step", error=FLOAT64, places=())
    return "finite; the finite difference and the scan of step, in float64"


def precision(bench: Bench, case: Case) -> str:
    m = bench.memory
    if m.takes_ids and not _has_dtype(m):
        raise NotApplicable("it takes token ids and has no field dtype")
    narrow = case if m.takes_ids else case._replace(x=case.x.astype(jnp.bfloat16))
    y, state = bench.run(apply, case)
    y16, s16 = bench.run(apply, narrow, memory=_with_dtype(m, "bfloat16"))
    if not m.takes_ids and y16.dtype != jnp.bfloat16:
        raise Broken(f"x is bfloat16, y is {y16.dtype}")
    pairs = [("y", y16[case.valid], y[case.valid])]
    pairs += [(f"state{n}", a, b) for (n, a), b in zip(_named(s16), jax.tree.leaves(state), strict=True) if _is_float(a)]
    ratios = {name: _rms(np.subtract(a, b, dtype=np.float64)) / (_rms(b) or 1.0) for name, a, b in pairs}
    name = max(ratios, key=ratios.__getitem__)
    if not ratios[name] <= bench.bfloat16_error:
        raise Broken(f"{name} in bfloat16 is {ratios[name]:.1e} of its size away from float32, stated: {bench.bfloat16_error:.0e}")
    return f"bfloat16 within {ratios[name]:.1e} of float32, stated: {bench.bfloat16_error:.0e}"


def kernels(bench: Bench, case: Case) -> str:
    here = [n for n in bench.memory.implementations if not n.startswith("pallas_") or n.endswith(jax.default_backend())]
    others = [n for n in here if n != "reference"]
    if not others:
        raise NotApplicable("it calls no op that has several implementations on this platform")
    _, y, state, grads = bench.grade(apply, case, how=How(implementation="reference"))
    for name in others:
        _, y1, s, g1 = bench.grade(apply, case, how=How(implementation=name))
        _same(y1, y, "y", f", {name!r} against 'reference'", case.valid)
        _same_state(s, state, f", {name!r} against 'reference'")
        for leaf, g in grads.items():
            _same(g1[leaf], g, f"the gradient of {leaf}", f", {name!r} against 'reference'", error=4 * FLOAT32, places=())
    return f"{', '.join(others)} = reference"


def sharded(bench: Bench, case: Case) -> str:
    from memjax.parallel import make_mesh, sequence_parallel  # not needed by the other laws

    n = next((n for n in (4, 2) if len(jax.devices()) >= n), 1)
    if n == 1:
        raise NotApplicable("one device")
    devices, m = jax.devices()[:n], bench.memory
    mesh = make_mesh({"rows": n}, devices)
    place = lambda axes: NamedSharding(mesh, PartitionSpec(*("rows" if a == "batch" else None for a in axes)))  # noqa: E731
    begin = bench.fresh if case.fresh else bench.warm
    specs = m.state_specs(B)
    state = jax.tree.map(lambda a, s: jax.device_put(a, place(s.axes)), begin, specs)
    params = jax.tree.map(lambda a: jax.device_put(a, place(())), bench.params)
    tokens = [a if a is None else jax.device_put(a, place(("batch",))) for a in case[:4]]
    y, s = bench.run(apply, case)
    y1, s1 = _numpy(bench.program(apply)(m, How(), params, state, *tokens))
    _same(y1, y, "y", f", rows over {n} devices", case.valid)
    _same_state(s1, s, f", rows over {n} devices")

    dtype, error = (np.float64, FLOAT64) if devices[0].platform == "cpu" else (np.float32, 4 * FLOAT32)
    split_in_time = sequence_parallel(_with_dtype(m, np.dtype(dtype).name), make_mesh({"time": n}, devices), "time")
    _, y, s, grads = bench.grade(apply, case, dtype=dtype)
    _, y1, s1, g1 = bench.grade(apply, case, split_in_time, dtype=dtype)
    _same(y1, y, "y", f", the sequence over {n} devices", case.valid, error=error)
    _same_state(s1, s, f", the sequence over {n} devices", error=error)
    for name, g in grads.items():
        _same(g1[name], g, f"the gradient of {name}", f", the sequence over {n} devices", error=error, places=())
    return f"rows and the sequence over {n} devices"


# ---------------------------------------------------------------------------------------------- laws of their own


def bounded(bench: Bench) -> str:
    m, state = bench.memory, bench.warm
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    if held != m.state_bytes(B):
        raise Broken(f"state_bytes({B}) is {m.state_bytes(B)}, the state has {held}")
    sizes, case = [], bench.contents()
    for call in range(61):
        if call % 30 == 0:
            sizes.append({n: np.abs(a).max(initial=0) for n, a in _named(state) if _is_float(a)})
        state = bench.run(apply, case, state)[1]
    for name, first in sizes[0].items():
        half, full = sizes[1][name], sizes[2][name]
        if not (np.isfinite(full) and full - half <= 3 * max(half - first, 0) + 3 * (1 + first)):
            raise Broken(f"state{name} grew from {first:.2g} to {half:.2g} in {30 * T} tokens and to {full:.2g} in {60 * T}")
    return f"{m.state_bytes(1):,} B a row, after {60 * T} tokens too"


def saved(bench: Bench) -> str:
    m = bench.memory
    try:
        again = from_config(json.loads(json.dumps(to_config(m))))
    except TypeError as error:
        raise Broken(f"the configuration is not JSON: {error}") from error
    if again != m or hash(again) != hash(m) or config_hash(again) != config_hash(m):
        raise Broken(f"from_config(to_config(memory)) is {again}")
    try:
        from orbax.checkpoint import v1 as ocp
    except ImportError as error:
        raise Broken("needs orbax-checkpoint 0.12 or newer: pip install orbax-checkpoint") from error
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(lambda key: {"params": again.init(key), "state": again.init_state(B)}, jax.random.key(0))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), like)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        ocp.save(path, jax.tree.map(jnp.asarray, {"params": bench.params, "state": bench.warm}))
        loaded = _numpy(ocp.load(path, like))
    _same_state(loaded["params"], bench.params, " after the disk", error=0.0, label="params")
    _same_state(loaded["state"], bench.warm, " after the disk", error=0.0)
    case = bench.contents()
    y, state = bench.run(apply, case)
    y1, s = bench.run(apply, case, loaded["state"], memory=again)
    _same(y1, y, "y", ", continued from the disk", error=0.0)
    _same_state(s, state, ", continued from the disk", error=0.0)
    return "configuration, parameters and state; continued bit for bit"


def transformed(bench: Bench) -> str:
    m, (one, two) = bench.memory, (bench.contents(), bench.contents())
    want = bench.run(apply, one), bench.run(apply, two)
    before = bench.traces
    bench.run(apply, bench.contents())
    if bench.traces != before:
        raise Broken("a second call with other values is traced again")

    call = lambda state, tokens: apply(m, How(), bench.params, state, *tokens)  # noqa: E731
    both = jax.tree.map(lambda *a: np.stack(a), (bench.warm, one[:4]), (bench.warm, two[:4]))
    got = _numpy(jax.jit(jax.vmap(call), compiler_options=bench.options)(*both))
    for i, (y, new) in enumerate(want):
        _same(got[0][i], y, "y", " under vmap")
        _same_state(jax.tree.map(lambda a, i=i: a[i], got[1]), new, " under vmap")

    state, tokens = jax.tree.map(jnp.asarray, (bench.warm, one[:4]))

    def total(params, how):
        return jnp.sum(apply(m, how, params, state, *tokens)[0].astype(jnp.float32))

    for way, f in (("checkpoint", jax.checkpoint(total, static_argnums=1)), ("how.remat", total)):
        try:
            jax.eval_shape(lambda p, f=f, way=way: jax.grad(f)(p, How(remat=way == "how.remat")), bench.params)
        except Exception as error:
            raise Broken(f"grad with {way} raises {type(error).__name__}: {error}") from error
    shapes = jax.eval_shape(lambda s: lax.scan(lambda s, _: (call(s, tokens)[1], None), s, length=2)[0], state)
    if jax.tree.map(lambda a: (a.shape, a.dtype), shapes) != jax.tree.map(lambda a: (a.shape, a.dtype), state):
        raise Broken("the state under eval_shape of a scan is another one")
    return "jit, vmap, grad, scan, remat, eval_shape; traced once"


def _golden(golden: Callable | None) -> Result:
    if golden is None:
        return Result("golden", None, "n/a: no recorded numbers given")
    try:
        rows = [(array, error, ok) for array, error, ok in golden()]
    except Exception as error:
        return Result("golden", False, f"raises {type(error).__name__}: {error}")
    off = [f"{array} off by {error:.1e}" for array, error, ok in rows if not ok]
    if off or not rows:
        return Result("golden", False, "; ".join(off) or "holds no array")
    return Result("golden", True, f"{_count(len(rows), 'array')}, worst {max(error for _, error, _ in rows):.1e}")


# What a case is drawn for, and may be declared off; then those with contents of their own. In the order they are checked.
CONTENTS: dict[str, Callable[[Bench, Case], str]] = {
    "split": split,
    "step": step,
    "causal": causal,
    "batch": batch,
    "padding": padding,
    "packing": packing,
    "gradients": gradients,
    "precision": precision,
    "kernels": kernels,
    "sharded": sharded,
}
LAWS: dict[str, Callable] = {
    **{name: CONTENTS[name] for name in ("split", "step", "causal", "batch", "padding", "packing")},
    "bounded": bounded,
    **{name: CONTENTS[name] for name in ("gradients", "precision", "kernels", "sharded")},
    "saved": saved,
    "transformed": transformed,
    "golden": _golden,
}
GRADED = {f: partial(graded, f) for f in (apply, scan_of_step)}


# ---------------------------------------------------------------------------------------------- comparing


def _same(got, want, what: str, where: str = "", valid=None, *, error: float = FLOAT32, places=None) -> None:
    """Raises Broken at the first entry of got that differs; its first two axes are row and token, or `places` says."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise Broken(f"{what} is {list(got.shape)}, not {list(want.shape)}{where}")
    gap = np.abs(np.subtract(got, want, where=got != want, out=np.zeros_like(got)))
    if valid is not None:
        gap = np.where(_beside(valid, gap), gap, 0)
        want = np.where(_beside(valid, want), want, 0)
    size = np.abs(want[np.isfinite(want)]).max(initial=0)
    off = ~(gap <= error * (0.1 + size))
    if not off.any():
        return
    first = tuple(np.argwhere(off)[0])
    at = "" if places == () else " at row {}, token {}".format(*(first if places is None else places[first[0]]))
    raise Broken(f"{what} off by {gap[first]:.1e}{at}{where}")


def _same_state(got, want, where: str = "", *, error: float = FLOAT32, label: str = "state") -> None:
    for (name, a), b in zip(_named(got), jax.tree.leaves(want), strict=True):
        _same(a, b, f"{label}{name}", where, error=error, places=())


def _poison(memory: Memory, case: Case) -> Case:
    """NaN and huge numbers by turns, and ids that are no ids, in the invalid tokens."""
    odd = (np.arange(T) % 2 == 1)[None]
    bad_x = np.where(odd, np.float32(np.nan), np.float32(1e30))
    bad_id = np.where(odd, -7, (memory.reads_ids or 0) + 1000).astype(np.int32)
    put = lambda a, bad: np.where(_beside(case.valid, a), a, _beside(bad, a))  # noqa: E731
    ids = None if case.ids is None else put(case.ids, bad_id)
    return case._replace(x=put(case.x, bad_id if memory.takes_ids else bad_x), ids=ids)


def _to_the_left(case: Case) -> Case:
    """The same documents with all padding on the right; a start at padding falls to the next valid token, or behind the last."""
    order = np.argsort(~case.valid, 1, kind="stable")
    moved = [a if a is None else np.take_along_axis(a, _beside(order, a), 1) for a in case[:3]]
    start = np.zeros_like(case.start)
    before = np.cumsum(case.valid, 1) - case.valid  # valid tokens before each token: where a start there has to stand
    for r, t in np.argwhere(case.start):
        start[r, before[r, t]] = True
    return case._replace(x=moved[0], ids=moved[1], valid=moved[2], start=start)


def _beside(mask, like):
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _numpy(tree):
    return jax.tree.map(np.asarray, tree)


def _is_float(a) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _rms(a) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) if a.size else 0.0


def _named(tree):
    return [(_path(path), a) for path, a in jax.tree_util.tree_leaves_with_path(tree)]


def _path(path) -> str:
    return jax.tree_util.keystr(path)


def _has_dtype(memory: Memory) -> bool:
    return memory.takes_ids and any(f.name == "dtype" for f in dataclasses.fields(memory))


def _with_dtype(memory: Memory, dtype: str) -> Memory:
    """A language model computes in the dtype of its field, since ids have none to give."""
    return dataclasses.replace(memory, dtype=dtype) if _has_dtype(memory) else memory


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
