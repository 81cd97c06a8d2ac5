"""short_conv and taps, against the token recurrence and against documents one by one."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels.short_conv import IMPLEMENTATIONS, short_conv, taps, xla
from tests.pallas_kernels.compare import assert_close, compiled

B, C = 3, 5
FAST_FORMS = [name for name in IMPLEMENTATIONS if name != "reference"]


def arrays(t, w, dtype=jnp.float32):
    draw = np.random.default_rng(10 * t + w)
    shapes = {"x": (B, t, C), "weight": (w, C), "cache": (B, w - 1, C), "bias": (C,)}
    found = {name: jnp.asarray(draw.standard_normal(shape), dtype) for name, shape in shapes.items()}
    valid = draw.random((B, t)) < 0.6
    valid[1] = False
    return found, jnp.asarray(valid), jnp.asarray(draw.random((B, t)) < 0.3)


@functools.cache
def program(activation, implementation):
    def loss(arrays, valid, start):
        y, cache = short_conv(**arrays, valid=valid, start=start, activation=activation, implementation=implementation)
        return (y**2).sum() + (cache**3).sum(), {"y": y, "cache": cache}

    @compiled
    def run(arrays, valid, start):
        gradients, out = jax.grad(loss, has_aux=True)(arrays, valid, start)
        return out | {f"grad_{n}": g for n, g in gradients.items()}

    return run


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("masks", ["none", "valid", "start", "both"])
@pytest.mark.parametrize(("t", "w"), [(1, 4), (2, 4), (3, 4), (4, 4), (11, 4), (11, 1), (5, 2)])
def test_equals_reference(t, w, masks, implementation):
    """x is not a number at invalid tokens: nothing of it may be seen, in values or gradients."""
    with jax.enable_x64(True):
        found, valid, start = arrays(t, w, jnp.float64)
        valid = valid if masks in ("valid", "both") else None
        start = start if masks in ("start", "both") else None
        if valid is not None:
            found["x"] = jnp.where(valid[..., None], found["x"], jnp.nan)
        activation = "silu" if t > 2 else None
        want = program(activation, "reference")(found, valid, start)
        assert_close(program(activation, implementation)(found, valid, start), want, {"": 1e-12})


T = 37  # two blocks of 16 tokens in the backward, and a rest of 5


@contextlib.contextmanager
def float64_in_small_blocks():
    """With the smallest blocks that the backward takes, so that short sequences have several."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(xla, "CPU_BLOCK", 1)
        yield


@functools.cache
def loss_of(masks, implementation):
    def loss(arrays, valid, start, cotangents):
        masked = {"valid": valid, "start": start}
        found = {name: mask for name, mask in masked.items() if name in masks}
        out = short_conv(**arrays, **found, activation="silu", implementation=implementation)
        return sum((a * b).sum() for a, b in zip(out, cotangents, strict=True))

    return compiled(loss), compiled(jax.grad(loss))


flags = st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=2, max_size=2)


@pytest.mark.parametrize("masks", [(), ("start",), ("valid",), ("valid", "start")])
@given(valid=flags, start=flags, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
@float64_in_small_blocks()
def test_gradients_in_blocks(masks, valid, start, seed):
    """Of every input, against autodiff of the recurrence, and against finite differences along a random direction."""
    draw = np.random.default_rng(seed)
    shapes = {"x": (2, T, 3), "weight": (4, 3), "cache": (2, 3, 3), "bias": (3,)}
    found = {name: jnp.asarray(draw.standard_normal(shape)) for name, shape in shapes.items()}
    cotangents = [jnp.asarray(draw.standard_normal(shapes[name])) for name in ("x", "cache")]
    rest = jnp.array(valid), jnp.array(start), cotangents
    value, gradient = loss_of(masks, "xla")
    got = gradient(found, *rest)
    assert_close(got, loss_of(masks, "reference")[1](found, *rest), {"": 1e-12})
    for name, array in found.items():
        direction, step = jnp.asarray(draw.standard_normal(array.shape)), 1e-5
        ends = [value(found | {name: array + sign * step * direction}, *rest) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((got[name] * direction).sum(), slope, rtol=1e-6, atol=1e-7)


@float64_in_small_blocks()
def test_gradients_of_gradients():
    draw = np.random.default_rng(0)
    x, weight, cache = (jnp.asarray(draw.standard_normal(shape)) for shape in ((1, 18, 2), (3, 2), (1, 2, 2)))
    valid, start = jnp.asarray(draw.random((1, 18)) < 0.7), jnp.asarray(draw.random((1, 18)) < 0.2)

    def op(x, weight, cache):
        return short_conv(x, weight, cache, valid=valid, start=start, activation="silu", implementation="xla")

    check_grads(jax.jit(op), (x, weight, cache), order=2, modes=("rev",), rtol=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_the_backward_keeps_the_arguments_only(masks):
    found, valid, start = arrays(40, 4, jnp.bfloat16)
    masks = (valid, start) if masks else (None, None)

    def pullback(found, valid, start):
        return jax.vjp(lambda f: short_conv(**f, valid=valid, start=start, activation="silu"), found)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, found, *masks))
    sizes = [a.size * a.dtype.itemsize for a in kept]
    assert sum(sizes) <= sum(a.nbytes for a in jax.tree.leaves((found, masks)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_stands_at_invalid_tokens_is_not_read(implementation):
    found, valid, start = arrays(11, 4)
    run = compiled(functools.partial(short_conv, activation="silu", implementation=implementation))
    outputs = [
        run(**found | {"x": jnp.where(valid[..., None], found["x"], poison)}, valid=valid, start=start)
        for poison in (0.0, jnp.nan)
    ]
    for clean, poisoned in zip(*outputs, strict=True):
        np.testing.assert_array_equal(clean, poisoned)
    assert (np.asarray(outputs[1][0])[~np.asarray(valid)] == 0).all()


def test_equals_numpy():
    found, _, _ = arrays(11, 4)
    x, weight, before, bias = (np.asarray(found[n]) for n in ("x", "weight", "cache", "bias"))
    for implementation in IMPLEMENTATIONS:
        y, cache = short_conv(**found, activation="silu", implementation=implementation)
        rows = np.concatenate([before, x], 1)
        z = sum(rows[:, j : j + 11] * weight[j] for j in range(4)) + bias
        np.testing.assert_allclose(y, z / (1 + np.exp(-z)), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(cache, rows[:, -3:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_start_at_an_invalid_token_clears_the_history(implementation):
    found, _, _ = arrays(4, 4)
    valid = jnp.array([[True, True, False, True]] * B)
    start = jnp.array([[False, False, True, False]] * B)
    y, cache = short_conv(**found, valid=valid, start=start, implementation=implementation)
    x, weight, bias = (np.asarray(found[n]) for n in ("x", "weight", "bias"))
    np.testing.assert_allclose(y[:, 3], x[:, 3] * weight[3] + bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache[:, :2], 0)
    np.testing.assert_array_equal(cache[:, 2], x[:, 3])
    end = jnp.array([[False, False, False, True]] * B)
    _, cache = short_conv(**found, valid=~end, start=end, implementation=implementation)
    np.testing.assert_array_equal(cache, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sequence_may_be_cut_anywhere(implementation):
    found, valid, start = arrays(11, 4)
    run = compiled(functools.partial(short_conv, activation="silu", implementation=implementation))
    y, final = run(**found, valid=valid, start=start)
    for cut in (1, 6):
        head, cache = run(**found | {"x": found["x"][:, :cut]}, valid=valid[:, :cut], start=start[:, :cut])
        rest = found | {"x": found["x"][:, cut:], "cache": cache}
        tail, cache = run(**rest, valid=valid[:, cut:], start=start[:, cut:])
        joined = np.concatenate([head, tail], 1)
        np.testing.assert_allclose(joined, y, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(cache, final)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_summed_in_float32(implementation):
    found, _, _ = arrays(11, 4)
    found["x"] = found["x"].astype(jnp.bfloat16)
    y, cache = short_conv(**found, implementation=implementation)
    wide, _ = short_conv(**found | {"x": found["x"].astype(jnp.float32)}, implementation=implementation)
    assert (y.dtype, cache.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_start_forgets_a_cache_that_is_not_finite(implementation):
    with jax.enable_x64(True):
        found, valid, start = arrays(11, 4, jnp.float64)
        start = start.at[:, 0].set(True)
        run = program("silu", implementation)
        caches = (jnp.full_like(found["cache"], value) for value in (jnp.nan, 0))
        got, want = (run(found | {"cache": cache}, valid, start) for cache in caches)
        np.testing.assert_array_equal(got["grad_cache"], 0)
        assert_close(got, want, {"": 0.0})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cache_may_be_donated(implementation):
    found, _, _ = arrays(11, 4)
    cache = found.pop("cache")

    def op(cache, found):
        return short_conv(**found, cache=cache, implementation=implementation)

    want = compiled(op)(cache, found)
    got = compiled(op, donate_argnums=0)(cache, found)
    assert cache.is_deleted()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_may_be_shared(implementation):
    """vmap over the rows with one `start` for all of them, inside jax.checkpoint, equals the plain call."""
    found, _, start = arrays(11, 4)
    weights = {name: found.pop(name) for name in ("weight", "bias")}

    def loss(found, weights, start):
        y, cache = short_conv(**found, **weights, start=start, activation="silu", implementation=implementation)
        return (y**2).sum() + (cache**2).sum()

    shared = start[:1]
    want = compiled(jax.grad(loss))(found, weights, jnp.repeat(shared, B, 0))
    rows = {name: a[:, None] for name, a in found.items()}
    mapped = compiled(jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(0, None, None)))(rows, weights, shared)
    assert_close({name: a[:, 0] for name, a in mapped.items()}, want, {"": 1e-6})


def test_taps_of_ids():
    """Integers, no trailing axis, and a fill that is no id."""
    ids, cache = jnp.array([[1, 2, 3, 4, 5]]), jnp.array([[-1, 9]])
    valid, start = jnp.array([[True, False, True, True, True]]), jnp.array([[False, False, False, True, False]])
    rows, last = taps(ids, cache)
    np.testing.assert_array_equal(rows, [[[-1, 9, 1, 2, 3]], [[9, 1, 2, 3, 4]], [[1, 2, 3, 4, 5]]])
    np.testing.assert_array_equal(last, [[4, 5]])
    rows, last = taps(ids, cache, valid, start, -1)
    np.testing.assert_array_equal(np.stack(rows)[:, 0, valid[0]], [[-1, 9, -1, -1], [9, 1, -1, 4], [1, 3, 4, 5]])
    np.testing.assert_array_equal(last, [[4, 5]])
    _, last = taps(ids[:, :4], cache, valid[:, :4], start[:, :4], -1)
    np.testing.assert_array_equal(last, [[-1, 4]])


def test_taps_of_matrices():
    x = jnp.arange(2 * 3 * 2 * 2, dtype=jnp.float32).reshape(2, 3, 2, 2)
    rows, last = taps(x, jnp.zeros((2, 1, 2, 2)), valid=jnp.array([[True, True, True], [True, False, True]]))
    np.testing.assert_array_equal(rows[0][0], np.concatenate([np.zeros((1, 2, 2)), x[0, :2]]))
    np.testing.assert_array_equal(rows[0][1, 2], x[1, 0])
    np.testing.assert_array_equal(last, x[:, 2:])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_shard_map(implementation, masks):
    found, valid, start = arrays(11, 4)
    shared = {n: found.pop(n) for n in ("weight", "bias")}
    rows = jax.tree.map(lambda a: jnp.concatenate([a, a, a])[:8], (found, (valid, start) if masks else (None, None)))

    def loss(found, shared, masks):
        y, cache = short_conv(**found, **shared, valid=masks[0], start=masks[1], implementation=implementation)
        return (y**2).sum() + (cache**2).sum()

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, everywhere = jax.P("data"), jax.P()
    gradients = jax.grad(loss, (0, 1))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(data, everywhere, data), out_specs=(data, everywhere))
    want, got = (compiled(f)(rows[0], shared, rows[1]) for f in (gradients, sharded))
    assert_close(got[0] | got[1], want[0] | want[1], {"": 1e-5})


@pytest.mark.usefixtures("as_user")
def test_errors_name_the_argument():
    found, valid, start = arrays(5, 4)
    for changed, message in [
        ({"x": found["x"][0]}, r"short_conv: x has shape \[5, 5\], needs \[b t c\]"),
        ({"weight": found["weight"][:, :2]}, r"weight has shape \[4, 2\], needs \[4, 5\]"),
        ({"cache": found["cache"][:, 1:]}, r"cache has shape \[3, 2, 5\], needs \[3, 3, 5\]"),
        ({"bias": found["weight"]}, r"bias has shape \[4, 5\], needs \[5\]"),
        ({"valid": valid[:, :4]}, r"valid has shape \[3, 4\], needs \[3, 5\]"),
        ({"start": start.astype(jnp.int32)}, "start has dtype int32, needs bool"),
        *(
            ({name: found[name].astype(dtype)}, f"{name} has dtype {dtype}, needs a real floating dtype")
            for name in found
            for dtype in ("int32", "complex64")
        ),
        ({"activation": "relu"}, "activation is 'relu', needs None or 'silu'"),
        ({"implementation": "fast"}, "implementation is 'fast', needs None or one of reference, xla"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_conv(**found | changed)
    with pytest.raises(ValueError, match=r"taps: cache has shape \[3, 3, 4\], needs \[3, 3, 5\]"):
        taps(found["x"], found["cache"][..., :4])
