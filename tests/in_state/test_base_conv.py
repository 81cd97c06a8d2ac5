"""BaseConv against its formula in numpy, tap by tap."""

import dataclasses

import jax
import numpy as np
import pytest

from memjax import tensors
from memjax.in_state.base_conv import BaseConv
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = BaseConv(dim=4)


def paper(memory, params, x):
    """y and the rows before the convolution, in float64."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    u1, u2 = np.split(x @ p["w_in"] + p["b_in"], 2, -1)
    conv = np.zeros_like(u1) + p["b_conv"]
    for s in range(x.shape[1]):
        for tap in range(memory.conv_size):
            if (before := s - memory.conv_size + 1 + tap) >= 0:
                conv[:, s] += p["conv"][tap] * u1[:, before]
    return (conv * sigmoid(conv) * u2) @ p["w_out"] + p["b_out"], u1


@pytest.mark.parametrize("memory", [SMALL, BaseConv(dim=4, expand=3, conv_size=2)], ids=["plain", "wide, two taps"])
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)
    params |= {name: jax.random.normal(jax.random.key(3), params[name].shape) for name in ("b_in", "b_conv", "b_out")}
    y, state = apply(memory, params, state, x)
    want, rows = paper(memory, params, x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.conv, rows[:, 1 - memory.conv_size :], rtol=1e-5, atol=1e-6)


def test_names_of_published_weights():
    params = SMALL.init(jax.random.key(0))
    published = tensors.write(SMALL.tensors(), params)
    assert {name: a.shape for name, a in published.items()} == {
        "in_proj.weight": (16, 4),
        "in_proj.bias": (16,),
        "conv.conv.weight": (8, 1, 3),
        "conv.conv.bias": (8,),
        "out_proj.weight": (4, 8),
        "out_proj.bias": (4,),
    }
    again = tensors.read(SMALL.tensors(), published)
    assert again.keys() == params.keys()
    for name, a in again.items():
        np.testing.assert_array_equal(a, params[name])


@pytest.mark.parametrize("field, value", [("dim", 0), ("expand", 0), ("conv_size", 1)])
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=f"BaseConv: {field} is {value}, needs at least"):
        dataclasses.replace(SMALL, **{field: value})
