"""Sequence parallelism by hand-over: each device holds a slice of the sequence, the state goes from one to the next.

It asks nothing of a memory but the contract (a call on two halves equals a call on the whole), so it is exact for every
memory that obeys the law `split`. MSA does not inside a question that begins in the call: each rank would route by its
own slice, so keep the routing of a question on one device.

The ranks of the axis hold the slices in order. A rank can't begin before the state of the slice before its own has
arrived; so that it has something to do meanwhile, the rows of the batch are cut into n micro-batches:

    tick       0    1    2    3    4        n = 3 micro-batches a b c on 3 ranks; one letter is one call of the memory
    rank 0     a    b    c    .    .        on a third of the sequence. After each tick every state moves one rank down,
    rank 1     .    a    b    c    .        and after tick ranks + n - 2 all final states stand on the last one.
    rank 2     .    .    a    b    c

A device is busy n of ranks + n - 1 ticks. One row alone gains no time, only room: its state visits the ranks in turn.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from memjax.memory import How, Memory
from pallas_kernels.compat import match_varying


def sequence_parallel(
    memory: Memory,
    mesh: Mesh,
    axis: str = "sequence",
    batch_axis: str | None = None,
    micro_batches: int | None = None,
) -> Memory:
    """`memory` with time split over a mesh axis: the same contract, parameters, state and results.

    `apply` and `apply_with_aux` take and return global arrays: x [b, t, dim] and the keyword arrays [b, t], y sharded
    over (batch_axis, axis), the state replicated over `axis`. t must be a multiple of the ranks of `axis`; pad in the
    data pipeline with valid=False. Gradients flow as on one device. A single token can't be split, and documents go
    whole into a store: `step` and `write` are those of the memory.

    State without a batch axis (a store) is only read by `apply`, as the contract has it: it is not handed over, and
    comes back as it was given. Auxiliary values are reduced over ranks and micro-batches: floating ones to their mean
    (over slices, whatever the number of valid tokens in each), integers to their sum, bools to whether any is True.

    Without `how.remat` the backward pass keeps the activations of every tick, idle ones included: (ranks + n - 1) / n
    times those of the slice. With it, of a tick only the states are kept.

    Args:
      memory: any memory, language models included.
      mesh: axes of type Auto, as `make_mesh` makes them. Axes not named here are left to the compiler.
      axis: the mesh axis over which time is split.
      batch_axis: a mesh axis over which rows are split beside it, in x and (where it has rows) in the state.
      micro_batches: n, a divisor of the rows of a device. None: the largest divisor that is not above the ranks.

    Returns:
      A `SequenceParallel`, or `memory` itself where there is nothing to split: one rank and no batch_axis.

    Raises:
      ValueError: an axis that the mesh lacks or that isn't Auto, one axis given twice, micro_batches below 1.
    """
    for name, value in (("axis", axis), ("batch_axis", batch_axis)):
        if value is None:
            continue
        if value not in mesh.axis_names:
            raise ValueError(f"sequence_parallel: {name} is {value!r}, the mesh has {list(mesh.axis_names)}")
        if (kind := dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[value]) != AxisType.Auto:
            raise ValueError(f"sequence_parallel: mesh axis {value!r} is {kind.name}, needs Auto (see make_mesh)")
    if axis == batch_axis:
        raise ValueError(f"sequence_parallel: axis and batch_axis are both {axis!r}, needs two axes")
    if micro_batches is not None and micro_batches < 1:
        raise ValueError(f"sequence_parallel: micro_batches is {micro_batches}, needs at least 1")
    if mesh.shape[axis] == 1 and batch_axis is None:
        return memory
    return SequenceParallel(memory, mesh, axis, batch_axis, micro_batches)


@dataclass(frozen=True)
class SequenceParallel(Memory):
    """What `sequence_parallel` returns. Its configuration is that of `memory`: where it runs is no hyperparameter."""

    memory: Memory
    mesh: Mesh
    axis: str
    batch_axis: str | None
    micro_batches: int | None

    @property
    def dim(self) -> int:
        return self.memory.dim

    @property
    def reads_ids(self) -> int | None:
        return self.memory.reads_ids

    @property
    def takes_ids(self) -> bool:
        return self.memory.takes_ids

    @property
    def unplaced(self) -> Memory:
        return self.memory.unplaced

    def param_specs(self):
        return self.memory.param_specs()

    def state_specs(self, batch):
        return self.memory.state_specs(batch)

    def init(self, key):
        return self.memory.init(key)

    def init_state(self, batch):
        return self.memory.init_state(batch)

    def restart(self, state, batch):
        return self.memory.restart(state, batch)

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return self.memory.step(params, state, x, ids=ids, valid=valid, start=start, how=how)

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return self.memory.write(params, state, x, ids=ids, valid=valid, start=start, how=how)

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        n = self._micro_batches(*x.shape[:2])
        rows, stores = self._part(state)
        tokens = (x, {"ids": ids, "valid": valid, "start": start})
        cut = P(self.batch_axis, self.axis)
        row_specs = [P(*(None,) * place, self.batch_axis) for place in self._places if place is not None]
        y, rows, aux = jax.shard_map(
            lambda *args: self._on_rank(n, how, *args),
            mesh=self.mesh,
            in_specs=(P(), row_specs, P(), cut),
            out_specs=(cut, row_specs, P()),
            axis_names=set(self._axes),
            check_vma=True,  # without it nobody checks what is replicated, and gradients can be wrong in silence
        )(params, rows, stores, tokens)
        return y, self._whole(rows, stores), aux

    def _on_rank(self, n: int, how: How, params, rows: list[Array], stores: list[Array], tokens):
        """All ticks of one rank: its slices [b, t / ranks] in n groups of rows -> y, the final rows, aux."""
        ranks, rank = self.mesh.shape[self.axis], lax.axis_index(self.axis)
        marks = tuple(lax.axis_index(a) for a in self._axes)
        places = [p for p in self._places if p is not None]
        # Marked here, once: marked where they are used, parameters would have a gradient summed over ranks every tick.
        params, rows, stores = jax.tree.map(
            lambda a: match_varying(_wide(a), *marks).astype(a.dtype), (params, rows, stores)
        )
        tokens = match_varying(tokens, *marks)
        groups = [_split(a, place, n) for a, place in zip(rows, places, strict=True)]
        tokens = jax.tree.map(lambda a: _split(a, 0, n), tokens)

        def call(params, stores, groups, tokens, received, m):
            """The memory on micro-batch m, from the state received; the first rank takes the one of the call."""
            first, (x, keywords) = _pick(groups, m), _pick(tokens, m)
            given = [jnp.where(rank == 0, a, b) for a, b in zip(first, received, strict=True)]
            y, new, aux = self.memory.apply_with_aux(params, self._whole(given, stores), x, **keywords, how=how)
            return y, self._part(new)[0], aux

        def tick(carry, now):
            received, done = carry
            # An idle rank repeats its first or its last group. What it makes of a state that hasn't arrived is
            # overwritten by the real thing, and what comes after that is the real thing again.
            m = jnp.clip(now - rank, 0, n - 1)
            out = match_varying(turn(params, stores, groups, tokens, received, m), *marks)
            done = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, m, 0), done, out)
            handed = [lax.ppermute(a, self.axis, [(i, i + 1) for i in range(ranks - 1)]) for a in out[1]]
            return (handed, done), None

        turn = jax.checkpoint(call, prevent_cse=False) if how.remat else call
        received = _pick(groups, 0)
        like = jax.eval_shape(call, params, stores, groups, tokens, received, jnp.zeros_like(rank))
        done = jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), like)
        carry = match_varying((received, done), *marks)
        (_, (y, final, aux)), _ = lax.scan(tick, carry, jnp.arange(ranks + n - 1, dtype=jnp.int32))
        final = [self._from_last(_join(a, place), rank == ranks - 1) for a, place in zip(final, places, strict=True)]
        return _join(y, 0), final, jax.tree.map(self._reduced, aux)

    def _from_last(self, a: Array, last: Array) -> Array:
        """`a` of the last rank, on all ranks."""
        return lax.psum(_wide(jnp.where(last, a, jnp.zeros_like(a))), self.axis).astype(a.dtype)

    def _reduced(self, a: Array) -> Array:
        """An auxiliary value [n, ...] of each rank as one [...]."""
        total = lax.psum(jnp.sum(_wide(a), 0), self._axes)
        if jnp.issubdtype(a.dtype, jnp.floating):
            total = total / (a.shape[0] * math.prod(self.mesh.shape[name] for name in self._axes))
        return total.astype(a.dtype)

    def _micro_batches(self, b: int, t: int) -> int:
        ranks = self.mesh.shape[self.axis]
        if t % ranks:
            raise ValueError(
                f"sequence_parallel: x has t = {t} tokens, needs a multiple of the {ranks} ranks of mesh axis "
                f"{self.axis!r}; pad in the data pipeline with valid=False"
            )
        shards = self.mesh.shape[self.batch_axis] if self.batch_axis else 1
        if b % shards:
            raise ValueError(
                f"sequence_parallel: x has b = {b} rows, needs a multiple of the {shards} devices of mesh axis "
                f"{self.batch_axis!r}"
            )
        rows = b // shards
        if self.micro_batches is None:
            return max(n for n in range(1, min(rows, ranks) + 1) if rows % n == 0)
        if rows % self.micro_batches:
            raise ValueError(
                f"sequence_parallel: x has {rows} rows on a device, needs a multiple of micro_batches = "
                f"{self.micro_batches}"
            )
        return self.micro_batches

    @property
    def _axes(self) -> tuple[str, ...]:
        return (self.axis,) if self.batch_axis is None else (self.axis, self.batch_axis)

    @property
    def _places(self) -> list[int | None]:
        """Which dimension of each array of the state is the row; None: it is shared by all rows."""
        axes = [slot.axes for slot in jax.tree.leaves(self.memory.state_specs(1))]
        return [a.index("batch") if "batch" in a else None for a in axes]

    def _part(self, state: Any) -> tuple[list[Array], list[Array]]:
        """The arrays of a state with rows, and those without."""
        pairs = list(zip(jax.tree.leaves(state), self._places, strict=True))
        return [a for a, place in pairs if place is not None], [a for a, place in pairs if place is None]

    def _whole(self, rows: list[Array], stores: list[Array]) -> Any:
        """The state of which these are the parts."""
        with_rows, without = iter(rows), iter(stores)
        leaves = [next(without if place is None else with_rows) for place in self._places]
        return jax.tree.structure(self.memory.state_specs(1)).unflatten(leaves)


def _split(a: Array, place: int, n: int) -> Array:
    """Rows, at dimension `place`, in n groups: [.., b, ..] -> [n, .., b / n, ..]."""
    return jnp.moveaxis(a.reshape(*a.shape[:place], n, a.shape[place] // n, *a.shape[place + 1 :]), place, 0)


def _join(a: Array, place: int) -> Array:
    """The inverse of `_split`."""
    a = jnp.moveaxis(a, 0, place)
    return a.reshape(*a.shape[:place], a.shape[place] * a.shape[place + 1], *a.shape[place + 2 :])


def _wide(a: Array) -> Array:
    """a in 32 bits or more, to be summed over devices: bools can't be, and XLA on CPU may abort on bfloat16 there."""
    if a.dtype.itemsize >= 4:
        return a
    return a.astype(jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else jnp.int32)


def _pick(tree: Any, m: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, m, 0, keepdims=False), tree)
