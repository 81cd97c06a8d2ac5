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
# # A memory of your own
#
# We write a memory in 25 lines, let the laws look at it, break it on purpose, and read what the laws say. It runs on a
# CPU in less than a minute.
#
# ## 1. 25 lines
#
# A memory is a frozen dataclass of settings. It declares its parameters and its state, and writes `apply`. This one
# keeps pairs of a key and a value in a matrix that fades: each key channel by a rate that the token decides.

# %%
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from memjax import How, Memory, Slot, laws
from memjax.layers import gate, linear, scan_tokens
from memjax.memory import dense


# %%
@dataclass(frozen=True)
class Fading(Memory):
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T;  y_t = W_o S_t^T q_t;  g_t = logsigmoid(W_g x_t)."""

    dim: int

    def param_specs(self):
        return {name: dense(self.dim, self.dim) for name in ("w_q", "w_k", "w_v", "w_g", "w_o")}

    def state_specs(self, batch):
        return {"S": Slot((batch, self.dim, self.dim), ("batch", "key", "value"))}

    def log_decay(self, params, x):
        return jax.nn.log_sigmoid(gate(x, params["w_g"]))  # at most 0: e^g fades

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        def token(S, now):
            q, k, v, g = (a.astype(S.dtype) for a in now)
            S = jnp.exp(g)[..., None] * S + k[..., None] * v[:, None]
            return S, jnp.einsum("bk,bkv->bv", q, S)

        q, k, v = (linear(x, params[name]) for name in ("w_q", "w_k", "w_v"))
        y, S = scan_tokens(token, state["S"], (q, k, v, self.log_decay(params, x)), valid=valid, start=start)
        return linear(y.astype(x.dtype), params["w_o"]), {"S": S}


# %% [markdown]
# The rest follows from that: parameters, an empty state, decoding by `step`, byte counts, checks of shapes, the
# configuration as JSON.

# %%
memory = Fading(dim=16)
print(memory.summary())

# %% [markdown]
# ## 2. The laws
#
# Pieces equal the whole, steps equal the sequence, padding and packing change nothing, gradients are right, it survives
# the disk. `laws.check` compiles a few programs and runs them with many contents.

# %%
sound = laws.check(memory)

# %% [markdown]
# A dash says that a law has nothing to look at: this memory calls no kernel, this machine has one device, and nobody
# has recorded numbers for it yet. More about that one in part 5.
#
# ## 3. Break it: the sign of the decay
#
# A lost minus sign is the commonest mistake in a file like this. The state now grows where it should fade.


# %%
@dataclass(frozen=True)
class Growing(Fading):
    def log_decay(self, params, x):
        return -super().log_decay(params, x)


growing = laws.check(Growing(dim=16))

# %% [markdown]
# One law is broken, `bounded`, and it shows the smallest input that it found: one row, one token, read twice from an
# empty state. We can do the same by hand. After the first reading both memories hold the same pair. Reading it again
# can at most double what a fading memory holds; the broken one has multiplied it first.

# %%
params = memory.init(jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (1, 16))  # one token, in a batch of one
for each in (memory, Growing(dim=16)):
    _, once = each.step(params, each.init_state(batch=1), x)
    _, twice = each.step(params, once, x)
    sizes = [float(jnp.abs(state["S"]).max()) for state in (once, twice)]
    print(f"{type(each).__name__:8} {sizes[0]:.2f} after one reading, {sizes[1]:.2f} after two")

# %% [markdown]
# The other laws hold, and rightly so: most of them compare a memory with itself, and a memory that grows agrees with
# itself. So a sign that is wrong everywhere is seen by one law only.
#
# ## 4. Break it in one place
#
# Often there are two forms of one recurrence, a fast one for training and a plain one for decoding, and the sign is
# wrong in one of them. Then they disagree.


# %%
@dataclass(frozen=True)
class GrowsInDecoding(Fading):
    def step(self, params, state, x, **tokens):
        return Growing(self.dim).step(params, state, x, **tokens)


decoding = laws.check(GrowsInDecoding(dim=16), only=["split", "step", "bounded", "gradients"])

# %% [markdown]
# `split` and `bounded` never decode, so they hold. `step` compares the two forms, first on 4 rows of 12 tokens with
# padding and borders of documents in them, and then on less and less, as long as the law stays broken. What is left is
# one row of one token, so it takes no sequence to see the mistake: it is in what `step` does to the state it is given.
# (The laws begin in the middle of a text, unless a line says "fresh rows".) A line that still says "start at (0,4)" or
# "1 invalid token" says that the mistake needs a border or padding to show.
#
# `gradients` is a second witness. It names the array, the state that was passed in, and that array is what the decay
# multiplies.
#
# ## 5. What the laws can't see
#
# A memory that decays after its write instead of before it obeys all of them, and is another memory than that of the
# paper. Against that help numbers: a few outputs of a reference implementation, kept in a file, which the law `golden`
# compares with. For a memory that nobody has published, write the formula once more in the plainest way.

# %%
tokens = jax.random.normal(jax.random.key(2), (1, 5, 16))
y, _ = memory.apply(params, memory.init_state(batch=1), tokens)

S, by_hand = jnp.zeros((16, 16)), []
for token in tokens[0]:
    S = jax.nn.sigmoid(token @ params["w_g"])[:, None] * S + jnp.outer(token @ params["w_k"], token @ params["w_v"])
    by_hand.append((token @ params["w_q"]) @ S @ params["w_o"])
error = float(jnp.abs(y[0] - jnp.stack(by_hand)).max())

golden = laws.check(memory, only="golden", golden=lambda: [("y", error, error < 1e-4)])

# %% [markdown]
# ## 6. Use it, then give it a row
#
# Your class is a part like any other: it can be stacked, repeated, trained, saved, sharded.

# %%
from memjax import Repeat
from memjax.lm import LanguageModel, block

model = LanguageModel(Repeat(block(memory, 32), 2), vocab=100)
logits, state = model.apply(model.init(jax.random.key(0)), model.init_state(batch=1), jnp.arange(8)[None])
print(logits.shape, f"{model.state_bytes(1):,} bytes of state")

# %% [markdown]
# To become part of the library, the class moves to a file of its own, `memjax/in_state/fading.py`, whose docstring says
# what it is, where it was published, the formulas, and what differs from the paper. A row in `memjax/catalog.py` does
# the rest: `memjax list` shows it, and the tests run all laws over its small instance.

# %%
from memjax.catalog import Entry

row = Entry(
    path="memjax.in_state.fading.Fading",
    summary="pairs of keys and values in a matrix whose rows fade by data-dependent rates",
    paper="this notebook",
    year=2026,
    sheet="fading",
    when="learning how a memory is written; GLA is the same with heads, a norm and a fast form",
    small={"dim": 16},
)
print(row.place, row.small)

# %% [markdown]
# The list of what a new memory needs stands in CONTRIBUTING.md. It is short: one file, one row, a golden test, one line
# in the changelog. [01_tour.py](01_tour.py) shows what memories have in common,
# [02_what_a_state_remembers.py](02_what_a_state_remembers.py) what they differ in.
