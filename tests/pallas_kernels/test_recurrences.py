"""linear_attention and delta_rule: every implementation against the token recurrence, and against golden files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule
from pallas_kernels.linear_attention import linear_attention
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.compare import assert_close, compiled, error, value_and_gradients

GOLDENS = Path(__file__).parents[1] / "goldens"
OPS = {linear_attention: cases.LINEAR_ATTENTION, delta_rule: cases.DELTA_RULE}
NAMED = [pytest.param(op, case, id=f"{op.__name__}-{case.name}") for op, table in OPS.items() for case in table]
FAST_FORMS = [name for name in IMPLEMENTATIONS if name != "reference"]
GATES = ("grad_log_decay", "grad_beta")


@functools.cache
def bound(op, chunk_size, implementation):
    return functools.partial(op, chunk_size=chunk_size, implementation=implementation)


def run(op, case, arrays, cotangents, implementation):
    chunk_size = case.chunk_size if implementation in FAST_FORMS else 64  # the recurrence has no chunks
    program = value_and_gradients(bound(op, chunk_size, implementation))
    return program(arrays, cases.start(case), cotangents)


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize(("op", "case"), NAMED)
def test_equals_reference(op, case, implementation):
    with jax.enable_x64(True):
        arrays, cotangents = cases.arrays(case, op is delta_rule)
        want = run(op, case, arrays, cotangents, "reference")
        got = run(op, case, arrays, cotangents, implementation)
        assert_close(got, want, {"": 1e-12, "grad_log_decay": 1e-11})


# Chunks of 64 with sums of log decays of hundreds, where differences of cumulative sums have lost a one-step decay; and
# keys so alike that an inverse by powers of A has lost everything.
HARD = {
    linear_attention: [
        Case("head", 150, gates="mixed", start="inside", chunk_size=64),
        Case("channel", 150, "channel", gates="mixed", start="inside", chunk_size=64),
        Case("strong", 150, "channel", gates="strong", chunk_size=64),
    ],
    delta_rule: [
        Case("mixed", 150, gates="mixed", start="inside", chunk_size=64),
        Case("similar-beta-1", 150, "none", keys="similar", beta=1, chunk_size=64),
        Case("similar-beta-2", 150, "none", keys="similar", beta=2, chunk_size=64),
    ],
}


@pytest.mark.parametrize("implementation", ["reference", *FAST_FORMS])
@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, c, id=f"{op.__name__}-{c.name}") for op, table in HARD.items() for c in table]
)
def test_float32_stays_close_to_float64(op, case, implementation):
    with jax.enable_x64(True):
        arrays, cotangents = cases.arrays(case, op is delta_rule)
        narrow = {name: a.astype(jnp.float32) for name, a in arrays.items()}
        want = run(op, case, {name: a.astype(jnp.float64) for name, a in narrow.items()}, cotangents, "reference")
        got = run(op, case, narrow, cotangents, implementation)
    assert got["final_state"].dtype == jnp.float32
    # beta = 2: reflections, whose rounding errors never decay
    assert_close(got, want, {"": 1e-4 if case.beta == 2 else 5e-6})


@pytest.mark.parametrize("implementation", ["reference", *FAST_FORMS])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_bfloat16(op, implementation):
    """The output is rounded once (2e-3), gradients on their way through several products."""
    case = Case("bfloat16", 55, gates="mild", start="inside")
    arrays, cotangents = cases.arrays(case, op is delta_rule, jnp.float32)
    # gates and state stay float32, as in a model
    narrow = {name: a.astype(jnp.bfloat16) if name in "qkv" else a for name, a in arrays.items()}
    got = run(op, case, narrow, cotangents, implementation)
    wide = {name: a.astype(jnp.float32) for name, a in narrow.items()}
    want = run(op, case, wide, cotangents, "reference")
    assert got["o"].dtype == jnp.bfloat16
    assert got["final_state"].dtype == jnp.float32
    assert_close(got, want, {"": 8e-3, "o": 5e-3, "final_state": 5e-3, **dict.fromkeys(GATES, 2e-2)})


@pytest.mark.parametrize("implementation", ["reference", *FAST_FORMS])
@pytest.mark.parametrize("name", ["gla_a", "simple_gla_a", "retnet_a", "delta_net_a", "gated_delta_net_a"])
def test_golden(name, implementation):
    with np.load(GOLDENS / f"{name}.npz") as file:
        z = dict(file)
    names = {"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "log_decay", "gk": "log_decay", "h0": "initial_state"}
    arrays = {ours: jnp.asarray(z[f"in_{theirs}"]) for theirs, ours in names.items() if f"in_{theirs}" in z}
    scale = json.loads(str(z["cfg_json"]))["scale"]
    constant = {}
    if name == "retnet_a":
        constant["log_decay"] = jnp.broadcast_to(jnp.asarray(z["out_log_decay"]), arrays["q"].shape[:3])

    def op(q, start, **rest):
        f = delta_rule if "beta" in rest else linear_attention
        return f(q * scale, **rest, **constant, chunk_size=cases.CHUNK, implementation=implementation)

    got = value_and_gradients(op)(arrays, None, (z["in_do"], z["in_dht"]))
    theirs = {"o": "out_o", "final_state": "out_final_state"}
    theirs |= {f"grad_{ours}": f"grad_{other}" for other, ours in names.items() if f"in_{other}" in z}
    want = {ours: z[other] for ours, other in theirs.items()}
    assert_close(got, want, {"": 1e-5, "o": 1e-6, "final_state": 1e-6, **dict.fromkeys(GATES, 2e-4)})


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_packed_documents_equal_single_ones(op):
    case = Case("packed", 40, gates="mild", start="inside")
    arrays, _ = cases.arrays(case, op is delta_rule, jnp.float32)
    start = cases.start(case)
    run = compiled(functools.partial(op, chunk_size=16, implementation="xla"))
    reference = compiled(functools.partial(op, implementation="reference"))
    o, final = run(**arrays, start=start)
    for row in range(2):
        borders = [0, *np.flatnonzero(start[row]).tolist(), case.t]
        state = arrays["initial_state"][row : row + 1]
        for first, end in zip(borders, borders[1:], strict=False):
            part = {n: a[row : row + 1, first:end] for n, a in arrays.items() if n != "initial_state"}
            if first:
                state = jnp.zeros_like(state)
            alone, state = reference(**part, initial_state=state)
            assert error(o[row : row + 1, first:end], alone) < 1e-5
        assert error(final[row : row + 1], state) < 1e-5


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_a_sequence_may_be_cut_anywhere(op):
    arrays, _ = cases.arrays(Case("cut", 40, gates="mild"), op is delta_rule, jnp.float32)
    state = arrays.pop("initial_state")
    run = compiled(op)
    o, final = run(**arrays, initial_state=state)
    for cut in (1, 16, 37):
        head, middle = run(**{n: a[:, :cut] for n, a in arrays.items()}, initial_state=state)
        tail, end = run(**{n: a[:, cut:] for n, a in arrays.items()}, initial_state=middle)
        assert error(jnp.concatenate([head, tail], 1), o) < 1e-6
        assert error(end, final) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", *FAST_FORMS])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_zeros_are_an_exact_no_op(op, implementation):
    arrays, _ = cases.arrays(Case("padding", 23, gates="mild"), op is delta_rule, jnp.float32)
    real = jnp.arange(23) < 19
    for name in arrays.keys() - {"q", "initial_state"}:
        a = arrays[name]
        arrays[name] = jnp.where(real.reshape(1, -1, *(1,) * (a.ndim - 2)), a, 0.0)
    short = {n: a if n == "initial_state" else a[:, :19] for n, a in arrays.items()}
    run = compiled(bound(op, cases.CHUNK, implementation))
    np.testing.assert_array_equal(run(**arrays)[1], run(**short)[1])


def test_channel_decay_equal_in_all_channels_is_head_decay():
    arrays, _ = cases.arrays(Case("equal", 23), False, jnp.float32)
    run = compiled(linear_attention)
    narrow = run(**arrays)
    wide = run(**arrays | {"log_decay": jnp.broadcast_to(arrays["log_decay"][..., None], arrays["k"].shape)})
    assert_close(dict(enumerate(wide)), dict(enumerate(narrow)), {"": 1e-6})


def test_grouped_values_equal_repeated_keys():
    arrays, _ = cases.arrays(Case("groups", 23, groups=3), True, jnp.float32)
    repeated = arrays | {n: jnp.repeat(arrays[n], 3, axis=2) for n in ("q", "k")}
    for implementation in IMPLEMENTATIONS:
        run = compiled(bound(delta_rule, 64, implementation))
        narrow, wide = run(**arrays), run(**repeated)
        assert_close(dict(enumerate(narrow)), dict(enumerate(wide)), {"": 1e-6})


def test_delta_rule_recalls_what_it_wrote():
    """beta = 1 and |k| = 1: reading with the key just written gives its value."""
    arrays, _ = cases.arrays(Case("recall", 23, "none", beta=1), True, jnp.float32)
    o, _ = compiled(delta_rule)(**arrays | {"q": arrays["k"]})
    assert error(o, arrays["v"]) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", *FAST_FORMS])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_transforms(op, implementation):
    """vmap, scan, remat and grad inside one jit equal the plain calls."""
    arrays, (do, dS) = cases.arrays(Case("transforms", 19, start="inside", gates="mild"), op is delta_rule, jnp.float32)
    start = cases.start(Case("transforms", 19, start="inside"))

    def loss(arrays, start):
        o, state = op(**arrays, start=start, chunk_size=8, implementation=implementation)
        return (o**2).sum() + (state**2).sum()

    def rows(a):
        return jnp.stack([a[:1], a[1:]])

    split = jax.tree.map(rows, (arrays, start))
    plain = compiled(jax.grad(loss))(arrays, start)
    batched = compiled(jax.vmap(jax.grad(jax.checkpoint(loss))))(*split)
    scanned = compiled(lambda xs: jax.lax.scan(lambda c, x: (c, jax.grad(loss)(*x)), 0, xs)[1])(split)
    plain = jax.tree.map(rows, plain)
    assert_close(batched, plain, {"": 1e-5})
    assert_close(scanned, plain, {"": 1e-5})


@pytest.mark.parametrize("t", [1, 37])
@pytest.mark.parametrize("implementation", ["reference", *FAST_FORMS])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_under_shard_map(op, implementation, t):
    """Rows over 8 devices, from no state and from one that all devices share, and the gradient of that."""
    arrays, _ = cases.arrays(Case("sharded", t, gates="mild"), op is delta_rule, jnp.float32)
    shared = arrays.pop("initial_state")[:1]
    arrays = {n: jnp.concatenate([a] * 4) for n, a in arrays.items()}
    start = jnp.zeros((8, t), bool).at[3, t // 2].set(True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = jax.P("data"), jax.P()

    def loss(arrays, shared, start):
        total = 0.0
        for state in (None, jnp.broadcast_to(shared, (arrays["q"].shape[0], *shared.shape[1:]))):
            o, final = op(**arrays, initial_state=state, start=start, chunk_size=16, implementation=implementation)
            total += (o**2).sum() + (final**2).sum()
        return total

    gradients = jax.grad(loss, (0, 1))
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(rows, everywhere, rows), out_specs=(rows, everywhere), check_vma=True
    )
    want, got = (compiled(f)(arrays, shared, start) for f in (gradients, sharded))
    assert_close(got[0] | {"shared": got[1]}, want[0] | {"shared": want[1]}, {"": 1e-5})


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_none_picks_the_recurrence_for_short_sequences(op):
    for t, loops in ((1, 0), (16, 1), (17, 0)):  # 17 tokens are one chunk, for which there is no loop
        arrays, _ = cases.arrays(Case("choice", t), op is delta_rule, jnp.float32)
        assert str(jax.make_jaxpr(op)(**arrays)).count("scan[") == loops


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_errors_name_the_argument(op):
    arrays, _ = cases.arrays(Case("errors", 5), op is delta_rule, jnp.float32)
    for changed, message in [
        ({"q": arrays["q"][0]}, rf"{op.__name__}: q has shape \[5, 3, 5\], needs \[b t hk? k\]"),
        ({"k": arrays["k"][:, 1:]}, r"k has shape \[2, 4, 3, 5\], needs \[2, 5, 3, 5\]"),
        ({"v": arrays["v"][:, :, :2]}, "v has"),
        ({"log_decay": arrays["v"]}, r"log_decay has shape \[2, 5, 3, 7\], needs \[2, 5, 3\]"),
        ({"initial_state": arrays["v"]}, r"initial_state has .* needs \[2, 3, 5, 7\]"),
        ({"start": jnp.zeros((2, 4), bool)}, r"start has shape \[2, 4\], needs \[2, 5\]"),
        ({"start": jnp.zeros((2, 5), jnp.int32)}, "start has dtype int32, needs bool"),
        ({"chunk_size": 48}, "chunk_size is 48, needs a power of two"),
        ({"implementation": "fast"}, "implementation is 'fast', needs None or one of reference, xla"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(**arrays | changed)
