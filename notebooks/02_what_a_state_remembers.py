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
# # What a state remembers
#
# A linear recurrence keeps what it has read in one matrix, of a size that never changes. This notebook looks into that
# matrix while it is written and overwritten, asks when it is full, and then trains two small models to see what they
# do with it. It runs on a CPU in two minutes.
#
# ## 1. Writing
#
# A pair of a key and a value is written as a product, $S \mathrel{+}= k v^\top$, and read with the key, $S^\top k$.
# That is linear attention. The delta rule reads first, and writes only what was missing:
# $S \mathrel{+}= k (v - S^\top k)^\top$. The two differ once a key comes back with another value.
#
# We write three pairs, and then the first key again with a new value. Keys are 16 numbers long, values too; to make the
# picture readable each value is a bar of its own.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from pallas_kernels import delta_rule, linear_attention

key = jax.random.key(0)
k = jnp.linalg.qr(jax.random.normal(key, (16, 16)))[0][:3]  # three keys at right angles
v = jnp.repeat(jnp.eye(4), 4, 1)  # four values: four channels each
wrote = [(0, 0), (1, 1), (2, 2), (0, 3)]  # the last one: key 0 again, with value 3

keys = jnp.stack([k[i] for i, _ in wrote])[None, :, None]  # [b t h k]
values = jnp.stack([v[j] for _, j in wrote])[None, :, None]


def overwrite(q, k, v, log_decay=None):
    """The delta rule at a rate of 1: every error is written whole."""
    return delta_rule(q, k, v, jnp.ones(k.shape[:-1]), log_decay)


kinds = {"linear attention": linear_attention, "delta rule": overwrite}


def states(op):
    """The state after each of the writes."""
    return [op(keys[:, : n + 1], keys[:, : n + 1], values[:, : n + 1])[1][0, 0] for n in range(len(wrote))]


figure, panels = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
for row, (name, op) in zip(panels, kinds.items(), strict=True):
    for panel, S, (i, j) in zip(row, states(op), wrote, strict=True):
        recalled = k @ S  # what each of the three keys reads
        panel.imshow(recalled, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"wrote key {i}, value {j}", fontsize=9, loc="left")
    row[0].set_ylabel(name)
    row[0].set_yticks(range(3), [f"key {n}" for n in range(3)])
title = "What each key reads after each write (value 0 is the first quarter, value 3 the last)"
figure.suptitle(title, fontsize=10, x=0.01, ha="left")

# %% [markdown]
# After the last write linear attention reads the old value and the new one together, and nothing in the state says
# which came last. The delta rule has taken the old one back.
#
# The matrix itself looks like this. It is all that is left of what was read.

# %%
figure, panels = plt.subplots(2, 4, figsize=(9, 4.8), layout="constrained")
for row, (name, op) in zip(panels, kinds.items(), strict=True):
    for panel, S, (i, j) in zip(row, states(op), wrote, strict=True):
        panel.imshow(S, cmap="RdBu", vmin=-0.7, vmax=0.7)
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"wrote key {i}, value {j}", fontsize=9, loc="left")
    row[0].set_ylabel(f"{name}\nkey channels")
for panel in panels[1]:
    panel.set_xlabel("value channels", fontsize=8)

# %% [markdown]
# ## 2. When it is full
#
# Sixteen keys of 16 numbers can stand at right angles; the seventeenth can't. Keys that a model has learned are not
# even that tidy, so we take random ones, write more and more pairs, and ask for all of them again. The error is 0 where
# the value comes back, and 1 where nothing does.


# %%
def errors(op, pairs, trials=64, **fields):
    """Mean squared error of reading every pair again, over the mean square of a value."""
    a, b = jax.random.split(jax.random.fold_in(key, pairs))
    k = jax.random.normal(a, (trials, pairs, 1, 16))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(b, (trials, pairs, 1, 16))
    _, S = op(k, k, v, **{name: jnp.full((trials, pairs, 1), x) for name, x in fields.items()})
    return float(jnp.mean((jnp.einsum("btk,bkv->btv", k[:, :, 0], S[:, 0]) - v[:, :, 0]) ** 2))


counts = [1, 2, 4, 6, 8, 12, 16, 24, 32]
curves = {
    "linear attention": (linear_attention, {}),
    "linear attention, forgets 5 % a step": (linear_attention, {"log_decay": -0.05}),
    "delta rule": (overwrite, {}),
    "delta rule, forgets 5 % a step": (overwrite, {"log_decay": -0.05}),
}
colors = ("#c8553d", "#e0a899", "#2a6f97", "#89c2d9")
figure, panel = plt.subplots(figsize=(8, 3.4), layout="constrained")
for (name, (op, fields)), color in zip(curves.items(), colors, strict=True):
    panel.plot(counts, [errors(op, n, **fields) for n in counts], color=color, marker="o", markersize=3, label=name)
panel.axvline(16, color="#bbbbbb", linewidth=0.8, linestyle=":")
panel.set(xlabel="pairs written into a state of 16 x 16", ylabel="error of reading them all")
panel.set_title("Random keys blur, less with the delta rule", loc="left", fontsize=10)
panel.legend(frameon=False, fontsize=8)
panel.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# An error of 1 is what an empty state has: linear attention is worse than that from 17 random pairs on, since all it
# has read adds up. Forgetting bounds it, and so does the delta rule. What training adds is the choice: which tokens are
# worth a key, and keys that stay out of each other's way.
#
# ## 3. Two models that learned to recall
#
# Multi-query associative recall shows a model 4, 8 or 16 pairs and asks for them again. Everything else about the two
# models is alike: two layers, one head with a state of 16 x 16, no feed-forward block.

# %%
from functools import partial

from memjax.lm.small import small_mixers, small_model
from memjax.tasks import SETTINGS
from memjax.train.evaluation import measure
from memjax.train.small import Recipe

setting = SETTINGS["mqar"]
contestants = {
    "linear attention": ("linear_attention", {"feature_map": "elu", "normalize": True}),
    "Gated DeltaNet": ("gated_delta_net", {}),
}
trained = {}
for name, (memory, fields) in contestants.items():
    model = small_model(small_mixers(memory, vocab=setting.vocab, **fields), setting.vocab)
    result = measure(model, setting, Recipe.of(setting, learning_rate=0.012, steps=500), rows=256)
    trained[name] = model, result.params
    scores = "  ".join(f"{pairs} {score.accuracy:.2f}" for pairs, score in result.scores.items())
    print(f"{name:17} {scores}   {model.state_bytes(1):,} bytes of state")

# %% [markdown]
# Now we stop the models while they read. After each pair the state is forked, once for each key seen so far, and each
# copy is asked for one of them; the reading then goes on as if nobody had asked. States are values, so a fork is just
# another use of the same one.


# %%
@partial(jax.jit, static_argnames="model")
def interrupted(model, params, ids):
    """Share of rows that answer pair i after n pairs: [n, i], NaN where pair i has not been read."""
    rows, pairs = ids.shape[0], ids.shape[1] // 2
    asked, expected = ids[:, ::2], ids[:, 1::2]

    def read(state, pair):
        _, state = model.apply(params, state, pair)
        answer = lambda key: model.step(params, state, key)[0].argmax(-1)  # noqa: E731
        return state, (jax.vmap(answer, 1, 1)(asked) == expected).mean(0)

    _, right = jax.lax.scan(read, model.init_state(rows), ids.reshape(rows, pairs, 2).swapaxes(0, 1))
    return jnp.where(jnp.arange(pairs)[:, None] >= jnp.arange(pairs), right, jnp.nan)


ids, _, _ = setting.test["K=16"].batch(jax.random.key(7), 256)
figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for panel, (name, (model, params)) in zip(panels, trained.items(), strict=True):
    image = panel.imshow(interrupted(model, params, ids[:, :32]).T, cmap="Blues", vmin=0, vmax=1)
    panel.set(xlabel="pairs read so far", xticks=range(0, 16, 5), xticklabels=range(1, 17, 5))
    panel.set(yticks=range(0, 16, 5), yticklabels=range(1, 17, 5))
    panel.set_title(name, fontsize=10, loc="left")
panels[0].set_ylabel("pair that is asked for")
figure.colorbar(image, ax=panels, label="share of right answers", shrink=0.8)

# %% [markdown]
# A row of the picture follows one pair through its life. Where it fades to the right, later pairs have blurred it;
# where a whole column is pale, the state holds so many that no answer is sure. The pale edge of Gated DeltaNet is the
# pair read last: asked at once, its key is joined with the pair itself by the convolution over four tokens, which
# training hardly ever shows.
#
# ## 4. Bigger states, other memories
#
# The same training for every memory, at three sizes of the state and with three seeds, is an experiment of its own,
# `python -m experiments.recall`. This is its record.

# %%
import json
from pathlib import Path

here = Path.cwd()
records = [record for folder in (here, *here.parents) for record in folder.glob("experiments/records/recall-*.json")]
if records:
    rows = json.loads(max(records).read_text())["recall"]
    shown = ("attention", "gated_delta_net", "delta_net", "gla", "mamba2", "retnet", "linear_attention")
    figure, panel = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for name in shown:
        points = sorted((row["state_bytes"], row["mean"]["K=16"]) for row in rows if row["contestant"] == name)
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name.replace("_", " "))
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g} KB")
    panel.set(xlabel="bytes of the state of a row", ylabel="right answers, 16 pairs", ylim=(0, 1.03))
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
else:
    print("no record here: the notebook was opened outside the repository")

# %% [markdown]
# ## 5. Where next
#
# - One memory on one task, from the command line: `memjax eval --memory kda --task mqar`. `memjax eval --list-tasks`
#   has the others: copying, induction, passkeys, needles, parity and the word problem of S5.
# - A few layers of attention repair what a small state loses: `python -m experiments.hybrid_ratio`.
