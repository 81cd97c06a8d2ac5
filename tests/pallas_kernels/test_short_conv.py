"""short_conv and taps, against the token recurrence and against documents one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.short_conv import IMPLEMENTATIONS, short_conv, taps
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
        if valid is not None:
            y = jnp.where(valid[..., None], y, jnp.zeros_like(y))
        return (y**2).sum() + (cache**3).sum(), {"y": y, "cache": cache}

    @compiled
    def run(arrays, valid, start):
        gradients, out = jax.grad(loss, has_aux=True)(arrays, valid, start)
        return out | {f"grad_{n}": g for n, g in gradients.items()}

    return run


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("masks", ["none", "valid", "start", "both"])
@pytest.mark.parametrize(("t", "w"), [(1, 4), (2, 4), (11, 4), (11, 1), (5, 2)])
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
        np.testing.assert_allclose(joined[valid], np.asarray(y)[valid], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(cache, final)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_summed_in_float32(implementation):
    found, _, _ = arrays(11, 4)
    found["x"] = found["x"].astype(jnp.bfloat16)
    y, cache = short_conv(**found, implementation=implementation)
    wide, _ = short_conv(**found | {"x": found["x"].astype(jnp.float32)}, implementation=implementation)
    assert (y.dtype, cache.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


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
        ({"activation": "relu"}, "activation is 'relu', needs None or 'silu'"),
        ({"implementation": "fast"}, "implementation is 'fast', needs None or one of reference, xla"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_conv(**found | changed)
    with pytest.raises(ValueError, match=r"taps: cache has shape \[3, 3, 4\], needs \[3, 3, 5\]"):
        taps(found["x"], found["cache"][..., :4])
