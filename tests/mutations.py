"""Deliberate bugs: what the laws are for. Each replaces a piece of the source of one function and names who has it.

`applied(mutation)` compiles the changed source and puts its code into the function object itself, so that every module
that imported the function runs the bug, whatever decorators stand around it. A piece of source that is no longer there
exactly once is an error: a mutation that changes nothing would look like a law that sees nothing.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Mutation(NamedTuple):
    """where: "module:function" or "module:Class.method". seen: the entries that have the part -> a law that breaks."""

    name: str
    where: str
    changes: tuple[tuple[str, str], ...]
    seen: dict[str, str]


class StaleMutation(Exception):
    """The source to replace is not there, or more than once."""


def target(mutation: Mutation) -> Any:
    """The function that the bug is in, without what is wrapped around it."""
    module, _, path = mutation.where.partition(":")
    return inspect.unwrap(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """Run with the bug. Raises StaleMutation where the source has changed."""
    function = target(mutation)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in mutation.changes:
        if source.count(old) != 1:
            raise StaleMutation(f"{mutation.name}: {old!r} is {source.count(old)} times in {mutation.where}, needs 1")
        source = source.replace(old, new)
    tree = ast.parse(source)
    tree.body[0].decorator_list = []  # they stand around the function already
    # Annotations stay strings: the names in them are looked up by nobody.
    code = compile(tree, f"<{mutation.name}>", "exec", flags=__future__.annotations.compiler_flag)
    scope: dict = {}
    exec(code, function.__globals__, scope)
    sound = function.__code__
    function.__code__ = scope[function.__name__].__code__
    jax.clear_caches()  # a jitted op would go on with what it traced before
    try:
        yield
    finally:
        function.__code__ = sound
        jax.clear_caches()


GLA, GDN = "memjax.in_state.gla:GatedLinearAttention.recall", "memjax.in_state.gated_delta_net:GatedDeltaNet.recall"
LINEAR, DELTA = "pallas_kernels.linear_attention", "pallas_kernels.delta_rule"
ROWS, RING, MSA = "pallas_kernels.short_conv.rows:find_places", "memjax.layers:ring_append", "memjax.in_storage.msa:MSA"

MUTATIONS = (
    # decay sign
    Mutation("decay sign in GLA", GLA, (("log_sigmoid(logits) /", "log_sigmoid(logits) / -"),), {"gla": "bounded"}),
    Mutation(
        "decay sign in Gated DeltaNet",
        GDN,
        (("log_decay = -jnp.exp", "log_decay = jnp.exp"),),
        {"gated_delta_net": "bounded"},
    ),
    # chunk border: short chunks, and what crosses from one to the next is lost
    Mutation(
        "chunk border in linear attention",
        f"{LINEAR}.xla:linear_attention",
        (
            ("chunks.chunk_length(q.shape[1], chunk_size)", "4"),
            ("states.entering)", "states.entering.at[1:].set(0))"),
        ),
        {"gla": "kernels"},
    ),
    Mutation(
        "no decay in the state that leaves a chunk",
        "pallas_kernels.chunk_states:_forward",
        (("S if through is None else through * S", "S"),),
        {"gla": "kernels", "gated_delta_net": "kernels"},
    ),
    # the definition of an op
    Mutation(
        "decay after the write",
        f"{LINEAR}.reference:linear_attention",
        (("S = jnp.exp(g)[..., None] * S", "k = k * jnp.exp(g)\n            S = jnp.exp(g)[..., None] * S"),),
        {"gla": "kernels"},
    ),
    Mutation(
        "delta rule that reads before the decay",
        f"{DELTA}.reference:delta_rule",
        (("read(S, erase * k)", "read(S if g is None else jnp.exp(-g)[..., None] * S, erase * k)"),),
        {"gated_delta_net": "kernels"},
    ),
    # padding
    Mutation(
        "padding decays the state",
        GDN,
        (
            (
                "o, S = delta_rule(",
                "beta = beta if valid is None else jnp.where(valid[..., None], beta, 0.0)\n    o, S = delta_rule(",
            ),
            ("initial_state=state.S, **masks", "initial_state=state.S, start=start"),
        ),
        {"gated_delta_net": "padding"},
    ),
    Mutation(
        "padding is written",
        "pallas_kernels.dispatch:keep",
        (("if valid is None:", "if True:"),),
        {"gla": "padding", "gated_delta_net": "padding"},
    ),
    Mutation(
        "convolution reads padding",
        ROWS,
        (("count = jnp.cumsum(valid", "valid = jnp.ones_like(valid)\n        count = jnp.cumsum(valid"),),
        {"canon": "kernels", "gated_delta_net": "kernels"},
    ),
    Mutation("padding stays in the ring", RING, (("live &= valid", "pass"),), {"sliding_window_attention": "padding"}),
    Mutation(
        "padding is seen in the call",
        RING,
        (("own = segment if valid is None else jnp.where(valid, segment, -1)", "own = segment"),),
        {"sliding_window_attention": "padding", "msa": "padding"},
    ),
    Mutation(
        "padding is counted in positions",
        "memjax.layers:positions",
        (("if valid is None else valid.astype(jnp.int32)", ""),),
        {"sliding_window_attention": "padding"},
    ),
    # start
    Mutation(
        "start not given to linear attention",
        GLA,
        (("initial_state=state.S, **masks", "initial_state=state.S, valid=valid"),),
        {"gla": "packing"},
    ),
    Mutation(
        "start not given to the convolution",
        "memjax.in_context.canon:Canon.apply",
        (("start=start", "start=None"),),
        {"canon": "packing"},
    ),
    Mutation(
        "start acts only where valid",
        "pallas_kernels.scan:scan_tokens",
        (
            (
                "if start is not None:",
                "if start is not None:\n            start = start if valid is None else start & valid",
            ),
        ),
        {"fading": "packing"},
    ),
    Mutation(
        "the old ring is seen after start",
        RING,
        (("jnp.where(held >= 0, 0, -1)", "jnp.where(held >= 0, segment[:, -1:], -1)"),),
        {"sliding_window_attention": "packing"},
    ),
    Mutation(
        "positions go on after start",
        "memjax.layers:positions",
        (("if start is not None:", "if False:"),),
        {"sliding_window_attention": "packing"},
    ),
    # causal mask
    Mutation(
        "no causal mask",
        RING,
        (("& (age >= 0) ", ""), (" & before[None]", "")),
        {"sliding_window_attention": "causal"},
    ),
    Mutation(
        "window one longer inside a call", RING, (("(age < c)", "(age <= c)"),), {"sliding_window_attention": "step"}
    ),
    Mutation(
        "embedding of the next token",
        "memjax.lm.model:LanguageModel.thread",
        (('params["embed"][x]', 'params["embed"][x.at[..., :-1].set(x[..., 1:])]'),),
        {"language_model": "causal"},
    ),
    # what is carried
    Mutation(
        "position not carried",
        "memjax.layers:positions",
        (("seen = count[:, None] + jnp.cumsum", "seen = jnp.cumsum"),),
        {"sliding_window_attention": "split", "msa": "split"},
    ),
    Mutation(
        "rotary from 0 in every call",
        "memjax.in_context.sliding_window_attention:SlidingWindowAttention.apply",
        (("positions(state.count,", "positions(state.count * 0,"),),
        {"sliding_window_attention": "split"},
    ),
    Mutation(
        "convolution rows not carried",
        "pallas_kernels.short_conv.rows:last_of",
        (("take(packed.source, packed.newest)", "take(packed.source, packed.newest * 0)"),),
        {"canon": "kernels", "gated_delta_net": "kernels"},
    ),
    Mutation(
        "ids one token late",
        "memjax.in_weights.stem:STEM.apply",
        (('params["table"][ids]', 'params["table"][jnp.roll(ids, 1, 1)]'),),
        {"stem": "split"},
    ),
    # rows, gradients, dtypes
    Mutation(
        "rows of the batch mixed",
        GLA,
        (("return o, Gated", "o = o + o.mean(0, keepdims=True)\n    return o, Gated"),),
        {"gla": "batch"},
    ),
    Mutation(
        "gradient stopped at the decay",
        GLA,
        (("(q, k, v, log_decay, init", "(q, k, v, jax.lax.stop_gradient(log_decay), init"),),
        {"gla": "gradients"},
    ),
    Mutation(
        "float32 parameters promote bfloat16",
        "memjax.layers:linear",
        (("w.astype(x.dtype))", "w, preferred_element_type=w.dtype)"),),
        {"stem": "precision"},
    ),
    # combinators
    Mutation(
        "a layer gets the state of another",
        "memjax.combinators:Repeat.thread",
        (("call(self.block, layer(i), state[i], x)", "call(self.block, layer(i), state[0], x)"),),
        {"language_model": "step"},
    ),
    # storage
    Mutation(
        "routing again in a routed question",
        f"{MSA}.apply_with_aux",
        (("carried = state.ring.count > self.template", "carried = state.ring.count < 0"),),
        {"msa": "split"},
    ),
    Mutation(
        "routing across questions",
        f"{MSA}.apply_with_aux",
        (("asks, segment, questions", "asks, segment * 0, questions"),),
        {"msa": "packing"},
    ),
)
