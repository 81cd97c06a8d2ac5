"""What the tests of the layers in this folder share."""

import jax
import numpy as np

apply = jax.jit(lambda memory, *args: memory.apply(*args), static_argnums=0)


def inputs(memory, t=7, batch=2):
    """Parameters, the empty state and x."""
    keys = jax.random.split(jax.random.key(0), 2)
    return memory.init(keys[0]), memory.init_state(batch), jax.random.normal(keys[1], (batch, t, memory.dim))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
