"""MoM: a mixture of memories, any linear recurrence with several states of which a token writes and reads a few.

A router sends each token to its top_k memories; only these are updated, so that what is kept apart can't interfere, and
what they read is mixed. One more memory sees every token. The cost of a token stays that of top_k + 1 memories.

Paper: Du, Sun, Lan, Hu, Cheng, MoM: linear sequence modeling with mixture-of-memories, arXiv 2502.13685 (2025).

State:  memories, the inner memory's state with an axis of E memories behind the rows; shared, one more of it.
Update: s_t = softmax(x_t W);  (w_tj, m_tj) = the top_k of s_t, w_tj <- w_tj / sum_j w_tj
        memory e reads the tokens routed to it, as if there were no others: o^e, S^e = recall(x_tau1, x_tau2, ...)
        y_t = output(sum_j w_tj o^{m_tj}_t + o^shared_t, x_t)
Loss:   load_balance = E sum_j sum_e f_je P_e, f_je the share of tokens whose j-th choice is e, P_e the mean of s_te

Differs from the paper: the loss is per layer, as every auxiliary loss here; `joint_balance` gives that over all layers.
Weights begin as those of the inner memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from memjax.combinators import stacked
from memjax.layers import beside, linear, wide
from memjax.memory import How, Memory, at_least, dense, specs
from memjax.recurrence import Recurrence


class MoMState(NamedTuple):
    """What was read so far."""

    memories: Any  # the state of the inner memory, arrays [b E ...]
    shared: Any = ()  # the same [b ...] of the shared memory; () without one


class Route(NamedTuple):
    """Where each token goes."""

    logits: Float[Array, "b t e"]  # float32
    index: Int[Array, "b t j"]  # the top_k memories, best first
    weight: Float[Array, "b t j"]  # float32, the softmax of their logits, made to sum up to 1


@dataclass(frozen=True)
class MoM(Memory):
    """A mixture of `num_memories` states of `memory`, any `Recurrence`.

    top_k: memories that a token is routed to. shared_memory: one more that sees every token. single_kv_proj: all have
    the same parameters, otherwise each has those that the inner memory names `own`, what it writes and how strongly.
    """

    memory: Recurrence
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    single_kv_proj: bool = False

    pack: ClassVar[int] = 64  # tokens of a block of the packed form, or a multiple: what the chunked ops like

    def __post_init__(self):
        at_least(self, 1, "num_memories", "top_k")
        if self.top_k > self.num_memories:
            raise ValueError(f"MoM: top_k is {self.top_k}, needs at most num_memories = {self.num_memories}")
        if not isinstance(self.memory, Recurrence):
            raise ValueError(f"MoM: memory is {type(self.memory).__name__}, needs a Recurrence")
        if self.memory.streams:
            raise ValueError(f"MoM: memory is {self.memory}, needs one without streams")

    @property
    def dim(self) -> int:
        return self.memory.dim

    @property
    def implementations(self) -> tuple[str, ...]:
        return self.memory.implementations

    def param_specs(self):
        inner = self.memory.param_specs()
        own = {} if self.single_kv_proj else {name: inner.pop(name) for name in self.memory.own}
        return {
            "router": dense(self.dim, self.num_memories, ("model", None), "gate"),
            "memories": jax.tree.map(lambda p: stacked(p, self.num_memories, None), own),
            **({"shared": own} if self.shared_memory else {}),
            "common": inner,
        }

    def state_specs(self, batch):
        def with_memories(s):
            return dataclasses.replace(s, shape=(batch, e, *s.shape[1:]), axes=("batch", None, *s.axes[1:]))

        inner, e = self.memory.state_specs(batch), self.num_memories
        return specs(MoMState, memories=jax.tree.map(with_memories, inner), shared=inner if self.shared_memory else ())

    def route(self, params: dict, x: Float[Array, "b t d"]) -> Route:
        """Where each token goes; of equal scores the lower index."""
        logits = linear(wide(x), params["router"])  # weights not rounded to the dtype of x: choices could flip
        weight, index = lax.top_k(jax.nn.softmax(logits, -1), self.top_k)
        return Route(logits, index, weight / weight.sum(-1, keepdims=True))

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        route = self.route(params, x)
        routed = jax.nn.one_hot(route.index, self.num_memories, dtype=jnp.bool_)  # [b t j e]
        if valid is not None:
            routed &= beside(valid, routed)
        read = self._packed if self._blocks(x.shape[1])[1] else self._masked
        o, memories = read(params, state.memories, x, route, routed.any(2), start, how)
        y, shared = self._finish(params, state.shared, x, o, valid, start, how)
        return y, MoMState(memories, shared), self._balance(route.logits, routed, valid)

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        if not self._selecting_moves_less(len(x)):
            return super().step(params, state, x, valid=valid, start=start, how=how)
        x = x[:, None]
        valid, start = (None if a is None else a[:, None] for a in (valid, start))
        route = self.route(params, x)
        index, rows = route.index[:, 0], jnp.arange(len(x), dtype=jnp.int32)[:, None]
        old = state.memories if start is None else self._cleared(state.memories, start)
        visit = jax.vmap(self._visitor(params, how), (0, 0, None, None, None))  # by choice
        mask = jnp.ones((len(x), 1), jnp.bool_) if valid is None else valid
        o, new = jax.vmap(visit, (0, 0, 0, 0, None))(index, jax.tree.map(lambda a: a[rows, index], old), x, mask, None)
        memories = jax.tree.map(lambda a, n: a.at[rows, index].set(n), old, new)
        y, shared = self._finish(params, state.shared, x, _mix(o[:, None, :, 0], route.weight), valid, start, how)
        return y[:, 0], MoMState(memories, shared)

    def _recall(self, params, own, state, x, valid, start, how):
        return self.memory.recall({**params["common"], **own}, state, x, valid=valid, start=start, how=how)

    def _finish(self, params, state, x, o, valid, start, how):
        """y of what the memories have read, and the new state of the shared one."""
        if self.shared_memory:
            also, state = self._recall(params, params["shared"], state, x, valid, start, how)
            o = o + also
        return self.memory.output(params["common"], o, x), state

    def _balance(self, logits: Float[Array, "b t e"], routed: Bool[Array, "b t j e"], valid) -> dict:
        s = jax.nn.softmax(logits, -1)
        seen = jnp.ones((*s.shape[:2], 1), s.dtype) if valid is None else valid[..., None].astype(s.dtype)
        share = 1 / jnp.maximum(seen.sum(), 1)
        chosen, probability = routed.sum((0, 1)).astype(s.dtype) * share, (s * seen).sum((0, 1)) * share
        loss = self.num_memories * jnp.sum(chosen * probability[None])
        return {"load_balance": loss, "chosen": chosen, "probability": probability}

    def _masked(self, params, states, x, route: Route, routed: Bool[Array, "b t e"], start, how: How):
        """What the memories read, mixed [b t h v], and their new states. Every memory passes over all tokens."""

        def recall(own, state, routed):
            return self._recall(params, own, state, x, routed, start, how)

        o, states = jax.vmap(recall, (0, 1, 2), (2, 1))(params["memories"], states, routed)
        weight = jax.nn.one_hot(route.index, self.num_memories, dtype=route.weight.dtype) * route.weight[..., None]
        return _mix(o, weight.sum(2)), states

    def _blocks(self, t: int) -> tuple[int, int]:
        """Tokens of a block, and how many blocks of a row hold all tokens however they are routed; 0: too many.

        About eight blocks a memory: more would load its parameters more often, fewer would be emptier.
        """
        k, e = self.top_k, self.num_memories
        c = self.pack * math.ceil(t * k / (8 * e * self.pack))
        n = (t * k + e * (c - 1)) // c
        return c, n if 3 * n * c <= 2 * e * t else 0

    def _packed(self, params, states, x, route: Route, routed: Bool[Array, "b t e"], start, how: How):
        """The same as `_masked`, in a scan over blocks; each reads tokens of one memory, in order, from its state."""
        (b, t, _), e, (c, n) = x.shape, self.num_memories, self._blocks(x.shape[1])
        rows = jnp.arange(b, dtype=jnp.int32)[:, None]
        # the place of each token among those of its memory, whose blocks begin at `first`
        rank = jnp.cumsum(routed, 1, dtype=jnp.int32) - 1
        count = rank[:, -1] + 1
        blocks = -(-count // c)
        first = jnp.cumsum(blocks, 1) - blocks
        place = jnp.where(routed, first[:, None] * c + rank, n * c)  # n * c is out of range: dropped
        place = jnp.take_along_axis(place, route.index, 2).reshape(b, -1)
        token = jnp.repeat(jnp.arange(t, dtype=jnp.int32), self.top_k)[None]
        source = jnp.full((b, n * c), t, jnp.int32).at[rows, place].set(token, mode="drop")
        filled, source = source < t, jnp.minimum(source, t - 1)
        at = jnp.arange(n, dtype=jnp.int32)[None]
        memory = jnp.minimum((at[..., None] >= (first + blocks)[:, None]).sum(-1, dtype=jnp.int32), e - 1)
        opens = at == jnp.take_along_axis(first, memory, 1)
        begins = document = None
        if start is not None:  # a memory begins again at its first token behind a start
            document = jnp.cumsum(start, 1, dtype=jnp.int32)
            own = jnp.take_along_axis(document, source, 1)
            before = jnp.pad(own, ((0, 0), (1, 0)))[:, :-1].reshape(b, n, c)
            before = before.at[:, :, 0].set(jnp.where(opens, 0, before[:, :, 0])).reshape(b, n * c)
            begins = filled & (own != before)

        def block(state, now):
            memory, opens, tokens = now
            entering = jax.tree.map(lambda a: a[rows[:, 0], memory], states)
            state = jax.tree.map(lambda a, s: jnp.where(beside(opens, a), a, s), entering, state)
            o, state = jax.vmap(self._visitor(params, how))(memory, state, *tokens)
            return state, (o, state)

        tokens = (jnp.take_along_axis(x, source[..., None], 1), filled, begins)
        tokens = jax.tree.map(lambda a: a.reshape(b, n, c, *a.shape[2:]), tokens)
        by_block = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (memory, opens, tokens))
        _, (o, after) = lax.scan(block, jax.tree.map(lambda a: a[:, 0], states), by_block)
        o = jnp.moveaxis(o, 0, 1).reshape(b, n * c, *o.shape[3:])
        o = o[rows, jnp.minimum(place, n * c - 1)].reshape(b, t, self.top_k, *o.shape[2:])
        last, visited = jnp.maximum(first + blocks - 1, 0), count > 0
        new = jax.tree.map(lambda a, s: jnp.where(beside(visited, s), a[last, rows], s), after, states)
        if document is not None:  # what was open at the last token of a memory may have ended since
            newest = jnp.where(routed, document[..., None], 0).max(1)
            new = self._cleared(new, newest < document[:, -1:])
        return _mix(o, route.weight), new

    def _visitor(self, params, how: How) -> Callable:
        """f(index, state, x [c d], valid [c], start [c]): one row read by the memory `index`, without an axis of rows:
        what it reads [c h v], and its new state."""

        def visit(index, state, x, valid, start):
            own = jax.tree.map(lambda p: p[index], params["memories"])
            state, x, valid, start = jax.tree.map(lambda a: a[None], (state, x, valid, start))
            return jax.tree.map(lambda a: a[0], self._recall(params, own, state, x, valid, start, how))

        return visit

    def _selecting_moves_less(self, b: int) -> bool:
        """Whether it is less to fetch, for each row, top_k memories and their parameters than to pass by all."""
        state = sum(math.prod(s.shape) for s in jax.tree.leaves(self.memory.state_specs(1)))
        own = sum(math.prod(p.shape) for p in jax.tree.leaves(self.param_specs()["memories"])) // self.num_memories
        return b * self.top_k * (state + own) < self.num_memories * (b * state + own)

    def _cleared(self, states, mask: Array):
        """The states, empty where the mask is True."""
        fills = self.memory.state_specs(1)
        return jax.tree.map(lambda s, a: jnp.where(beside(mask, a), jnp.asarray(s.fill, a.dtype), a), fills, states)


def joint_balance(aux: Any) -> Float[Array, ""]:
    """The loss over the tokens of all layers together, from the aux of a model whose MoM layers are alike."""
    found = {"chosen": [], "probability": []}
    for path, a in jax.tree_util.tree_leaves_with_path(aux):
        if (name := getattr(path[-1], "key", None)) in found:
            found[name].append(a)
    chosen, probability = (jnp.stack(found[name]).mean(0) for name in ("chosen", "probability"))
    return chosen.shape[-1] * jnp.sum(chosen * probability[None])


def _mix(o: Float[Array, "b t j ..."], weight: Float[Array, "b t j"]) -> Float[Array, "b t ..."]:
    return (o * beside(weight.astype(o.dtype), o)).sum(2)
