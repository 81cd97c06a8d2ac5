"""Small trainings: one memory, one task, minutes on a CPU. What memories are compared by.

    mixers = small_mixers("gated_delta_net", dim=64, layers=2)
    model = small_model(mixers, vocab=setting.vocab)
    result = measure(model, setting, Recipe.of(setting), seed=0)
    result.scores["K=16"].accuracy, model.state_bytes(1)

Batches are made inside the jitted update, and many updates run in one call of it, so that Python costs nothing. What
is trained with is an argument of the compiled program: other seeds and learning rates compile nothing.

Source of the recipe: Arora et al., Zoology, arXiv 2312.04927 (two layers without feed-forward blocks, AdamW).
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Float, Int

from memjax.catalog import CATALOG, Part
from memjax.combinators import Residual, Stack, Verb
from memjax.errors import ConfigError
from memjax.in_context.canon import Canon
from memjax.lm.model import FeedForward, LanguageModel
from memjax.memory import How, Memory, from_config
from memjax.tasks.task import IGNORE, Examples, Score, Setting, Task, score
from memjax.train.loop import DivergedError
from memjax.train.losses import cross_entropy
from memjax.train.optimizer import lenient

CALL = 20
"""Updates in one call of the compiled program: as often is reported."""

LOGITS = 1 << 24
"""Logits that are made at once when rows are read for a test: longer ones are read in pieces."""


# ---------------------------------------------------------------------------------------------- models


def small_mixers(
    name: str,
    *,
    dim: int = 64,
    layers: int = 2,
    head_dim: int = 16,
    window: int = 64,
    vocab: int = 128,
    **fields: Any,
) -> tuple[Memory, ...]:
    """The memory of this name in the catalog, once for each layer, with one head of head_dim x head_dim where its class
    has fields for that (two heads, or the sizes of the catalog's small instance, where it refuses them). An output gate
    that a class can do without is left out: layers of the memory alone.

    window: of memories that have one. vocab: of those indexed by tokens. fields: any fields of the class, before all
    else.

    Raises:
      ConfigError: a field that the class doesn't have, or sizes that don't fit together.
    """
    return tuple(_mixer(name, _Sizes(dim, head_dim, window, vocab, i, layers), fields) for i in range(layers))


class _Sizes(NamedTuple):
    """What small instances have alike."""

    dim: int
    head_dim: int
    window: int
    vocab: int
    layer: int
    layers: int


def _mixer(name: str, sizes: _Sizes, fields: dict[str, Any]) -> Memory:
    """One head; two where one is refused; else as in the catalog, at this width. The fields that are given come last:
    one that doesn't fit is an error, not a reason for other sizes."""
    known, one = CATALOG[name], _usual(name, sizes)

    def build(values: dict[str, Any]) -> Memory:
        return from_config({"class": known.path, **{n: _with_parts(v, sizes) for n, v in values.items()}})

    def fits(values: dict[str, Any]) -> bool:
        try:
            return build(values) is not None
        except ConfigError:
            return False

    two = one | ({"heads": 2} if "heads" in one else {})
    values = next(filter(fits, (one, two, {**known.small, "dim": sizes.dim})), one)
    return build(values | fields)


def _usual(name: str, sizes: _Sizes) -> dict[str, Any]:
    """Values for the fields of a class that bear a usual name, and of the catalog for others without a default."""
    parameters, small = inspect.signature(CATALOG[name].cls).parameters, CATALOG[name].small
    share = sizes.head_dim / sizes.dim
    usual = {
        "dim": sizes.dim,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": sizes.head_dim,
        "expand_k": share,
        "expand_v": 1.0 if "head_dim" in parameters else share,
        "feature_dim": sizes.head_dim,
        "head_v_dim": sizes.head_dim,
        "state_size": sizes.head_dim,
        "use_short_conv": True,
        "use_gate": False,
        "window": sizes.window,
        "hidden": 2 * sizes.dim,
        "vocab": sizes.vocab,
        **({"layer": sizes.layer, "layers": sizes.layers} if "layer" in parameters else {}),
    }
    needed = {n: small[n] for n, p in parameters.items() if p.default is p.empty and n in small}
    usual = {n: v for n, v in usual.items() if n in parameters and not isinstance(needed.get(n), Part)}
    return needed | usual


def _with_parts(value: Any, sizes: _Sizes) -> Any:
    if isinstance(value, Part):
        return _mixer(value.name, sizes, {})
    return tuple(_with_parts(v, sizes) for v in value) if isinstance(value, tuple) else value


def small_model(
    mixer: Memory | Sequence[Memory],
    vocab: int,
    *,
    layers: int = 2,
    hidden: int | None = None,
    conv: int | None = None,
) -> LanguageModel:
    """Embedding, pre-norm residual layers of the mixer, norm, the embedding again.

    Args:
      mixer: the same in each of `layers` layers, or one for each layer (then `layers` is not read).
      vocab: token ids.
      hidden: width of a feed-forward block behind each mixer; None: none.
      conv: taps of a Canon convolution in front of each mixer, 0 for none. None: 4 where the mixer has no convolution
        of its own, as in Zoology, where every mixer has one.
    """
    blocks: list[Memory] = []
    for m in (mixer,) * layers if isinstance(mixer, Memory) else mixer:
        width = (0 if has_convolution(m) else 4) if conv is None else conv
        blocks.append(Residual(Stack((Canon(m.dim, width), m)) if width else m))
        if hidden:
            blocks.append(Residual(FeedForward(m.dim, hidden)))
    return LanguageModel(Stack(tuple(blocks)), vocab)


def has_convolution(memory: Memory) -> bool:
    """Whether a parameter of the memory is a convolution, by its name."""
    paths = jax.tree_util.tree_leaves_with_path(memory.param_specs())
    return any("conv" in jax.tree_util.keystr(path) for path, _ in paths)


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to 0.

    steps: updates. batch: rows of each. learning_rate: its peak. weight_decay: of all parameters, times the learning
    rate. warmup: share of the steps. clip: largest global norm of the gradient.
    """

    steps: int = 800
    batch: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        for name, holds, needs in (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "more than 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, from 0 to less than 1"),
            ("clip", self.clip > 0, "more than 0"),
        ):
            if not holds:
                raise ConfigError(f"Recipe: {name} is {getattr(self, name)}, needs {needs}")

    @classmethod
    def of(cls, setting: Setting, **changes: Any) -> Recipe:
        """That of a setting, with these fields changed where they are not None."""
        own = {name: getattr(setting, name) for name in ("steps", "batch", "learning_rate")}
        return cls(**own | {name: value for name, value in changes.items() if value is not None})


class Trained(NamedTuple):
    """losses: [calls] the mean cross entropy of each call of `CALL` updates. seconds: in all. step_seconds: of an
    update, the median over the calls after the first, which compiles."""

    params: dict
    losses: np.ndarray
    seconds: float
    step_seconds: float


def train_on(
    model: Memory,
    tasks: Sequence[Task],
    recipe: Recipe = Recipe(),
    *,
    seed: int = 0,
    how: How = How(),
    report: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a model over token ids from scratch, in float32; the same seed gives the same result.

    Args:
      model: see `small_model`. Auxiliary losses are not trained.
      tasks: each batch is of one of these, drawn evenly. Rows of shorter ones are padded on the right.
      report: called after each call of the program with the updates it did and their mean loss.

    Raises:
      DivergedError: the loss is not finite.
      ConfigError: a token of a task that the model has no embedding for.
    """
    tasks = tuple(tasks)
    _check_vocab(model, tasks)
    key = jax.random.key(seed)
    params = jax.jit(model.init)(jax.random.fold_in(key, 0))
    numbers = _Numbers(*(np.float32(getattr(recipe, name)) for name in _Numbers._fields))
    carry, losses, times = (params, _optimizer(numbers).init(params)), [], []
    for first in range(0, recipe.steps, CALL):
        began, last = time.perf_counter(), min(first + CALL, recipe.steps)
        carry, loss = _updates(
            carry, jax.random.fold_in(key, 1), np.int32(first), np.int32(last), numbers,
            model=model, tasks=tasks, batch=recipe.batch, how=how,
        )  # fmt: skip
        losses.append(float(loss))
        times.append((time.perf_counter() - began) / (last - first))
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"train_on: the loss is {losses[-1]} between steps {first + 1} and {last}")
        if report is not None:
            report(last - first, losses[-1])
    seconds = sum(t * min(CALL, recipe.steps - CALL * i) for i, t in enumerate(times))
    return Trained(carry[0], np.array(losses, np.float32), seconds, float(np.median(times[1:] or times)))


class _Numbers(NamedTuple):
    """What of a recipe is an argument of the program, float32."""

    steps: Any
    learning_rate: Any
    weight_decay: Any
    warmup: Any
    clip: Any


def _optimizer(numbers: _Numbers) -> optax.GradientTransformation:
    def rate(count):
        warm = jnp.maximum(numbers.warmup * numbers.steps, 1.0)
        decayed = jnp.clip((count - warm) / jnp.maximum(numbers.steps - warm, 1.0), 0.0, 1.0)
        return numbers.learning_rate * jnp.minimum((count + 1) / warm, 0.5 + 0.5 * jnp.cos(jnp.pi * decayed))

    adamw = optax.adamw(rate, weight_decay=numbers.weight_decay)
    return lenient(optax.chain(optax.clip_by_global_norm(numbers.clip), adamw))


@functools.partial(jax.jit, static_argnames=("model", "tasks", "batch", "how"), donate_argnames=("carry",))
def _updates(carry, key, first, last, numbers, *, model, tasks, batch, how):
    """The updates from `first` to `last` - 1 and their mean loss."""
    optimizer = _optimizer(numbers)

    def update(i, now):
        (params, opt_state), total = now
        examples = draw(tasks, batch, jax.random.fold_in(key, i))
        loss, grads = jax.value_and_grad(answer_loss, argnums=1)(model, params, examples, most_answers(tasks), how=how)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), total + loss

    carry, total = lax.fori_loop(first, last, update, (carry, jnp.float32(0)))
    return carry, total / (last - first).astype(jnp.float32)


def most_answers(tasks: Sequence[Task]) -> int:
    """Labels of a row, at most."""
    return max(task.answers for task in tasks)


def draw(tasks: Sequence[Task], batch: int, key: Array) -> Examples:
    """A batch of one of the tasks, padded on the right to the longest of them; `valid` only where that pads."""
    unique = list(dict.fromkeys(tasks))
    longest = max(task.tokens for task in unique)
    padded = any(task.tokens < longest for task in unique)

    def rows(task: Task, key: Array) -> Examples:
        inputs, labels, _ = task.batch(key, batch)
        pad = ((0, 0), (0, longest - task.tokens))
        valid = jnp.pad(jnp.ones(inputs.shape, jnp.bool_), pad) if padded else None
        return Examples(jnp.pad(inputs, pad), jnp.pad(labels, pad, constant_values=IGNORE), valid)

    k_which, k_rows = jax.random.split(key)
    if len(unique) == 1:
        return rows(unique[0], k_rows)
    of = jnp.asarray([unique.index(task) for task in tasks], jnp.int32)
    which = of[jax.random.randint(k_which, (), 0, len(of), jnp.int32)]
    return lax.switch(which, [functools.partial(rows, task) for task in unique], k_rows)


def answer_loss(model: Memory, params: dict, examples: Examples, answers: int, *, how: How = How()) -> Float[Array, ""]:
    """Mean cross entropy in nats over the labelled tokens. answers: labels of a row, at most.

    Logits are made at labelled tokens only: most tasks label few, and the rest would cost more than a small model.
    """
    inputs, labels, valid = examples
    state = model.init_state(inputs.shape[0])
    if isinstance(model, LanguageModel) and 2 * answers <= inputs.shape[1]:
        asked, at = lax.top_k((labels != IGNORE).astype(jnp.int32), answers)
        labels = jnp.where(asked > 0, jnp.take_along_axis(labels, at, 1), IGNORE)
        verb = Verb("apply", {"ids": inputs, "valid": valid, "start": None}, how)
        logits, _, _ = model.thread(_At(verb, at), params, state, inputs)
    else:
        logits, _ = model.apply(params, state, inputs, valid=valid, how=how)
    entropy, _ = cross_entropy(logits, jnp.maximum(labels, 0), labels != IGNORE)
    return entropy


class _At(NamedTuple):
    """A `Call` that runs a body and hands on its rows at some tokens of each example."""

    verb: Verb
    at: Int[Array, "b m"]

    @property
    def unrolled(self) -> bool:
        return self.verb.unrolled

    @property
    def remat(self) -> bool:
        return self.verb.remat

    def __call__(self, memory: Memory, params, state, x) -> tuple[Any, Any, Any]:
        y, state, aux = self.verb(memory, params, state, x)
        return jnp.take_along_axis(y, self.at[..., None], 1), state, aux


# ---------------------------------------------------------------------------------------------- tests


def evaluate(
    model: Memory,
    params: dict,
    task: Task,
    *,
    rows: int = 512,
    batch: int = 64,
    piece: int | None = None,
    seed: int = 0,
    how: How = How(),
) -> Score:
    """The mean score over fresh rows of a task, floats.

    rows: how many, rounded up to whole batches. piece: tokens that are read at once, the state carried from one piece
    to the next; None: as many as make `LOGITS` logits. seed: never gives a row that `train_on` has seen but by chance.
    """
    _check_vocab(model, (task,))
    key = jax.random.fold_in(jax.random.key(seed), 2)
    piece = max(16, LOGITS // (batch * task.vocab)) if piece is None else piece
    found = []
    for i in range(-(-rows // batch)):
        inputs, labels, valid = _rows(jax.random.fold_in(key, i), task=task, size=batch)
        predicted = read(params, inputs, valid, model=model, piece=min(piece, task.tokens), how=how)
        found.append(_score(predicted, labels))
    return Score(*(float(np.mean([np.mean(one) for one in part])) for part in zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnames=("task", "size"))
def _rows(key, *, task, size):
    return task.batch(key, size)


_score = jax.jit(score)


@functools.partial(jax.jit, static_argnames=("model", "piece", "how"))
def read(params: dict, inputs: Array, valid: Array | None, *, model: Memory, piece: int, how: How = How()) -> Array:
    """The most likely next token at every token [b t] int32, read `piece` tokens at a time from the empty memory."""
    (b, t), whole = inputs.shape, inputs.shape[1] // piece * piece

    def apply(state, now):
        logits, state = model.apply(params, state, now[0], valid=now[1], how=how)
        return state, logits.argmax(-1).astype(jnp.int32)

    now = (inputs, valid)
    pieces = jax.tree.map(lambda a: a[:, :whole].reshape(b, -1, piece).swapaxes(0, 1), now)
    state, predicted = lax.scan(apply, model.init_state(b), pieces)
    predicted = predicted.swapaxes(0, 1).reshape(b, whole)
    if whole == t:
        return predicted
    return jnp.concatenate([predicted, apply(state, jax.tree.map(lambda a: a[:, whole:], now))[1]], 1)


class Result(NamedTuple):
    """scores: by slice. seconds: of training, with compilation; step_seconds: of an update, without. losses: of every
    `CALL` updates. state_bytes: of one row."""

    scores: dict[str, Score]
    losses: list[float]
    steps: int
    seconds: float
    step_seconds: float
    parameters: int
    state_bytes: int
    params: dict


def measure(
    model: Memory,
    setting: Setting,
    recipe: Recipe | None = None,
    *,
    reader: Memory | None = None,
    rows: int = 512,
    seed: int = 0,
    how: How = How(),
    report: Callable[[int, float], None] | None = None,
) -> Result:
    """Train on a setting, then score every slice of it.

    recipe: None: that of the setting. reader: a model with the same parameters that reads the test rows, such as one
    whose window is longer; None: `model`. Other arguments and errors as in `train_on` and `evaluate`.
    """
    recipe = Recipe.of(setting) if recipe is None else recipe
    trained = train_on(model, setting.train, recipe, seed=seed, how=how, report=report)
    reader = model if reader is None else reader
    scores = {
        name: evaluate(reader, trained.params, task, rows=rows, seed=seed, how=how)
        for name, task in setting.test.items()
    }
    return Result(
        scores,
        trained.losses.tolist(),
        recipe.steps,
        trained.seconds,
        trained.step_seconds,
        model.param_bytes() // 4,
        model.state_bytes(1),
        trained.params,
    )


def _check_vocab(model: Memory, tasks: Sequence[Task]) -> None:
    has, needs = model.reads_ids, max(task.vocab for task in tasks)
    if has is not None and has < needs:
        raise ConfigError(f"{type(model).__name__}: vocab is {has}, the task has {needs} tokens")
