"""Small trainings: models, schedule, losses at labelled tokens, reading in pieces, and that something is learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.catalog import CATALOG, Part
from memjax.combinators import Stack
from memjax.errors import ConfigError
from memjax.in_context.canon import Canon
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.lm import FeedForward
from memjax.lm.small import small_mixers, small_model, small_params
from memjax.memory import named
from memjax.tasks import IGNORE, Setting
from memjax.tasks.induction import InductionHeads
from memjax.tasks.mqar import MQAR
from memjax.tasks.passkey import Passkey
from memjax.tasks.selective_copying import Copying
from memjax.tasks.state_tracking import GroupWord
from memjax.train import small
from memjax.train.evaluation import evaluate
from memjax.train.loop import DivergedError
from memjax.train.losses import cross_entropy
from memjax.train.small import Recipe, draw, train_on

ATTENTION = SlidingWindowAttention(16, heads=2, window=32)
DELTA = GatedDeltaNet(16, heads=1, head_dim=8, expand_v=1.0)
COPY = Copying(8, 2, 3, selective=False)


@pytest.fixture(scope="module")
def trained():
    """A model of attention that has learned to copy two tokens."""
    model = small_model(ATTENTION, COPY.vocab, layers=1)
    return model, train_on(model, (COPY,), Recipe(steps=120, batch=32, learning_rate=0.01))


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", [name for name, e in CATALOG.items() if e.place != "in_storage"])
def test_every_memory_has_a_small_size(name):
    mixers = small_mixers(name, dim=32, layers=2, head_dim=8)
    assert len(mixers) == 2 and all(type(m) is CATALOG[name].cls and m.dim == 32 for m in mixers)
    model = small_model(mixers, 128)
    assert model.vocab == 128 and model.state_bytes(1) < 1_000_000


def test_sizes_and_fields():
    (delta,) = small_mixers("gated_delta_net", layers=1)
    assert delta.state_specs(1).S.shape == (1, 1, 16, 16) and delta.conv_size == 4
    (gla,) = small_mixers("gla", layers=1, head_dim=8, heads=2, gate_low_rank_dim=4)
    assert gla.state_specs(1).S.shape == (1, 2, 4, 4) and gla.use_short_conv and gla.gate_low_rank_dim == 4
    (window,) = small_mixers("sliding_window_attention", layers=1, window=9)
    assert window.state_specs(1).k.shape == (1, 9, 1, 16)
    (mom,) = small_mixers("mom", layers=1, memory=Part("gated_delta_net", {"head_dim": 8}), top_k=1)
    assert mom.memory == small_mixers("gated_delta_net", layers=1, head_dim=8)[0]
    (sambay,) = small_mixers("sambay", layers=1)
    assert sambay.saved.hands_on and not sambay.linear.hands_on
    with pytest.raises(ConfigError, match="GatedDeltaNet has no field 'head'"):
        small_mixers("gated_delta_net", head=3)
    with pytest.raises(ConfigError, match="GatedLinearAttention: expand_k"):
        small_mixers("gla", heads=3)


def test_a_convolution_stands_where_there_is_none():
    blocks = small_model(ATTENTION, 8, layers=2).body.blocks
    assert [type(b.memory) for b in blocks] == [Stack, Stack]
    assert blocks[0].memory.blocks == (Canon(16, 4), ATTENTION)
    assert small_model(DELTA, 8, layers=3).body.blocks[0].memory == DELTA
    assert small_model(ATTENTION, 8, conv=0).body.blocks[0].memory == ATTENTION
    assert small_model(DELTA, 8, conv=3).body.blocks[0].memory.blocks == (Canon(16, 3), DELTA)
    body = small_model((DELTA, ATTENTION), 8, hidden=24, conv=0).body.blocks
    assert [b.memory for b in body] == [DELTA, FeedForward(16, 24), ATTENTION, FeedForward(16, 24)]


def test_heads_begin_with_slow_decays():
    """All but the rates is as `init` has it; Mamba's rates, one for each channel of its state, stay spread."""
    mom = {"memory": GatedDeltaNet(16, heads=2, head_dim=8), "num_memories": 2, "top_k": 1}
    models = (small_mixers("gated_delta_net"), small_mixers("mamba2"), small_mixers("mom", dim=16, **mom))
    for mixers in models:
        model = small_model(mixers, 8)
        changed = []
        before, after = (
            named(init(jax.random.key(0))) for init in (model.init, functools.partial(small_params, model))
        )
        for name, value in before.items():
            if name.endswith("A_log"):
                changed.append(name)
                assert value.any() and not after[name].any()
            else:
                np.testing.assert_array_equal(after[name], value)
        assert len(changed) == 2
    mamba = small_model(small_mixers("mamba"), 8)
    jax.tree.map(np.testing.assert_array_equal, small_params(mamba, jax.random.key(0)), mamba.init(jax.random.key(0)))


# ---------------------------------------------------------------------------------------------- training


def test_the_learning_rate_warms_up_and_falls_to_nothing(standard_promotion):
    """Adam's step under a gradient that never changes is the learning rate; weight decay adds its share."""
    recipe = Recipe(steps=20, learning_rate=0.5, weight_decay=0.1, warmup=0.25, clip=100.0)
    numbers = small._Numbers(*(np.float32(getattr(recipe, name)) for name in small._Numbers._fields))
    optimizer = small._optimizer(numbers)
    w = {"w": jnp.full((1,), 3.0)}
    state, steps = optimizer.init(w), []
    for _ in range(20):
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, w)
        steps.append(-float(updates["w"][0]) / (1 + 0.1 * 3))
    expected = [0.5 * (i + 1) / 5 if i < 5 else 0.25 * (1 + np.cos(np.pi * (i - 5) / 15)) for i in range(20)]
    np.testing.assert_allclose(steps, expected, rtol=1e-3)


def test_gradients_are_clipped():
    numbers = small._Numbers(*(np.float32(x) for x in (10, 1.0, 0.0, 0.0, 1.0)))
    optimizer = small._optimizer(numbers)
    grads = {"a": jnp.array([30.0, 40.0])}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    (mu,) = [s.mu["a"] for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    np.testing.assert_allclose(mu, [0.06, 0.08], rtol=1e-5)  # a tenth of the unit vector


def test_a_batch_is_of_one_of_the_tasks():
    tasks = (Passkey(16, 4), Passkey(20, 4), Passkey(20, 4))
    drawn, shapes = jax.jit(functools.partial(draw, tasks, 3)), []
    for i in range(60):
        inputs, labels, valid = drawn(jax.random.key(i))
        assert inputs.shape == labels.shape == valid.shape == (3, 20)
        lengths = set(np.asarray(valid).sum(1).tolist())
        assert len(lengths) == 1
        shapes += lengths
        end = shapes[-1]
        assert (np.asarray(labels)[:, end - 5 : end] != IGNORE).all() and (np.asarray(labels)[:, end:] == IGNORE).all()
    assert 10 <= shapes.count(16) <= 30 and shapes.count(16) + shapes.count(20) == 60
    same = draw((MQAR(32, 16, 2), MQAR(32, 16, 4)), 3, jax.random.key(0))
    assert same.valid is None
    alone = draw((MQAR(32, 16, 2),), 3, jax.random.key(0))
    assert (np.asarray(alone.labels) != IGNORE).sum() == 6


@pytest.mark.parametrize("task", [MQAR(32, 16, 2), GroupWord("S3", 6)], ids=repr)
def test_the_loss_is_that_of_the_labelled_tokens(task):
    """Few labels: logits at those only; many: all logits. Rows with fewer labels than the most are counted right."""
    model = small_model(DELTA, task.vocab, layers=1)
    params = model.init(jax.random.key(0))
    examples = task.batch(jax.random.key(1), 3)
    labels = examples.labels.at[0].set(jnp.where(jnp.arange(task.tokens) < task.tokens - 1, IGNORE, 1))
    logits, _ = jax.jit(model.apply)(params, model.init_state(3), examples.inputs)
    expected, _ = cross_entropy(logits, jnp.maximum(labels, 0), labels != IGNORE)
    loss = jax.jit(small.answer_loss, static_argnums=(0, 3))
    got = loss(model, params, examples._replace(labels=labels), task.answers)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_it_learns(trained):
    model, result = trained
    assert result.losses.shape == (6,) and result.losses[-1] < 0.1 < 0.9 < result.losses[0]
    found = evaluate(model, result.params, COPY, rows=100)
    assert found.accuracy > 0.98 and found.exact > 0.95 and found.exact <= found.last <= 1
    assert result.seconds > 20 * result.step_seconds > 0


def test_a_seed_decides_everything_and_compiles_once(trained):
    model, result = trained
    again = train_on(model, (COPY,), Recipe(steps=120, batch=32, learning_rate=0.01))
    np.testing.assert_array_equal(again.losses, result.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)
    programs, reports = small._updates._cache_size(), []
    other = train_on(
        model,
        (COPY,),
        Recipe(steps=30, batch=32, learning_rate=0.003, clip=0.5, weight_decay=0.0),
        seed=1,
        report=lambda n, loss: reports.append((n, loss)),
    )
    assert small._updates._cache_size() == programs
    assert [n for n, _ in reports] == [20, 10]
    np.testing.assert_array_equal(np.float32([loss for _, loss in reports]), other.losses)
    assert other.losses[0] != result.losses[0]


def test_a_loss_that_is_not_finite_stops_it():
    model = small_model(ATTENTION, COPY.vocab, layers=1)
    with pytest.raises(DivergedError, match="the loss is nan between steps 1 and 4"):
        train_on(model, (COPY,), Recipe(steps=4, batch=2, learning_rate=1e38, warmup=0.0))


def test_refuses():
    model = small_model(ATTENTION, 8, layers=1)
    with pytest.raises(ConfigError, match="LanguageModel: vocab is 8, the task has 32 tokens"):
        train_on(model, (MQAR(32, 16, 2),), Recipe(steps=1))
    with pytest.raises(ConfigError, match="LanguageModel: vocab is 8, the task has 17 tokens"):
        evaluate(model, model.init(jax.random.key(0)), InductionHeads(8))
    for fields in ({"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}, {"clip": 0.0}):
        (name,) = fields
        with pytest.raises(ConfigError, match=f"Recipe: {name} is "):
            Recipe(**fields)
    assert Recipe.of(Setting((COPY,), {}, "", steps=7), batch=3, steps=None) == Recipe(steps=7, batch=3)
