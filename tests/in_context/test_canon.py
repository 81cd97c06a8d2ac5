"""Canon against its sum, tap by tap."""

from functools import partial

import jax
import numpy as np
import pytest

from memjax.in_context.canon import Canon
from pallas_kernels.compat import QUICK_COMPILE

MEMORY = Canon(dim=5, width=3)
PARAMS = MEMORY.init(jax.random.key(0))
X = np.random.default_rng(0).standard_normal((2, 6, 5), np.float32)
apply = partial(jax.jit, compiler_options=QUICK_COMPILE)(MEMORY.apply)


def test_is_the_sum_of_the_last_tokens():
    y, state = apply(PARAMS, MEMORY.init_state(2), X)
    padded = np.concatenate([np.zeros((2, 2, 5), np.float32), X], 1)
    want = X + sum(np.asarray(PARAMS["w"])[2 - i] * padded[:, 2 - i : 8 - i] for i in range(3))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.conv, X[:, -2:])


def test_a_document_does_not_see_the_one_before():
    start = np.array([[False, False, False, True, False, False]] * 2)
    y, _ = apply(PARAMS, MEMORY.init_state(2), X, start=start)
    alone, _ = apply(PARAMS, MEMORY.init_state(2), X[:, 3:])
    np.testing.assert_allclose(y[:, 3:], alone, rtol=1e-5, atol=1e-6)


def test_bad_fields():
    with pytest.raises(ValueError, match="Canon: width is 1, needs at least 2"):
        Canon(dim=5, width=1)
