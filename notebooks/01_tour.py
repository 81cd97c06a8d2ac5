# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of memjax
#
# A memory of a sequence model is a few pure functions over two trees of arrays: `params`, which training changes, and
# `state`, which reading changes. All memories here have the same functions and obey the same laws. This notebook shows
# both; it runs on a CPU in less than a minute. `make notebooks` executes it.
#
# ## 1. A memory, its parameters, its state
#
# The object holds settings only. `init` gives the parameters, `init_state` the empty memory: arrays of a fixed size,
# however long the text will be.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from memjax.in_state.gla import GatedLinearAttention

memory = GatedLinearAttention(dim=32, heads=2)
params = memory.init(jax.random.key(0))
state = memory.init_state(batch=1)
print(memory.summary())

# %% [markdown]
# ## 2. Carry the state
#
# `apply` reads a sequence and returns what it says at each token, and the new state. A sequence read in two pieces is
# the sequence read at once: what the second piece needs to know of the first is in the state. (Float32 sums come in
# another order, so expect 1e-7, not 0.)

# %%
apply = jax.jit(memory.apply)
x = jax.random.normal(jax.random.key(1), (1, 256, 32))  # batch, time, dim

whole, after_whole = apply(params, state, x)
first, middle = apply(params, state, x[:, :128])
second, after_pieces = apply(params, middle, x[:, 128:])


def difference(a, b):
    """The largest difference between two trees of arrays."""
    return max(float(jnp.abs(p - q).max()) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


print(f"outputs differ by {difference(whole, jnp.concatenate([first, second], 1)):.0e}")
print(f"states differ by  {difference(after_whole, after_pieces):.0e}")

# %% [markdown]
# ## 3. One token at a time
#
# `step` is what a decoder calls. Training may take a chunked form of the recurrence and decoding the plain one; they
# have to agree, token by token.

# %%
step = jax.jit(memory.step)

now, said = state, []
for t in range(256):
    y, now = step(params, now, x[:, t])
    said.append(y)

print(f"256 steps and one apply differ by {difference(whole, jnp.stack(said, 1)):.0e}")

# %% [markdown]
# ## 4. Packing: documents in one row
#
# To waste no computation, training puts several documents into one row. They must not see each other, and a recurrent
# layer sees everything before it unless it is told where a document begins. That is what `start` says.
#
# Below is a layer that is not told: our own, but deaf to `start`. Both read four documents of 60 tokens in one row, and
# are compared with the same documents read one by one.

# %%
from dataclasses import dataclass

from memjax import How


@dataclass(frozen=True)
class Leaking(GatedLinearAttention):
    """Ignores `start`: each document begins with what is left of the one before."""

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return super().apply(params, state, x, ids=ids, valid=valid, start=None, how=how)


row = x[:, :240]
start = (jnp.arange(240) % 60 == 0)[None]
one_by_one, _ = apply(params, memory.init_state(batch=4), row.reshape(4, 60, 32))
one_by_one = one_by_one.reshape(1, 240, 32)

figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
for name, layer, color in (("ignores start", Leaking(32, heads=2), "#c8553d"), ("memjax", memory, "#2a6f97")):
    packed, _ = jax.jit(layer.apply)(params, state, row, start=start)
    error = jnp.abs(packed - one_by_one).max(-1)[0]
    panel.plot(jnp.maximum(error, 1e-8), color=color, linewidth=1.3, label=f"{name}: at most {error.max():.0e}")
for border in range(60, 240, 60):
    panel.axvline(border, color="#bbbbbb", linewidth=0.8, linestyle=":")
panel.set(yscale="log", ylim=(5e-9, 200), ylabel="error (1e-8: or less)")
panel.set_xlabel("position in the row (dotted: a document begins)")
panel.set_title(
    "A layer that is not told where a document begins is wrong behind every border", loc="left", fontsize=10
)
panel.legend(frameon=False, loc="upper left", ncols=2)
panel.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# The first document is right in both: nothing stands before it. Behind every border the leaking layer is off by as much
# as the outputs are large, and nothing fails: the loss is only a little worse. Here it stays at rounding error.
#
# ## 5. Padding, on the left too
#
# Prompts of different length are padded on the left when text is generated. `valid` says which tokens are real. An
# invalid one changes nothing, whatever stands in it: here NaN.

# %%
from memjax import arrays

lengths = jnp.array([5, 9])
valid, begins = arrays.from_lengths(lengths, t=9, side="left")
prompts = jnp.where(valid[..., None], x[:, :9].repeat(2, 0), jnp.nan)

padded, padded_state = apply(params, memory.init_state(batch=2), prompts, valid=valid, start=begins)
alone, alone_state = apply(params, memory.init_state(batch=1), prompts[:1, 4:])

print(valid.astype(int))
print(f"last output, padded and alone, differ by {difference(padded[0, -1], alone[0, -1]):.0e}")
print(f"states differ by {difference(padded_state.S[:1], alone_state.S):.0e}")

# %% [markdown]
# ## 6. Another memory, the same program
#
# Nothing above knew which memory it used. The catalog lists all of them; `memjax list` prints it.

# %%
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.gated_delta_net import GatedDeltaNet


def halves(memory):
    """Reads x in two pieces; how far that is from reading it at once."""
    params, apply = memory.init(jax.random.key(0)), jax.jit(memory.apply)
    whole, _ = apply(params, memory.init_state(1), x[:, :64])
    _, state = apply(params, memory.init_state(1), x[:, :32])
    second, _ = apply(params, state, x[:, 32:64])
    return difference(whole[:, 32:], second)


for other in (
    memory,
    GatedDeltaNet(dim=32, heads=2, head_dim=16),
    SlidingWindowAttention(dim=32, heads=2, window=48),
):
    print(f"{type(other).__name__:22} {halves(other):.0e}   {other.state_bytes(batch=1):6,} bytes of state")

# %% [markdown]
# ## 7. Memories made of memories
#
# A stack of memories is a memory, with the same functions. So is a language model: its `x` are token ids, its `y` are
# logits. Two linear layers and one with a window, twice over:

# %%
from memjax import Residual, Stack, pattern
from memjax.lm import LanguageModel, block

window = SlidingWindowAttention(dim=32, heads=2, window=48)
stack = Stack((Residual(memory), Residual(window)))
model = LanguageModel(pattern(block(memory, 64), block(memory, 64), block(window, 64), n=2), vocab=100)

ids = jax.random.randint(jax.random.key(2), (1, 16), 0, 100)
weights = jax.jit(model.init)(jax.random.key(0))
logits, carried = jax.jit(model.apply)(weights, model.init_state(batch=1), ids)
print(f"a stack of two:   {stack.param_bytes():7,} bytes of parameters, {stack.state_bytes(1):7,} of state")
print(f"a language model: {model.param_bytes():7,} bytes of parameters, {model.state_bytes(1):7,} of state")
print("logits", logits.shape)

# %% [markdown]
# ## 8. The laws
#
# What we looked at by eye is checked for every memory of the catalog, and for yours. Each line is a law. First the
# sound layer, then the leaking one: the law it breaks, and the smallest case that shows it.

# %%
from memjax import laws

sound = laws.check(GatedLinearAttention(dim=16, heads=2, gate_low_rank_dim=4))

# %%
leaking = laws.check(Leaking(dim=16, heads=2, gate_low_rank_dim=4), only=["split", "padding", "packing"])

# %% [markdown]
# ## 9. What a memory costs
#
# `state_bytes` needs no array, so we can ask it about sizes that fit nowhere. Attention that is to see all t tokens
# needs a window of t; a recurrent state stays as it is, and forgets instead.

# %%
tokens = [1 << n for n in range(10, 21)]
attention = [SlidingWindowAttention(dim=512, heads=8, window=t).state_bytes(batch=1) for t in tokens]
recurrent = [GatedDeltaNet(dim=512, heads=4, head_dim=128).state_bytes(batch=1) for _ in tokens]

figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
panel.plot(tokens, [n / 2**20 for n in attention], color="#c8553d", label="attention with a window of t")
panel.plot(tokens, [n / 2**20 for n in recurrent], color="#2a6f97", label="Gated DeltaNet")
panel.set_xscale("log", base=2)
panel.set_yscale("log", base=2)
panel.set_xticks(tokens[::2], [f"{t >> 10}K" if t < 1 << 20 else f"{t >> 20}M" for t in tokens[::2]])
panel.yaxis.set_major_formatter("{x:g}")
panel.set(xlabel="tokens read, t", ylabel="state of one layer, MiB (dim 512)")
panel.set_title("A window grows with what it holds, a recurrent state does not", loc="left", fontsize=10)
panel.legend(frameon=False)
panel.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## 10. Where next
#
# - Neither curve is what a library of books needs. The third way is a bank outside the window, searched and read back:
#   `make demo` trains a small model to use one, and asks it over a memory far longer than its training.
# - `memjax list` shows the catalog, `memjax list gated_delta_net` one memory with its formula, state and paper.
# - `memjax train --data FOLDER` trains a language model on your text, `memjax generate` continues a text with it.
# - Your own memory: copy a short file from `memjax/in_state/`, run `laws.check` on it. CONTRIBUTING.md has the list.
