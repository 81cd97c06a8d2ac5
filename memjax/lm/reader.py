"""A model asks its bank: questions route, read and are answered.

`ask` threads the model layer by layer outside jit, so that the bank may live on a device, on the host or on disk: each
router layer searches the whole bank and reads the chunks of its choice. `answer` goes on: the texts of the documents
that the layers agree on are read in the same rows, and the answer is decoded behind them (retrieve-then-read).
`prepare` stops before the decoding, for an answer that is shown piece by piece. Where the model itself says which
documents it wants to read, and wants more after reading them, see `memjax.lm.interleave`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from memjax.data.tokenizer import Tokenizer
from memjax.errors import ConfigError
from memjax.in_storage import bank as banks
from memjax.in_storage.msa import MSA, DocumentAttention, MSAState
from memjax.layers import positions
from memjax.lm import reading
from memjax.lm.generate import Prefix, Sampling, generate
from memjax.lm.pooling import Thread, router_layers
from memjax.lm.words import WordIndex, fuse
from memjax.memory import Memory

RANKED = 100  # documents of each ranking that are fused


class Routing(NamedTuple):
    """What each router layer chose, best first; -1 and -inf: fewer documents than top_k."""

    documents: Int[np.ndarray, "n b depth"]  # at least `top_k`
    scores: Float[np.ndarray, "n b depth"]
    dropped: int = 0  # chunks of chosen documents that found no room, in all rows and layers


def ask(
    model: Memory,
    params: dict,
    bank: banks.Bank,
    question: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
    *,
    depth: int = 1,
) -> tuple[Any, Routing]:
    """Route questions over the bank and read what was chosen: the state to go on from, and the routing.

    depth: documents that each layer names at least, for a ranking; it reads the chunks of its `top_k` best.
    """
    prefix, routing = ask_prefix(model, params, bank, question, valid, depth=depth)
    return prefix.state, routing


def ask_prefix(
    model: Memory,
    params: dict,
    bank: banks.Bank,
    text: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
    routes: Bool[Array, "b t"] | None = None,
    *,
    depth: int = 1,
) -> tuple[Prefix, Routing]:
    """Read texts of which some tokens ask: what stands behind them, and the routing.

    routes: which tokens ask the bank (None: all of them); every token behind the template sees what they chose, and
    its own past: this is causal whatever the layers' field `causal` says, which is for pieces appended later. depth: as
    for `ask`.
    """
    if (n := len(router_layers(model))) != bank.rk.shape[0]:
        raise ValueError(f"ask: bank holds {bank.rk.shape[0]} router layers, the model has {n}")
    valid = jnp.asarray(valid)
    ids = jnp.where(valid, jnp.asarray(text), 0)
    call = _Ask({"ids": ids, "valid": valid}, bank, valid if routes is None else valid & jnp.asarray(routes), depth)
    y, state, _ = call(model, params, _rows(model, ids.shape[0]), ids)
    documents, scores = (np.stack([np.asarray(a) for a in part]) for part in zip(*call.chosen, strict=True))
    last = jnp.where(valid, jnp.arange(ids.shape[1], dtype=jnp.int32)[None], 0).max(1)
    logits = jnp.take_along_axis(y, last[:, None, None], 1)[:, 0]
    return Prefix(state, logits), Routing(documents, scores, call.dropped)


def agree(routing: Routing, count: int) -> list[list[tuple[int, float]]]:
    """The `count` documents with the highest mean score over the layers, for each row: (document, score), best first.

    A layer that did not choose a document counts it at its own lowest chosen score, which it cannot exceed.
    """
    rows = []
    for b in range(routing.documents.shape[1]):
        ids, scores = routing.documents[:, b], routing.scores[:, b]
        floor = [float(s[i >= 0].min()) if (i >= 0).any() else 0.0 for i, s in zip(ids, scores, strict=True)]
        layers = [dict(zip(i.tolist(), s.tolist(), strict=True)) for i, s in zip(ids, scores, strict=True)]
        total = {
            d: float(np.mean([a.get(d, f) for a, f in zip(layers, floor, strict=True)]))
            for d in set(ids[ids >= 0].tolist())
        }
        rows.append(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:count])
    return rows


def rank(
    model: Memory,
    params: dict,
    bank: banks.Bank,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    count: int,
    *,
    width: int | None = None,
) -> list[list[tuple[int, float]]]:
    """The `count` documents that the layers agree on for each question, see `agree`; nothing is read or answered.

    width: pad questions to so many tokens, so that batches share a compiled program; what is longer is cut off.
    """
    special = reading.special_ids(tokenizer)
    rows = [reading.question(special, reading.encode_question(tokenizer, q))[:width] for q in questions]
    ids, valid = reading.pad_left(rows, width or _round_up(max(map(len, rows))))
    return agree(ask(model, params, bank, jnp.asarray(ids), jnp.asarray(valid), depth=count)[1], count)


class Prepared(NamedTuple):
    """Questions that have routed: their answers are generated from `state`, `prompt` and `valid` under `sampling`."""

    state: Any
    prompt: Int[np.ndarray, "b t"]  # the passages and the question again
    valid: Bool[np.ndarray, "b t"]
    sampling: Sampling  # greedy, to the mark that ends an answer
    passages: list[list[tuple[int, float]]]  # what is read for each row, (document, score), best first
    routing: Routing


def prepare(
    model: Memory,
    params: dict,
    bank: banks.Bank,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    document_ids: Callable[[int], np.ndarray],
    *,
    read: int = 2,
    steps: int = 32,
    question_width: int | None = None,
    reading_width: int | None = None,
    words: WordIndex | None = None,
) -> Prepared:
    """Route questions over the bank and put together what each is answered from. Arguments and errors of `answer`."""
    special, routers = reading.special_ids(tokenizer), router_layers(model)
    window, chosen = min(m.window for m in routers), max(m.top_k for m in routers)
    asked = [reading.encode_question(tokenizer, q) for q in questions]
    if not all(map(len, asked)):
        raise ConfigError("question: is empty")
    first = [reading.question(special, ids) for ids in asked]
    if (longest := max(map(len, first))) > window:
        raise ConfigError(f"question: has {longest} tokens, the model's window is {window}")
    ids, valid = reading.pad_left(first, question_width or _round_up(longest))
    depth = max(read, RANKED if words else 1)
    state, routing = ask(model, params, bank, jnp.asarray(ids), jnp.asarray(valid), depth=depth)
    passages = agree(routing, depth)
    routing = routing._replace(documents=routing.documents[..., :chosen], scores=routing.scores[..., :chosen])
    if words:
        passages = [fuse(found, words.rank(q, RANKED)) for found, q in zip(passages, questions, strict=True)]
    passages = [found[:read] for found in passages]
    texts = [  # the best passage last, next to the question
        reading.reading(special, [document_ids(d) for d, _ in reversed(p)], q)
        for p, q in zip(passages, asked, strict=True)
    ]
    if (needed := max(len(q) + len(text) for q, text in zip(first, texts, strict=True)) + steps) > window:
        raise ConfigError(
            f"answer: question, passages and answer are {needed} tokens, the model's window is {window}; "
            "ask for fewer passages, or a shorter question"
        )
    prompt, prompt_valid = reading.pad_left(texts, reading_width or _round_up(max(map(len, texts))))
    return Prepared(state, prompt, prompt_valid, Sampling(stop=special["<end>"]), passages, routing)


class Answers(NamedTuple):
    """tokens [b, n]: the answer, -1 after its end. passages: what was read for each row, (document, score)."""

    tokens: Int[np.ndarray, "b n"]
    passages: list[list[tuple[int, float]]]
    routing: Routing


def answer(
    model: Memory,
    params: dict,
    bank: banks.Bank,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    document_ids: Callable[[int], np.ndarray],
    *,
    read: int = 2,
    steps: int = 32,
    question_width: int | None = None,
    reading_width: int | None = None,
    words: WordIndex | None = None,
) -> Answers:
    """Answer a batch of questions over the bank, greedily, from the text of the best `read` documents.

    Args:
      document_ids: document number -> its token ids, without padding.
      steps: tokens of an answer at most.
      question_width, reading_width: pad to these widths, so that batches share a compiled program; None: as needed.
      words: an index of the same documents; what is read is chosen by its ranking and the model's together, and the
        scores of the passages are those of `fuse`.

    Raises:
      ConfigError: a question is empty, or with its passages and the answer longer than the model's window.
      ValueError: a question or what is read is longer than its width.
    """
    got = prepare(
        model,
        params,
        bank,
        tokenizer,
        questions,
        document_ids,
        read=read,
        steps=steps,
        question_width=question_width,
        reading_width=reading_width,
        words=words,
    )
    tokens, _ = generate(model, params, got.state, got.prompt, steps=steps, valid=got.valid, sampling=got.sampling)
    return Answers(np.asarray(tokens), got.passages, got.routing)


def answer_text(tokenizer: Tokenizer, tokens: Int[np.ndarray, " n"]) -> str:
    """An answer as text, its end mark and what follows left out."""
    return tokenizer.decode([int(t) for t in tokens if t >= 0]).strip()


def _round_up(n: int, to: int = 16) -> int:
    return -(-n // to) * to


@functools.partial(jax.jit, static_argnames=("model", "b"))
def _rows(model: Memory, b: int) -> Any:
    return model.init_state(b)


class _Ask(Thread):
    """Routes over a bank: queries on the device, the search where the bank is, attention on the device again."""

    def __init__(self, tokens, bank: banks.Bank, routes, depth: int):
        super().__init__(tokens)
        self.bank, self.routes, self.depth, self.chosen, self.dropped = bank, routes, depth, [], 0

    def __call__(self, memory, params, state, x):
        if isinstance(memory, DocumentAttention) and not memory.causal:
            memory = dataclasses.replace(memory, causal=True)
        return super().__call__(memory, params, state, x)

    def leaf(self, memory, params, state, x):
        return _apply_leaf(memory, params, state, x, self.tokens)

    def routed(self, memory: MSA, params, state: MSAState, x):
        layer = len(self.chosen)
        queries, asks = _queries(memory, params, state.ring, x, self.tokens["valid"], self.routes)
        scores, documents = banks.route(
            self.bank,
            layer,
            queries,
            asks,
            top_k=max(memory.top_k, self.depth),
            head_reduce=memory.head_reduce,
            query_reduce=memory.query_reduce,
            chunk_reduce=memory.chunk_reduce,
        )
        self.chosen.append((documents, scores))
        documents = documents[:, : memory.top_k]
        k, v, chosen, dropped = banks.read(self.bank, layer, documents, memory.max_chunks)
        self.dropped += int(dropped)
        y, ring, k, v = _attend(memory, params, state.ring, x, k, v, chosen, self.tokens["valid"])
        return y, MSAState(state.store, ring, k, v, chosen, documents), {}


@functools.partial(jax.jit, static_argnames=("memory",))
def _apply_leaf(memory, params, state, x, tokens):
    return memory.apply(params, state, x, **tokens)


@functools.partial(jax.jit, static_argnames=("memory",))
def _queries(memory: MSA, params, ring, x, valid, routes):
    position, _ = positions(ring.count, x.shape[1], valid)
    return memory.bank_queries(memory.queries(params, x, position)), (position >= memory.template) & routes


@functools.partial(jax.jit, static_argnames=("memory",))
def _attend(memory: MSA, params, ring, x, k, v, chosen, valid):
    k, v = k.astype(memory.store_dtype), v.astype(memory.store_dtype)
    y, ring = memory.attend(params, ring, x, k[:, None], v[:, None], chosen[:, None], valid=valid)
    return y, ring, k, v
