"""A model reads documents, for a bank to keep what its router layers pooled.

`pool_documents` runs the model's `write` over rows of documents; `pool_blocks` does so for as many as there are. A
`Thread` goes through a model leaf by leaf, here and where `memjax.lm.reader` asks.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memjax.combinators import Combinator, Repeat
from memjax.data.corpus import TokenizedDocuments
from memjax.in_storage.bank_files import Block
from memjax.in_storage.msa import MSA, MSAState
from memjax.memory import Memory


class Pooled(NamedTuple):
    """What the router layers keep of some documents: layers in their order, chunks in the order of the documents."""

    k: Float[Array, "n M g d"]
    v: Float[Array, "n M g d"]
    rk: Float[Array, "n M g d"]
    doc_len: Int[Array, " N"]  # chunks of each document
    count: Int[Array, "n 3"]  # per layer: chunks, documents, chunks that found no room


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def pool_documents(
    model: Memory, params: dict, ids: Int[Array, "b t"], valid: Bool[Array, "b t"], dtype: Any = jnp.bfloat16
) -> Pooled:
    """Read documents, one a row, into the model's own store, and return it; arrays have the store's capacity.

    Rows without a valid token are no documents. The caller checks `count`: its last column must be 0.
    """
    router_layers(model)  # raises where there is none
    ids = jnp.where(valid, ids, 0)
    call = _Write({"ids": ids, "valid": valid})
    call(model, params, model.init_state(ids.shape[0]), ids)
    stack = lambda name: jnp.stack([getattr(s, name) for s in call.stores])  # noqa: E731
    k, v, rk = (stack(name).astype(dtype) for name in ("k", "v", "rk"))
    return Pooled(k, v, rk, call.stores[0].doc_len, stack("count"))


def pool_blocks(model: Memory, params: dict, documents: TokenizedDocuments, rows: int = 256) -> Iterator[Block]:
    """Read documents `rows` at a time, in one compiled shape, and yield what a bank keeps (`BankWriter.append`).

    Raises ValueError where the model's store (`capacity`, `documents`) is too small for a block.
    """
    n, width = documents.ids.shape
    for at in range(0, n, rows):
        lengths = np.zeros(rows, np.int32)
        ids = np.zeros((rows, width), np.int32)
        here = min(rows, n - at)
        lengths[:here], ids[:here] = documents.lengths[at : at + here], documents.ids[at : at + here]
        valid = np.arange(width, dtype=np.int32)[None] < lengths[:, None]
        pooled = jax.device_get(pool_documents(model, params, ids, valid))
        if lost := int(pooled.count[:, 2].max()):
            raise ValueError(
                f"pool_blocks: {lost} chunks of {rows} documents find no room in the store of {router_layers(model)[0]}"
            )
        chunks, where = int(pooled.count[0, 0]), slice(at, at + here)
        yield Block(
            *(a[:, :chunks] for a in (pooled.rk, pooled.k, pooled.v)),
            doc_len=pooled.doc_len[:here],
            ids=[row[:length] for row, length in zip(ids[:here], lengths, strict=False)],
            path=[documents.paths[i] for i in documents.path_index[where]],
            first_line=documents.first_line[where],
            last_line=documents.last_line[where],
        )


def router_layers(model: Memory) -> list[MSA]:
    """The MSA layers of a model, in the order in which x runs through them. ValueError if there is none."""
    found: list[MSA] = []

    def visit(memory: Memory) -> None:
        if isinstance(memory, MSA):
            found.append(memory)
        parts = memory.parts if isinstance(memory, Combinator) else ()
        for part in parts * (memory.n if isinstance(memory, Repeat) else 1):
            visit(part)

    visit(model)
    if not found:
        raise ValueError(f"{type(model).__name__}: has no MSA layer, so there is nothing to build a bank of")
    return found


class Thread(abc.ABC):
    """A `call` for `thread` that stays outside jit between the leaves and handles MSA layers itself."""

    unrolled, remat = True, False

    def __init__(self, tokens: dict[str, Any]):
        self.tokens = tokens

    def __call__(self, memory: Memory, params, state, x) -> tuple[Any, Any, Any]:
        if isinstance(memory, MSA):
            return self.routed(memory, params, state, x)
        if isinstance(memory, Combinator):
            return memory.thread(self, params, state, x)
        return *self.leaf(memory, params, state, x), {}

    @abc.abstractmethod
    def leaf(self, memory: Memory, params, state, x) -> tuple[Any, Any]: ...

    @abc.abstractmethod
    def routed(self, memory: MSA, params, state: MSAState, x) -> tuple[Any, Any, Any]: ...


class _Write(Thread):
    """Reads documents and keeps each layer's store, in the order of the layers."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.stores: list[Any] = []

    def leaf(self, memory, params, state, x):
        return memory.write(params, state, x, **self.tokens)

    def routed(self, memory, params, state, x):
        y, state = self.leaf(memory, params, state, x)
        self.stores.append(state.store)
        return y, state, {}
