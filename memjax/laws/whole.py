"""The laws about a memory as a whole: its size, its configuration and checkpoint, and what jax does with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.laws.bench import B, Bench, Case, T, apply
from memjax.laws.compare import Broken, count, is_float, named, same, same_state, to_numpy
from memjax.memory import How, config_hash, from_config, to_config


def bounded(bench: Bench) -> str:
    """Shapes, dtypes and bytes stay; growth is at most linear."""
    m, state = bench.memory, bench.warm
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    if held != m.state_bytes(B):
        raise Broken(f"state_bytes({B}) is {m.state_bytes(B)}, the state has {held}")
    sizes, case = [], bench.contents()
    for call in range(61):
        if call % 30 == 0:
            sizes.append({n: _size(a) for n, a in named(state) if is_float(a)})
        state = bench.run(apply, case, state)[1]
    for name, first in sizes[0].items():
        half, full = sizes[1][name], sizes[2][name]
        if not _linear(first, half, full):
            long = f"{name} grew from {first:.2g} to {half:.2g} in {30 * T} tokens and to {full:.2g} in {60 * T}"
            raise Broken(_fewest_tokens(bench, case, name) or long)
    return f"{held:,} B for {B} rows, after {60 * T} tokens too"


def _size(a: np.ndarray) -> float:
    return float(np.abs(a).max(initial=0))


def _linear(first: float, half: float, full: float) -> bool:
    """Whether a size grew no faster in the second half than in the first, with room for noise."""
    return bool(np.isfinite(full) and full - half <= 3 * max(half - first, 0) + 3 * (1 + first))


def _fewest_tokens(bench: Bench, case: Case, name: str) -> str | None:
    """The least that shows how an array of the state grows: one fresh row that reads the same few tokens twice."""
    for n in range(1, T + 1):
        for row in range(B):
            few = case._replace(valid=(np.arange(B) == row)[:, None] & (np.arange(T) < n), fresh=True)
            states = [bench.fresh]
            for _ in range(2):
                states.append(bench.run(apply, few, states[-1])[1])
            first, half, full = (_size(dict(named(s))[name]) for s in states)
            if not _linear(first, half, full):
                grew = f"{name} grew from {first:.2g} to {half:.2g} in {count(n, 'token')} and to {full:.2g} in {2 * n}"
                return f"{grew} ({few}, read twice)"
    return None


def saved(bench: Bench) -> str:
    """Configuration, parameters and state survive the disk."""
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
        path = str(Path(folder) / "memory")
        ocp.save(path, jax.tree.map(jnp.asarray, {"params": bench.params, "state": bench.warm}))
        loaded = to_numpy(ocp.load(path, like))
    same_state(loaded["params"], bench.params, " after the disk", error=0.0, label="params")
    same_state(loaded["state"], bench.warm, " after the disk", error=0.0)
    case = bench.contents()
    y, state = bench.run(apply, case)
    y1, s = bench.run(apply, case, loaded["state"], memory=again)
    same(y1, y, "y", ", continued from the disk", error=0.0)
    same_state(s, state, ", continued from the disk", error=0.0)
    return "configuration, parameters and state; continued bit for bit"


def transformed(bench: Bench) -> str:
    """jit, vmap, grad, scan, remat and eval_shape work, without retracing."""
    m, (one, two) = bench.memory, (bench.contents(), bench.contents())
    want = bench.run(apply, one), bench.run(apply, two)
    before = bench.traces
    bench.run(apply, bench.contents())
    if bench.traces != before:
        raise Broken("a second call with other values is traced again")

    call = lambda state, tokens: apply(m, How(), bench.params, state, *tokens)  # noqa: E731
    both = jax.tree.map(lambda *a: np.stack(a), (bench.warm, one[:4]), (bench.warm, two[:4]))
    got = to_numpy(jax.jit(jax.vmap(call), compiler_options=bench.options)(*both))
    for i, (y, new) in enumerate(want):
        same(got[0][i], y, "y", " under vmap")
        same_state(jax.tree.map(lambda a, i=i: a[i], got[1]), new, " under vmap")

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


WHOLE: dict[str, Callable[[Bench], str]] = {"bounded": bounded, "saved": saved, "transformed": transformed}
