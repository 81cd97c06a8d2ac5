"""What the tests of the layers in this folder share: inputs, the pieces around a recurrence in numpy, bad fields."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.memory import Flow

apply = jax.jit(lambda memory, *args: memory.apply(*args), static_argnums=0)


def inputs(memory, t=7, batch=2):
    """Parameters, the empty state and x."""
    keys = jax.random.split(jax.random.key(0), 2)
    return memory.init(keys[0]), memory.init_state(batch), jax.random.normal(keys[1], (batch, t, memory.dim))


def float64(*trees):
    """As numpy arrays, in which the papers' equations are computed."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), trees)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def l2_norm(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def projected(memory, p, x, *names):
    """x W of each of these weights, after the causal convolution of all of them where the memory has one."""
    b, t, _ = x.shape
    rows = x @ np.hstack([p[name] for name in names])
    if memory.use_short_conv:
        padded = np.concatenate([np.zeros((b, memory.conv_size - 1, rows.shape[-1])), rows], 1)
        rows = sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size))
    return np.split(rows, np.cumsum([p[name].shape[1] for name in names])[:-1], -1)


def qkv(memory, p, x, *shapes):
    """q, k and v [b t h _], in these numbers and widths of heads; silu follows the convolution where there is one."""
    rows = projected(memory, p, x, "w_q", "w_k", "w_v")
    rows = [silu(a) for a in rows] if memory.use_short_conv else rows
    return [a.reshape(*x.shape[:2], *shape) for a, shape in zip(rows, shapes, strict=True)]


def above(memory, params, state, x, bound):
    """The last of two layers whose forget gates have a lower bound, and this is its."""
    bounds = jnp.stack([jnp.zeros(memory.d), jnp.broadcast_to(jnp.asarray(bound, jnp.float32), (memory.d,))])
    y, state = dataclasses.replace(memory, layer=1, layers=2).apply(params, state, Flow(x, {"lower_bounds": bounds}))
    return y.x, state


def bad_fields(memory, *cases):
    """A test of each (field, value, needs): this value is refused, and the message says all three."""

    @pytest.mark.parametrize("field, value, needs", cases)
    def test(field, value, needs):
        message = re.escape(f"{type(memory).__name__}: {field} is {value!r}, needs ") + f".*{re.escape(needs)}"
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(memory, **{field: value})

    return test
