"""The laws that hold for any contents of a call: `law(bench, case)` raises `Broken`, or says what it looked at.

"Other contents" are other values in the arrays of the compiled call, so that most of these laws compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from memjax.laws.bench import CUT, B, Bench, Case, T, apply, has_dtype, scan_of_step, with_dtype
from memjax.laws.compare import (
    FLOAT32,
    FLOAT64,
    Broken,
    NotApplicable,
    beside,
    is_float,
    named,
    rms,
    same,
    same_state,
    to_numpy,
)
from memjax.memory import How, Memory


def split(bench: Bench, case: Case) -> str:
    """apply on x is apply on its pieces with the state carried over."""
    y, state = bench.run(apply, case)
    if case.valid.all() and not case.start.any():  # without masks, in shapes of their own
        y1, s = bench.run(apply, case, cut=slice(0, CUT))
        y2, s = bench.run(apply, case, s, cut=slice(CUT, T))
        same(np.concatenate([y1, y2], 1), y, "y", f", really cut at {CUT}")
        same_state(s, state, f", really cut at {CUT}")
    for cut in range(1, T):
        left = np.arange(T) < cut
        y1, s = bench.run(apply, case._replace(valid=case.valid & left, start=case.start & left))
        y2, s = bench.run(apply, case._replace(valid=case.valid & ~left, start=case.start & ~left), s)
        same(np.where(beside(left[None], y), y1, y2), y, "y", f", cut at {cut}", case.valid)
        same_state(s, state, f", cut at {cut}")
    return "every cut"


def step(bench: Bench, case: Case) -> str:
    """apply is a scan of step."""
    y, state = bench.run(apply, case)
    y1, s = bench.run(scan_of_step, case)
    same(y1, y, "y", valid=case.valid)
    same_state(s, state)
    return "every token"


def causal(bench: Bench, case: Case) -> str:
    """An output does not change when later tokens do."""
    y, _ = bench.run(apply, case)
    for t in range(1, T):
        rng, later = np.random.default_rng(t), np.broadcast_to(np.arange(T) >= t, (B, T))
        other = bench.contents(rng.random((B, T)) < 0.7, rng.random((B, T)) < 0.2, rng=rng)
        mixed = case.map(lambda a, b, later=later: np.where(beside(later, a), b, a), other)
        same(bench.run(apply, mixed)[0], y, "y", f", other tokens from {t} on", case.valid & ~later)
    return "other tokens behind every token"


def batch(bench: Bench, case: Case) -> str:
    """Each row is what it is alone."""
    y, state = bench.run(apply, case)
    begin = bench.fresh if case.fresh else bench.warm
    for r in range(B):
        copies = [r] * B
        alike = case.map(lambda a, copies=copies: a[copies])
        y1, s = bench.run(apply, alike, bench.rows(begin, copies))
        same(y1, y[copies], "y", f", row {r} beside copies of itself", alike.valid)
        same_state(s, bench.rows(state, copies), f", row {r} beside copies of itself")
    return "every row beside copies of itself"


def padding(bench: Bench, case: Case) -> str:
    """Invalid tokens change neither the state nor a valid output."""
    y, state = bench.run(apply, poisoned := poison(bench.memory, case))
    if not np.isfinite(y).all():
        r, t = np.argwhere(~np.isfinite(y))[0][:2]
        raise Broken(f"y is not finite at row {r}, token {t}, which is {'' if case.valid[r, t] else 'in'}valid")
    n, left, where = case.valid.sum(1), to_the_left(case), ", NaN and huge numbers in invalid tokens"
    y1, s = bench.run(apply, left)
    same(y[case.valid], y1[left.valid], "y", f"{where}, against padding on the right", places=np.argwhere(case.valid))
    same_state(state, s, f"{where}, against padding on the right")
    if (n == CUT).all() and not case.start.any():
        y1, s = bench.run(apply, left, cut=slice(0, CUT))
        places = np.argwhere(case.valid)
        same(y[case.valid], y1.reshape(-1, *y1.shape[2:]), "y", f"{where}, against no padding", places=places)
        same_state(state, s, f"{where}, against no padding")
    never = np.zeros((B, T), bool)
    _, s = bench.run(apply, poison(bench.memory, poisoned._replace(valid=never, start=never)))
    same_state(s, bench.fresh if case.fresh else bench.warm, ", nothing valid", error=0.0)
    return "NaN and huge numbers on the left, in the middle, on the right; nothing valid: the same bits"


def packing(bench: Bench, case: Case) -> str:
    """Packed documents are the documents one by one."""
    y, state = bench.run(apply, case)
    rows = bench.join(bench.fresh if case.fresh else bench.warm, bench.fresh)
    documents = []  # row, first and last token, the row it begins with
    for r in range(B):
        bounds = [0, *np.flatnonzero(case.start[r]).tolist(), T]
        documents += [(r, lo, hi, r if i == 0 else B + r) for i, (lo, hi) in enumerate(pairwise(bounds))]
    for i in range(0, len(documents), B):
        group = (documents[i : i + B] * B)[:B]
        index = [d[0] for d in group]
        inside = np.stack([(np.arange(T) >= lo) & (np.arange(T) < hi) for _, lo, hi, _ in group])
        alone = case.map(lambda a, index=index: a[index])
        alone = alone._replace(valid=alone.valid & inside, start=np.zeros((B, T), bool))
        y1, s = bench.run(apply, alone, bench.rows(rows, [d[3] for d in group]))
        for j, (r, lo, hi, _) in enumerate(group):
            where = f", document of tokens {lo} to {hi - 1} alone"
            same(y[r], y1[j], "y", where, alone.valid[j], places=[(r, t) for t in range(T)])
            if hi == T:
                same_state(bench.rows(state, [r]), bench.rows(s, [j]), where)
    return "every document by itself, begun at valid and invalid tokens"


def gradients(bench: Bench, case: Case) -> str:
    """Finite, equal to finite differences and to those through the scan of step."""
    case = poison(bench.memory, case)
    _, _, _, grads = bench.grade(apply, case, dtype=np.float64)
    for name, g in grads.items():
        if not np.isfinite(g).all():
            raise Broken(f"the gradient of {name} is not finite")
    inputs = {"params": bench.params, "state": bench.fresh if case.fresh else bench.warm, "x": case.x}
    rng = np.random.default_rng(0)
    leaves = [pair for label, tree in inputs.items() for pair in named(tree, label)]
    draw = {name: rng.standard_normal(a.shape) for name, a in leaves if is_float(a)}
    length = np.sqrt(sum((d * d).sum() for d in draw.values())) or 1.0

    def slopes(names: Iterable[str]) -> tuple[float, float]:
        """Along one direction in the arrays named: the central difference, and what the gradient says."""

        def value(eps):
            moves = {name: eps / length * draw[name] for name in names}
            return float(bench.grade(apply, case, dtype=np.float64, moves=moves)[0])

        return (value(1e-5) - value(-1e-5)) / 2e-5, sum(float((grads[n] * draw[n]).sum()) for n in names) / length

    differ = lambda found, said: not abs(found - said) <= 1e-6 * (1 + abs(found))  # noqa: E731
    if differ(*slopes(draw)):
        for name in draw:  # which of the arrays
            found, said = slopes([name])
            if differ(found, said):
                raise Broken(f"{name}: the finite difference is {found:.6g}, the gradient says {said:.6g}")
        raise Broken("the gradient is not the finite difference of all arrays together")
    for name, g in bench.grade(scan_of_step, case, dtype=np.float64)[3].items():
        same(grads[name], g, f"the gradient of {name}", ", against the scan of step", error=FLOAT64, places=())
    return "finite; the finite difference and the scan of step, in float64"


def precision(bench: Bench, case: Case) -> str:
    """bfloat16 in, bfloat16 out, near float32."""
    m = bench.memory
    if m.takes_ids and not has_dtype(m):
        raise NotApplicable("it takes token ids and has no field dtype")
    narrow = case if m.takes_ids else case._replace(x=case.x.astype(jnp.bfloat16))
    y, state = bench.run(apply, case)
    y16, s16 = bench.run(apply, narrow, memory=with_dtype(m, "bfloat16"))
    if not m.takes_ids and y16.dtype != jnp.bfloat16:
        raise Broken(f"x is bfloat16, y is {y16.dtype}")
    pairs = [("y", y16[case.valid], y[case.valid])]
    pairs += [(n, a, b) for (n, a), b in zip(named(s16), jax.tree.leaves(state), strict=True) if is_float(a)]
    ratios = {name: rms(np.subtract(a, b, dtype=np.float64)) / (rms(b) or 1.0) for name, a, b in pairs}
    name = max(ratios, key=ratios.__getitem__)
    if not ratios[name] <= bench.bfloat16_error:
        raise Broken(f"{name} in bfloat16 off by {ratios[name]:.1e} of its size, stated: {bench.bfloat16_error:.0e}")
    return f"bfloat16 off by {ratios[name]:.1e}, stated: {bench.bfloat16_error:.0e}"


def kernels(bench: Bench, case: Case) -> str:
    """Every implementation is "reference"."""
    here = [n for n in bench.memory.implementations if not n.startswith("pallas_") or n.endswith(jax.default_backend())]
    others = [n for n in here if n != "reference"]
    if not others:
        raise NotApplicable("it calls no op that has several implementations on this platform")
    _, y, state, grads = bench.grade(apply, case, how=How(implementation="reference"))
    for name in others:
        _, y1, s, g1 = bench.grade(apply, case, how=How(implementation=name))
        same(y1, y, "y", f", {name!r} against 'reference'", case.valid)
        same_state(s, state, f", {name!r} against 'reference'")
        for leaf, g in grads.items():
            where = f", {name!r} against 'reference'"
            same(g1[leaf], g, f"the gradient of {leaf}", where, error=4 * FLOAT32, places=())
    return f"{', '.join(others)} = reference"


def sharded(bench: Bench, case: Case) -> str:
    """Rows and sequence over devices give the result of one."""
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
    tokens = case.map(lambda a: jax.device_put(a, place(("batch",))))[:4]
    y, s = bench.run(apply, case)
    y1, s1 = to_numpy(bench.program(apply)(m, How(), params, state, *tokens))
    same(y1, y, "y", f", rows over {n} devices", case.valid)
    same_state(s1, s, f", rows over {n} devices")

    dtype, error = (np.float64, FLOAT64) if devices[0].platform == "cpu" else (np.float32, 4 * FLOAT32)
    split_in_time = sequence_parallel(with_dtype(m, np.dtype(dtype).name), make_mesh({"time": n}, devices), "time")
    _, y, s, grads = bench.grade(apply, case, dtype=dtype)
    _, y1, s1, g1 = bench.grade(apply, case, split_in_time, dtype=dtype)
    same(y1, y, "y", f", the sequence over {n} devices", case.valid, error=error)
    same_state(s1, s, f", the sequence over {n} devices", error=error)
    for name, g in grads.items():
        same(g1[name], g, f"the gradient of {name}", f", the sequence over {n} devices", error=error, places=())
    return f"rows and the sequence over {n} devices"


def poison(memory: Memory, case: Case) -> Case:
    """NaN and huge numbers by turns, and ids that are no ids, in the invalid tokens."""
    odd = (np.arange(T) % 2 == 1)[None]
    bad_x = np.where(odd, np.float32(np.nan), np.float32(1e30))
    bad_id = np.where(odd, -7, (memory.reads_ids or 0) + 1000).astype(np.int32)
    put = lambda a, bad: np.where(beside(case.valid, a), a, beside(bad, a))  # noqa: E731
    ids = None if case.ids is None else put(case.ids, bad_id)
    return case._replace(x=put(case.x, bad_id if memory.takes_ids else bad_x), ids=ids)


def to_the_left(case: Case) -> Case:
    """The same documents with all padding on the right; a start at padding falls to the next valid token, or behind."""
    order = np.argsort(~case.valid, 1, kind="stable")
    start = np.zeros_like(case.start)
    before = np.cumsum(case.valid, 1) - case.valid  # valid tokens before each token: where a start there has to stand
    for r, t in np.argwhere(case.start):
        start[r, before[r, t]] = True
    return case.map(lambda a: np.take_along_axis(a, beside(order, a), 1))._replace(start=start)


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
