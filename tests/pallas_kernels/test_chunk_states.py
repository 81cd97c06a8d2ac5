"""chunk_states against a loop over chunks with a general inverse; summary and compose against states carried on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_states import Affine, Chunks, Correction, Write, chunk_states, compose, summary
from tests.pallas_kernels.compare import assert_close, compiled

B, H, C, K, V = 2, 3, 4, 5, 7
PARTS = {  # which parts the chunks have, and the size of the axis of D
    "written": ("write", None),
    "written, a decay": ("write", 1),
    "written, a decay per channel": ("write", K),
    "corrected": ("correction", None),
    "corrected, a decay per channel": ("correction", K),
    "both": ("write correction", K),
    "written, documents only": ("write", "documents"),  # D is the same for all heads
}


def chunks(parts, n):
    names, size = PARTS[parts]
    draw = np.random.default_rng(n)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal((n, B, H, *shape)) / 2)

    through = None
    if size is not None:
        through = jnp.exp(-(normal(K if size == K else 1, 1) ** 2)).at[n // 2].set(0)  # a document begins there
        through = through[:, :, :1] if size == "documents" else through
    write = Write(normal(C, K), normal(C, V)) if "write" in names else None
    correction = Correction(normal(C, K), normal(C, C), normal(C, V), normal(C, K)) if "correction" in names else None
    return Chunks(through, write, correction), jnp.asarray(draw.standard_normal((B, H, K, V)))


def loop(chunks, state):
    """The formulas as they stand."""
    through, write, correction = chunks
    entering, corrected = [], []
    for n in range(jax.tree.leaves(chunks)[0].shape[0]):
        S, entering = state, [*entering, state]
        state = S if through is None else through[n] * S
        if correction is not None:
            inverse = jnp.linalg.inv(jnp.eye(C) + jnp.tril(correction.A[n], -1))
            R = inverse @ (correction.u[n] - correction.w[n] @ S)
            corrected, state = [*corrected, R], state + correction.k[n].mT @ R
        if write is not None:
            state = state + write.k[n].mT @ write.v[n]
    return jnp.stack(entering), jnp.stack(corrected) if corrected else None, state


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("parts", PARTS)
def test_equals_a_loop(parts, n):
    """The states, R, and the gradients of everything given when all three results are asked for."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        given = chunks(parts, n)

        def results(f):
            def loss(given):
                states = f(*given)
                return sum((jnp.sin(x + i) * x).sum() for i, x in enumerate(jax.tree.leaves(tuple(states)))), states

            gradients, states = compiled(jax.grad(loss, has_aux=True))(given)
            return dict(enumerate(jax.tree.leaves((tuple(states), gradients))))

        assert_close(results(chunk_states), results(loop), {"": 1e-12})


@pytest.mark.parametrize("parts", PARTS)
def test_summary_carries_any_state(parts):
    with jax.enable_x64(True):
        given, state = chunks(parts, 3)
        M, E = summary(given)
        assert M.shape[-2:] == ((K, K) if given.correction is not None else (K if PARTS[parts][1] == K else 1, 1))
        carried = (M * state if M.shape[-1] == 1 else M @ state) + E
        assert_close({"state": carried}, {"state": chunk_states(given, state).final}, {"": 1e-12})


def test_compose_is_one_after_the_other_and_associative():
    """Three stretches of tokens with maps of every kind: a matrix, a diagonal, a factor, and a border of documents."""
    with jax.enable_x64(True):
        stretches = [chunks(parts, n)[0] for parts, n in zip(PARTS, (1, 2, 3, 1, 2, 3, 1), strict=True)]
        state = chunks("both", 1)[1]
        spans = [summary(stretch) for stretch in stretches]
        carried = state
        for stretch in stretches:
            carried = chunk_states(stretch, carried).final
        left = functools.reduce(compose, spans)
        right = functools.reduce(lambda later, earlier: compose(earlier, later), reversed(spans))
        for span in (left, right):
            assert_close({"state": span.M @ state + span.E}, {"state": carried}, {"": 1e-12})


def test_compose_in_an_associative_scan():
    with jax.enable_x64(True):
        given, _ = chunks("both", 5)
        each = [summary(jax.tree.map(lambda x, i=i: x[i : i + 1], given)) for i in range(5)]
        stacked = Affine(*(jnp.stack(x) for x in zip(*each, strict=True)))
        scanned = jax.lax.associative_scan(jax.vmap(compose), stacked)
        whole = summary(given)
        assert_close({"M": scanned.M[-1], "E": scanned.E[-1]}, {"M": whole.M, "E": whole.E}, {"": 1e-12})


def test_the_inverse_is_as_precise_as_asked():
    """Three precisions, three errors, each with its own sense of what a bfloat16 keeps."""
    given, state = jax.tree.map(lambda x: x.astype(jnp.float32), chunks("corrected", 2))
    exact = chunk_states(given, state).final
    for precision, (least, most) in {"bf16x3": (1e-8, 3e-5), "bf16": (1e-4, 3e-2)}.items():
        final = chunk_states(given, state, precision).final
        error = float(jnp.sqrt(jnp.mean((final - exact) ** 2) / jnp.mean(exact**2)))
        assert least < error < most
