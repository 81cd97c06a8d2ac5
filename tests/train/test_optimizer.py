import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import Param, Repeat, Residual
from memjax.errors import ConfigError
from memjax.lm.model import FeedForward, LanguageModel
from memjax.memory import constant, normal
from memjax.train import make_optimizer

SPECS = {
    "w": Param((6, 4), ("model", "heads"), normal(0.4), "matrix"),
    "layers": Param((3, 4, 8), ("layers", "model", "mlp"), normal(0.5), "matrix"),
    "embed": Param((5, 4), ("vocab", "model"), normal(1.0), "embedding"),
    "norm": {"scale": Param((4,), ("model",), constant(1.0), "vector")},
    "decay": Param((4, 2), ("model", "heads"), normal(1.0), "gate"),
}


def _tree(seed):
    flat, tree = jax.tree.flatten(SPECS)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return tree.unflatten([jax.random.normal(k, s.shape) for k, s in zip(keys, flat, strict=True)])


def _first_update(optimizer, params, grads):
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return updates


def _singular_values(w):
    return np.linalg.svd(np.asarray(w), compute_uv=False)


def test_matrices_take_orthogonal_steps_and_the_rest_take_adam_steps():
    optimizer = make_optimizer(SPECS, steps=10, learning_rate=0.1, adam_learning_rate=0.01, warmup=0)
    updates = _first_update(optimizer, _tree(0), _tree(1))
    values = _singular_values(updates["w"]) / 0.1
    assert np.all((0.5 < values) & (values < 1.3)), values  # Newton-Schulz lands near 1, not on it
    for name in ("embed", "decay"):  # Adam's first step is the sign of the gradient
        np.testing.assert_allclose(updates[name], -0.01 * np.sign(_tree(1)[name]), rtol=1e-4)
    np.testing.assert_allclose(updates["norm"]["scale"], -0.01 * np.sign(_tree(1)["norm"]["scale"]), rtol=1e-4)


def test_stacked_matrices_are_orthogonalised_one_by_one():
    params, grads = _tree(0), _tree(1)
    optimizer = make_optimizer(SPECS, steps=10, learning_rate=0.1, warmup=0)
    # Layers of very different scale: one matrix of all of them would drown the small ones.
    grads["layers"] = grads["layers"] * jnp.asarray([1e-3, 1.0, 1e3])[:, None, None]
    stacked = _first_update(optimizer, params, grads)["layers"]
    one = {"w": Param((4, 8), ("model", "mlp"), normal(0.5), "matrix")}
    alone = make_optimizer(one, steps=10, learning_rate=0.1, warmup=0)
    for i in range(3):
        single = _first_update(alone, {"w": params["layers"][i]}, {"w": grads["layers"][i]})["w"]
        np.testing.assert_allclose(stacked[i], single, atol=1e-5)
    assert _singular_values(stacked).min() > 0.05


def test_groups_of_a_language_model_come_from_its_declaration():
    model = LanguageModel(Repeat(Residual(FeedForward(8, 16)), 2), vocab=11)
    params = model.init(jax.random.key(0))
    updates = _first_update(make_optimizer(model, steps=10, warmup=0), params, params)
    down = updates["body"]["memory"]["w_down"]
    assert down.shape == (2, 16, 8) and _singular_values(down).min() > 0.3 * 0.01
    np.testing.assert_allclose(jnp.abs(updates["embed"]), 0.005, rtol=1e-3)


def test_schedule_warms_up_from_the_first_step_and_ends_at_the_ratio():
    specs = {"b": Param((1,), (None,), constant(0.0), "vector")}
    optimizer = make_optimizer(specs, steps=20, adam_learning_rate=1.0, warmup=4, min_ratio=0.25)
    params, update = {"b": jnp.zeros(1)}, jax.jit(optimizer.update)
    state, sizes = optimizer.init(params), []
    for _ in range(25):
        updates, state = update({"b": jnp.ones(1)}, state, params)
        sizes.append(-float(updates["b"][0]))
    assert sizes[0] == pytest.approx(0.25, rel=1e-3) and max(sizes) == sizes[4] == pytest.approx(1, rel=1e-3)
    assert sizes[20:] == pytest.approx([0.25] * 5, rel=1e-3)
    assert all(a > b for a, b in zip(sizes[4:20], sizes[5:21], strict=True))


def test_weight_decay_is_for_matrices_alone():
    params, zero = _tree(0), jax.tree.map(jnp.zeros_like, _tree(0))
    optimizer = make_optimizer(SPECS, steps=10, learning_rate=0.1, adam_learning_rate=0.01, warmup=0, weight_decay=0.5)
    updates = _first_update(optimizer, params, zero)
    np.testing.assert_allclose(updates["w"], -0.05 * params["w"], rtol=1e-5)
    assert not np.any(updates["embed"])
    assert not np.any(updates["decay"]) and not np.any(updates["norm"]["scale"])


def test_clip_bounds_the_gradient():
    grads = jax.tree.map(lambda g: 100 * g, _tree(1))
    clipped = make_optimizer(SPECS, steps=10, clip=1.0)
    _, state = jax.jit(clipped.update)(grads, clipped.init(_tree(0)), _tree(0))
    moments = optax.tree.get_all_with_path(state, "mu")
    assert len(moments) == 5  # Muon's (and that of the Adam inside it, empty), and one for each other group
    norms = [float(optax.tree.norm(mu)) for _, mu in moments]
    assert 0 < max(norms) <= 0.1 + 1e-6  # (1 - b1) times the clipped norm


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        (SPECS, {"warmup": 10}, "warmup is 10, needs 0 <= warmup < steps = 10"),
        (SPECS, {"min_ratio": 2.0}, "min_ratio is 2.0"),
        ({"w": Param((3,), (None,), constant(0.0), "matrix")}, {}, r"params\['w'\]: kind is 'matrix' but .* \[3\]"),
    ],
)
def test_errors_name_the_argument(specs, options, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(specs, steps=10, **options)


def test_unknown_kind_names_the_parameter(as_user):
    with pytest.raises(ConfigError, match=r"params\['a'\]\['w'\]: kind is 'bias'"):
        make_optimizer({"a": {"w": Param((3,), (None,), constant(0.0), "bias")}}, steps=10)
