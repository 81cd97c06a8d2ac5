"""Memories made of memories. A combinator writes one function, `thread`: how x, params and state run through the parts.

Params, state and aux of a combinator have the same keys; only `Repeat` keeps the parameters of all layers in one array.
This file imports no architecture.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax

from memjax.layers import linear, rms_norm
from memjax.memory import Flow, How, Memory, Param, at_least, constant, dense, on_x


@runtime_checkable
class Call(Protocol):
    """What `thread` gets: runs one verb of a part. unrolled: layers may not be stacked under a scan."""

    @property
    def unrolled(self) -> bool: ...

    @property
    def remat(self) -> bool: ...

    def __call__(self, memory: Memory, params, state, x) -> tuple[Any, Any, Any]: ...


@dataclass(frozen=True)
class Verb:
    """A verb of the contract with its keyword arrays, as a combinator hands it to its parts."""

    name: str
    tokens: dict[str, Any]
    how: How

    @property
    def unrolled(self) -> bool:
        return self.name == "step"

    @property
    def remat(self) -> bool:
        return self.how.remat

    def __call__(self, memory: Memory, params, state, x) -> tuple[Any, Any, Any]:
        y, state, *aux = getattr(memory, self.name)(params, state, x, **self.tokens, how=self.how)
        return y, state, aux[0] if aux else {}


@dataclass(frozen=True)
class Combinator(Memory):
    """A memory around memories: the fields that are memories (or tuples of them) are its parts."""

    def thread(self, call: Call, params, state, x) -> tuple[Any, Any, Any]:
        """Run x through the parts by `call(memory, params, state, x) -> (y, state, aux)`.

        x and y are arrays, or each a `Flow` where a part has `streams`: `on_x` treats both alike.
        """
        raise NotImplementedError

    def apply_with_aux(
        self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()
    ) -> tuple[Any, Any, Any]:
        return self.thread(Verb("apply_with_aux", {"ids": ids, "valid": valid, "start": start}, how), params, state, x)

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()) -> tuple[Any, Any]:
        return self.thread(Verb("step", {"ids": ids, "valid": valid, "start": start}, how), params, state, x)[:2]

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()) -> tuple[Any, Any]:
        return self.thread(Verb("write", {"ids": ids, "valid": valid, "start": start}, how), params, state, x)[:2]

    @property
    def parts(self) -> tuple[Memory, ...]:
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return tuple(p for v in values for p in (v if isinstance(v, tuple) else (v,)) if isinstance(p, Memory))

    @property
    def dim(self) -> int:
        return self.parts[0].dim

    @property
    def reads_ids(self) -> int | None:
        return next((p.reads_ids for p in self.parts if p.reads_ids), None)

    @property
    def streams(self) -> bool:
        return any(p.streams for p in self.parts)

    @property
    def implementations(self) -> tuple[str, ...]:
        """What every part that calls an op has: a name is handed to all of them, and none falls back."""
        has = [p.implementations for p in self.parts if p.implementations]
        return tuple(n for n in has[0] if all(n in other for other in has)) if has else ()

    def _same_width(self) -> None:
        if len({p.dim for p in self.parts}) != 1:
            raise ValueError(
                f"{type(self).__name__}: the parts have dim {[p.dim for p in self.parts]}, needs one width"
            )


@dataclass(frozen=True)
class Residual(Combinator):
    """x + memory(rms_norm(x))."""

    memory: Memory
    eps: float = 1e-6

    def param_specs(self):
        return {"norm": Param((self.dim,), ("model",), constant(1), "vector"), "memory": self.memory.param_specs()}

    def state_specs(self, batch):
        return {"memory": self.memory.state_specs(batch)}

    def thread(self, call, params, state, x):
        normed = on_x(lambda a: rms_norm(a, params["norm"], self.eps), x)
        y, s, aux = call(self.memory, params["memory"], state["memory"], normed)
        return on_x(jnp.add, y, x), {"memory": s}, {"memory": aux}


@dataclass(frozen=True)
class Stack(Combinator):
    """Blocks of any kind, one after another."""

    blocks: tuple[Memory, ...]

    def __post_init__(self):
        self._same_width()

    def param_specs(self):
        return {str(i): m.param_specs() for i, m in enumerate(self.blocks)}

    def state_specs(self, batch):
        return {str(i): m.state_specs(batch) for i, m in enumerate(self.blocks)}

    def thread(self, call, params, state, x):
        states, auxes = {}, {}
        for i, m in enumerate(self.blocks):
            x, states[str(i)], auxes[str(i)] = call(m, params[str(i)], state[str(i)], x)
        return x, states, auxes


@dataclass(frozen=True)
class Repeat(Combinator):
    """n blocks of one kind, compiled once: parameters have a leading axis "layers"; state and aux are tuples of n.

    `apply` and `write` scan over the layers. `step` is unrolled, each state updated in place: under a scan every cache
    would be copied at every decoded token.
    """

    block: Memory
    n: int

    def __post_init__(self):
        at_least(self, 1, "n")

    def param_specs(self):
        return jax.tree.map(lambda p: stacked(p, self.n), self.block.param_specs())

    def state_specs(self, batch):
        return tuple(self.block.state_specs(batch) for _ in range(self.n))

    def thread(self, call, params, state, x):
        layer = lambda i: jax.tree.map(itemgetter(i), params)  # noqa: E731
        if call.unrolled:
            out = []
            for i in range(self.n):
                x, s, aux = call(self.block, layer(i), state[i], x)
                out.append((s, aux))
            states, auxes = zip(*out, strict=True)
            return x, states, auxes

        def body(x, now):
            y, s, aux = call(self.block, now[0], now[1], x)
            if isinstance(x, Flow) and (new := y.shared.keys() - x.shared.keys()):
                raise ValueError(
                    f"Repeat: its block hands on {min(new)!r}: put the layer that does so below the Repeat"
                )
            return y, (s, aux)

        body = jax.checkpoint(body, prevent_cse=False) if call.remat else body
        x, out = lax.scan(body, x, (params, jax.tree.map(lambda *a: jnp.stack(a), *state)), length=self.n)
        states, auxes = zip(*(jax.tree.map(itemgetter(i), out) for i in range(self.n)), strict=True)
        return x, states, auxes


def stacked(p: Param, n: int, axis: str | None = "layers") -> Param:
    """n of a parameter in one array, each drawn for itself, along a new first axis."""

    def init(key, shape):
        return jax.vmap(lambda k: p.init(k, shape[1:]))(jax.random.split(key, n))

    return dataclasses.replace(p, shape=(n, *p.shape), axes=(axis, *p.axes), init=init)


def pattern(*period: Memory, n: int) -> Memory:
    """A hybrid: the blocks of `period`, n times over (three linear, one attention, ...)."""
    return Repeat(Stack(period), n)


@dataclass(frozen=True)
class Gate(Combinator):
    """Two memories read the same x and a learned gate mixes them: g a(x) + (1 - g) b(x), g = sigmoid(x W)."""

    a: Memory
    b: Memory

    def __post_init__(self):
        self._same_width()

    def param_specs(self):
        gate = dense(self.dim, self.dim, ("model", None), "gate")
        return {"a": self.a.param_specs(), "b": self.b.param_specs(), "gate": gate}

    def state_specs(self, batch):
        return {"a": self.a.state_specs(batch), "b": self.b.state_specs(batch)}

    def thread(self, call, params, state, x):
        ya, sa, aux_a = call(self.a, params["a"], state["a"], x)
        yb, sb, aux_b = call(self.b, params["b"], state["b"], x)
        g = jax.nn.sigmoid(linear(x.x if isinstance(x, Flow) else x, params["gate"]))
        y = on_x(lambda a, b: g * a + (1 - g) * b, ya, yb)
        if isinstance(y, Flow):
            y = y.hand(y.x, **yb.shared)
        return y, {"a": sa, "b": sb}, {"a": aux_a, "b": aux_b}


def total(aux: Any) -> dict[str, Array]:
    """The auxiliary scalars of a whole model, added up over layers by their last name; other arrays are left out."""
    out: dict[str, Array] = {}
    for path, a in jax.tree_util.tree_leaves_with_path(aux):
        if a.ndim == 0:
            name = path[-1].key
            out[name] = out[name] + a if name in out else a
    return out
