"""The contract: what a memory is, and everything that follows from what it declares.

A memory is a frozen dataclass of hyperparameters with pure methods; it holds no array. An architecture writes
`param_specs`, `state_specs` and one of `apply` and `apply_with_aux`; the base class derives the rest: `init`,
`init_state`, `step`, `write`, `restart`, byte counts, axes, checks at trace time, and the configuration as JSON.

This file imports no architecture. Axes: b batch, t time, d model; `memjax.arrays` has the whole legend.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from memjax.errors import ConfigError

Kind: TypeAlias = Literal["matrix", "embedding", "vector", "gate"]
Initializer: TypeAlias = Callable[[Array, tuple[int, ...]], Array]

# State axes whose length is a capacity: a store may be larger than declared (a bank grows), never another shape.
CAPACITY_AXES = ("chunks", "documents")


# ---------------------------------------------------------------------------------------------- declarations


@dataclass(frozen=True)
class Param:
    """One parameter array, float32.

    axes: a logical name for each dimension ("model", "heads", "key", "value", "vocab", "mlp", "slots") or None.
    kind: the optimizer's group. matrix: a linear map (last two dimensions); embedding: rows that are looked up;
        vector: scales and convolutions; gate: what feeds a decay or a write strength.
    draws_like: the sibling parameter whose random numbers this one repeats (same shape and init: same values).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    kind: Kind = "matrix"
    draws_like: str | None = None


@dataclass(frozen=True)
class Slot:
    """One array of the state. The dimension named "batch" is the row; all rows share a slot without it (a store)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    fill: float | int | bool = 0


class NoState(NamedTuple):
    """The state of a memory that keeps nothing between tokens."""


class Flow(NamedTuple):
    """x on its way up a stack, with the streams that layers hand to those above them within one call.

    shared: name -> arrays. What belongs to tokens has a time axis, [b t ...], in `step` too, where t is 1. Only
    memories with `streams` meet a Flow; to all others, and to a caller, x and y are arrays.
    """

    x: Array
    shared: dict[str, Any]

    def take(self, name: str, reader: Memory) -> Any:
        """The stream of this name; ValueError where no layer below `reader` has handed it on."""
        if name not in self.shared:
            found = ", ".join(sorted(self.shared)) or "none"
            raise ValueError(f"{type(reader).__name__}: needs the stream {name!r} of a layer below it, here is {found}")
        return self.shared[name]

    def hand(self, x: Array, **streams: Any) -> Flow:
        """x for the next layer, and more streams."""
        return Flow(x, {**self.shared, **streams})


def on_x(f: Callable[..., Array], *flows: Any) -> Any:
    """f of the arrays; where they travel in a Flow, the first one's streams go on."""
    first, arrays = flows[0], [a.x if isinstance(a, Flow) else a for a in flows]
    return first._replace(x=f(*arrays)) if isinstance(first, Flow) else f(*arrays)


def specs(state: Callable[..., Any], **slots: Any) -> Any:
    """The declaration of a state: its NamedTuple, with a `Slot` (or the declaration of a part) where arrays will be."""
    return state(**slots)


def normal(std: float) -> Initializer:
    """Independent normal numbers of standard deviation `std`."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant(value: float | int) -> Initializer:
    """The same number everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def dense(
    n_in: int, n_out: int, axes: tuple[str | None, str | None] = ("model", "heads"), kind: Kind = "matrix"
) -> Param:
    """A linear map [n_in, n_out], normal with standard deviation n_in**-0.5."""
    return Param((n_in, n_out), axes, normal(n_in**-0.5), kind)


def at_least(memory: Memory, least: int, *fields: str) -> None:
    """For `__post_init__`: ValueError naming the first of these fields that is smaller. None passes."""
    for name in fields:
        value = getattr(memory, name)
        if value is not None and value < least:
            raise ValueError(f"{type(memory).__name__}: {name} is {value}, needs at least {least}")


@jax.tree_util.register_static
@dataclass(frozen=True)
class How:
    """How to compute, never what: handed down by combinators, read only by ops, convolutions and attention.

    implementation: None picks the best for the platform that is lowered for; a name never falls back.
    remat: recompute activations in the backward pass instead of keeping them: of each block of a `Repeat`, and of each
        turn of a sequence that is handed over between devices.
    """

    implementation: str | None = None
    remat: bool = False


# ---------------------------------------------------------------------------------------------- the contract


@dataclass(frozen=True)
class Memory:
    """Hyperparameters plus pure functions over `params` (nested dict) and `state` (pytree of fixed shapes).

    Every verb takes optional arrays beside x, [b, t] (in `step` [b]):
      ids    int32, token ids, for memories that are indexed by tokens
      valid  bool, False: padding; the token changes neither the state nor any valid output
      start  bool, True: the row is cleared before this token, valid or not: packed documents don't see each other
    Positions count the valid tokens since `start`. The output at an invalid token is arbitrary but finite.
    Compute dtype is the dtype of x; recurrent states accumulate in the dtype they are declared in.
    """

    dim: ClassVar[int]  # width of the model: x and y are [b, t, dim]; a field of every leaf, derived in combinators
    reads_ids: ClassVar[int | None] = None  # size of the vocabulary, where token ids are read
    takes_ids: ClassVar[bool] = False  # True: x itself is token ids [b, t] (a language model)
    streams: ClassVar[bool] = False  # True: apply gets and gives a `Flow`, to read or hand on what travels beside x
    implementations: ClassVar[tuple[str, ...]] = ()  # what `how.implementation` may name, where an op is called

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.apply is Memory.apply and cls.apply_with_aux is Memory.apply_with_aux:
            raise TypeError(f"{cls.__name__} must define apply or apply_with_aux")
        inherited = [v for v in ("step", "write") if getattr(cls, v) is getattr(Memory, v)]
        for verb in ("apply", "apply_with_aux", "step", "write"):
            if verb in cls.__dict__ or verb in inherited:
                setattr(cls, verb, _checked(getattr(cls, verb)))

    # what an architecture writes -----------------------------------------------------------------

    def param_specs(self) -> dict:
        """Nested dict of `Param`."""
        return {}

    def state_specs(self, batch: int) -> Any:
        """NamedTuple (leaves), dict or tuple (combinators) of `Slot`."""
        return NoState()

    def tensors(self) -> dict[str, Any]:
        """Parameter -> `memjax.tensors.Tensor`: where a published checkpoint holds it. Empty: none is known."""
        return {}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()) -> tuple[Any, Any]:
        """A sequence of any length t >= 1: x [b, t, dim] -> y [b, t, dim] and the new state."""
        return self.apply_with_aux(params, state, x, ids=ids, valid=valid, start=start, how=how)[:2]

    def apply_with_aux(
        self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()
    ) -> tuple[Any, Any, Any]:
        """As `apply`, with a nested dict of auxiliary losses and diagnostics as third value."""
        return *self.apply(params, state, x, ids=ids, valid=valid, start=start, how=how), {}

    # what follows --------------------------------------------------------------------------------

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()) -> tuple[Any, Any]:
        """One token of decoding: x [b, dim] -> y [b, dim] and the new state."""
        ids, valid, start = (None if a is None else a[:, None] for a in (ids, valid, start))
        x = on_x(lambda a: a[:, None], x)
        y, state = self.apply(params, state, x, ids=ids, valid=valid, start=start, how=how)
        return on_x(lambda a: a[:, 0], y), state

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()) -> tuple[Any, Any]:
        """Documents into the store; each row of the call begins one. Without a store: read from empty, forgotten."""
        empty = self.init_state(len(x.x if isinstance(x, Flow) else x))
        y, _ = self.apply(params, empty, x, ids=ids, valid=valid, start=start, how=how)
        return y, state

    def init(self, key: Array) -> dict:
        """Parameters. Each draws from a key made of `key` and its path: adding one leaves the others as they were."""
        flat, tree = jax.tree_util.tree_flatten_with_path(self.param_specs())
        return tree.unflatten([spec.init(_param_key(key, path, spec), spec.shape) for path, spec in flat])

    def init_state(self, batch: int) -> Any:
        """The empty memory for `batch` rows."""
        return jax.tree.map(_fill, self.state_specs(batch))

    def restart(self, state: Any, batch: int) -> Any:
        """`batch` fresh rows over the same store: slots without a batch axis are kept."""
        return jax.tree.map(lambda s, a: _fill(s) if "batch" in s.axes else a, self.state_specs(batch), state)

    def param_axes(self) -> dict:
        """The logical axes of each parameter, in the structure of `params`."""
        return jax.tree.map(lambda s: s.axes, self.param_specs())

    def state_axes(self) -> Any:
        """The logical axes of each array of the state."""
        return jax.tree.map(lambda s: s.axes, self.state_specs(1))

    def param_bytes(self) -> int:
        """Bytes of the parameters in float32."""
        return sum(4 * math.prod(s.shape) for s in jax.tree.leaves(self.param_specs()))

    def state_bytes(self, batch: int) -> int:
        """Bytes of the state, whatever the length of what was read."""
        return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in jax.tree.leaves(self.state_specs(batch)))

    @property
    def unplaced(self) -> Memory:
        """What the configuration describes: itself; of a wrapper that only places a memory on devices, that memory."""
        return self

    @property
    def has_store(self) -> bool:
        """True: some of the state is shared by all rows, and `write` fills it."""
        return any("batch" not in s.axes for s in jax.tree.leaves(self.state_specs(1)))

    def summary(self) -> str:
        """A table of every parameter and state array: path, shape, dtype, bytes (batch 1)."""
        rows = [
            (kind + jax.tree_util.keystr(path), list(s.shape), jnp.dtype(getattr(s, "dtype", jnp.float32)))
            for kind, specs in (("params", self.param_specs()), ("state", self.state_specs(1)))
            for path, s in jax.tree_util.tree_leaves_with_path(specs)
        ]
        wide = max((len(name) for name, _, _ in rows), default=0)
        lines = [f"{n:{wide}}  {d.name:8} {math.prod(s) * d.itemsize:>12,} B  {s}" for n, s, d in rows]
        total = f"params {self.param_bytes():,} B, state {self.state_bytes(1):,} B a row"
        return "\n".join([repr(self), *lines, total])


def _param_key(key: Array, path, spec: Param) -> Array:
    if spec.draws_like is not None:
        path = (*path[:-1], jax.tree_util.DictKey(spec.draws_like))
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def _fill(slot: Slot) -> Array:
    return jnp.full(slot.shape, slot.fill, slot.dtype)


# ---------------------------------------------------------------------------------------------- checks, at trace time


def _checked(verb):
    """Wrap a verb: a clear error for wrong arguments, x and ids zero where invalid, the same kind of state back."""

    @functools.wraps(verb)
    def wrapped(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        name = f"{type(self).__name__}.{verb.__name__}"
        outer, shared = x, x.shared if isinstance(x, Flow) else {}
        x = jnp.asarray(x.x if isinstance(x, Flow) else x)
        ids, valid, start = (None if a is None else jnp.asarray(a) for a in (ids, valid, start))
        axes = ("b",) if verb.__name__ == "step" else ("b", "t")
        _check_x(self, name, x, axes)
        rows = x.shape[: len(axes)]
        for label, a, dtype in (("ids", ids, jnp.integer), ("valid", valid, jnp.bool_), ("start", start, jnp.bool_)):
            if a is not None and not (a.shape == rows and jnp.issubdtype(a.dtype, dtype)):
                raise ValueError(f"{name}: {label} is {_show(a)}, needs {dtype.__name__}{list(rows)}")
        if self.reads_ids and ids is None and not self.takes_ids:
            raise ValueError(f"{name}: this memory is indexed by tokens, pass ids {list(rows)}")
        check_tree(name, "params", self.param_specs(), params)
        check_tree(name, "state", self.state_specs(x.shape[0]), state)
        if valid is not None:  # whatever stands at an invalid token, NaN included, must not travel
            x = jnp.where(valid.reshape(rows + (1,) * (x.ndim - len(rows))), x, jnp.zeros((), x.dtype))
            ids = None if ids is None else jnp.where(valid, ids, jnp.zeros((), ids.dtype))
        y, new, *aux = verb(
            self, params, state, Flow(x, shared) if self.streams else x, ids=ids, valid=valid, start=start, how=how
        )
        if self.streams:
            y, shared = y
        if not self.takes_ids and (y.shape, y.dtype) != (x.shape, x.dtype):
            raise TypeError(f"{name}: x is {_show(x)}, y is {_show(y)}; they must be alike")
        before, after = (jax.tree.map(_show, s) for s in (state, new))
        if before != after:
            raise TypeError(f"{name}: the state changed from {before} to {after}")
        return Flow(y, shared) if isinstance(outer, Flow) else y, new, *aux

    return wrapped


def _check_x(memory: Memory, name: str, x, axes: tuple[str, ...]) -> None:
    need = axes if memory.takes_ids else (*axes, str(memory.dim))
    kind = jnp.integer if memory.takes_ids else jnp.floating
    same = x.ndim == len(need) and (memory.takes_ids or x.shape[-1] == memory.dim)
    if not (same and jnp.issubdtype(x.dtype, kind)):
        raise ValueError(f"{name}: x is {_show(x)}, needs {kind.__name__}[{', '.join(need)}]")
    if 0 in x.shape:
        raise ValueError(f"{name}: x is {_show(x)}, needs at least one row and one token")


def check_tree(name: str, label: str, specs, tree) -> None:
    """Structure and shapes of `tree` against its declaration; dtypes by kind, since tests run them wider."""
    want, got = (dict(_named_leaves(a)) for a in (specs, tree))
    if missing := [k for k in want if k not in got]:
        raise ValueError(f"{name}: {label} has no {label}{missing[0]}; it belongs to another configuration")
    if extra := [k for k in got if k not in want]:
        raise ValueError(f"{name}: {label}{extra[0]} is not declared; it belongs to another configuration")
    for path, spec in want.items():
        a, shape = got[path], spec.shape
        same = len(a.shape) == len(shape) and all(
            m == n or axis in CAPACITY_AXES for m, n, axis in zip(a.shape, shape, spec.axes, strict=True)
        )
        dtype = jnp.dtype(getattr(spec, "dtype", jnp.float32))
        if not same or _kind(a.dtype) != _kind(dtype):
            raise ValueError(f"{name}: {label}{path} is {_show(a)}, needs {dtype.name}{list(shape)}")


def _named_leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _kind(dtype):
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(dtype).kind


def _show(a) -> str:
    return f"{jnp.dtype(a.dtype).name}{list(a.shape)}"


# ---------------------------------------------------------------------------------------------- configurations


def named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, "body.0.memory.w_q", in the order of the tree."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(specs: Any, flat: Mapping[str, Any]) -> Any:
    """The tree whose leaves stand in `flat` by dotted path; specs: any tree of its structure."""
    return jax.tree.unflatten(jax.tree.structure(specs), [flat[name] for name in named(specs)])


def to_config(memory: Any) -> Any:
    """Hyperparameters as plain JSON values; a memory becomes a dict with its type under "class"."""
    if isinstance(memory, Memory):
        memory = memory.unplaced
        fields = {f.name: to_config(getattr(memory, f.name)) for f in dataclasses.fields(memory) if f.init}
        return {"class": f"{type(memory).__module__}.{type(memory).__qualname__}", **fields}
    return [to_config(v) for v in memory] if isinstance(memory, tuple) else memory


def from_config(config: Any) -> Any:
    """The memory of a configuration made by `to_config`. Only memjax's classes and modules already imported are built.

    Raises ConfigError naming the class or field that is unknown.
    """
    if isinstance(config, list | tuple):
        return tuple(from_config(v) for v in config)
    if not isinstance(config, dict):
        return config
    path = config.get("class")
    if not isinstance(path, str) or "." not in path:
        raise ConfigError(f"config: 'class' is {path!r}, needs 'module.Class'")
    module, _, name = path.rpartition(".")
    if not (module in sys.modules or module.split(".")[0] == "memjax"):
        raise ConfigError(f"config: class {path!r} is not memjax's; import its module first")
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"config: class {path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Memory)):
        raise ConfigError(f"config: class {path!r} is not a Memory")
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := [k for k in config if k not in fields | {"class"}]:
        raise ConfigError(f"config: {path} has no field {unknown[0]!r}; it has {sorted(fields)}")
    values = {k: from_config(v) for k, v in config.items() if k != "class"}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config: {path} cannot be built: {error}") from error


def config_hash(memory: Memory) -> str:
    """sha256 of the configuration as canonical JSON."""
    return hashlib.sha256(json.dumps(to_config(memory), sort_keys=True).encode()).hexdigest()
