"""Laws of the recurrences: identities between ops, cuts, packing, padding, transforms, errors."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.dplr_delta_rule import dplr_delta_rule
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import MANY_CHUNKS, PLAIN, VARIANTS
from tests.pallas_kernels.compare import assert_close, compiled, error, settings, value_and_gradients

both_implementations = pytest.mark.parametrize("implementation", ["reference", "xla"])
ALL_AT_ONCE = VARIANTS[-2]  # grouped heads, a decay per channel, several updates a token, erase and write


def of_variants(*variants):
    return pytest.mark.parametrize("variant", variants, ids=lambda variant: variant.name)


one_of_each_op = of_variants(*PLAIN.values())


def variant(name):
    return next(v for v in VARIANTS if v.name == name)


def bound(case, implementation):
    return functools.partial(case.op, **settings(case, implementation))


def channels(x):
    """A decay per head as one per channel, all equal."""
    return x | {"log_decay": jnp.broadcast_to(x["log_decay"][..., None], (*x["log_decay"].shape, x["k"].shape[-1]))}


def rates_as_gates(x):
    shapes = {"erase": x["k"].shape, "write": x["v"].shape}
    gates = {name: jnp.broadcast_to(x["beta"][..., None], shape) for name, shape in shapes.items()}
    return {name: a for name, a in x.items() if name != "beta"} | gates


def delta_as_dplr(x):
    decayed = jnp.exp(x["log_decay"]) * x["k"]
    x = x | {"a": decayed, "b": -x["beta"][..., None] * x["k"], "k": x["beta"][..., None] * x["k"]}
    return {name: a for name, a in x.items() if name != "beta"}


def rows(x, n):
    """n updates a token as n tokens: the first decays, the last is read."""
    at = jnp.arange(x["q"].shape[1] * n) % n

    def place(a, j):
        a = jnp.repeat(a, n, 1)
        return jnp.where((at == j).reshape(1, -1, *(1,) * (a.ndim - 2)), a, 0.0)

    return x | {"q": place(x["q"], n - 1), "log_decay": place(x["log_decay"], 0)}


def heads(x, groups):
    return x | {name: jnp.repeat(x[name], groups, 2) for name in "qk"}


# one op and its arguments, the same as another op and its
IDENTITIES = {
    "equal channels are a head": ("linear-head", lambda x: x, linear_attention, channels),
    "KDA with equal channels is Gated DeltaNet": ("beta-head", lambda x: x, delta_rule, channels),
    "erase = write = beta is KDA": ("beta-channel", lambda x: x, delta_rule, rates_as_gates),
    "the delta rule is a DPLR": ("beta-channel", lambda x: x, dplr_delta_rule, delta_as_dplr),
    "DPLR without a is linear attention": (
        "dplr",
        lambda x: x | {"a": 0 * x["a"]},
        linear_attention,
        lambda x: {name: a for name, a in x.items() if name not in "ab"},
    ),
    "DPLR without b is linear attention": (
        "dplr",
        lambda x: x | {"b": 0 * x["b"]},
        linear_attention,
        lambda x: {name: a for name, a in x.items() if name not in "ab"},
    ),
    "two updates a token are two tokens": ("beta-head-twice", lambda x: x, delta_rule, lambda x: rows(x, 2)),
    "grouped heads are repeated heads": ("beta-channel-groups", lambda x: x, delta_rule, lambda x: heads(x, 2)),
    "without decay is a decay of 0": (
        "beta-none",
        lambda x: x,
        delta_rule,
        lambda x: x | {"log_decay": jnp.zeros_like(x["beta"])},
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    case, own, other_op, others = IDENTITIES[name]
    case = variant(case)._replace(t=19)
    with jax.enable_x64(True):
        x = cases.arrays(case)[0]
        op, chunks = bound(case, "xla"), {"chunk_size": case.chunk_size, "implementation": "xla"}
        o, state = compiled(lambda x: op(**own(x)))(x)
        want_o, want_state = compiled(lambda x: other_op(**others(x), **chunks))(x)
        assert_close({"o": o, "state": state}, {"o": want_o[:, case.n - 1 :: case.n], "state": want_state}, {"": 1e-13})


@of_variants(*PLAIN.values(), ALL_AT_ONCE)
def test_packed_documents_equal_single_ones(variant):
    """From a warm state; the single ones are rows of a batch of their own, filled up with what is not valid."""
    case = variant._replace(name="packed", t=40, gates="mild", start="inside")
    arrays, start = cases.arrays(case, np.float32)[0], cases.masks(case)["start"]
    warm = arrays.pop("initial_state")
    o, final = map(np.asarray, compiled(bound(case, "xla"))(**arrays, initial_state=warm, start=start))

    borders = [[0, *np.flatnonzero(row).tolist(), case.t] for row in start]
    documents = [
        (row, first, end) for row in (0, 1) for first, end in zip(borders[row], borders[row][1:], strict=False)
    ]

    def alone(a):
        n = a.shape[1] // case.t
        parts = [a[row, first * n : end * n] for row, first, end in documents]
        return np.stack([np.pad(p, [(0, a.shape[1] - len(p))] + [(0, 0)] * (p.ndim - 1)) for p in parts])

    valid = np.stack([np.arange(case.t) < end - first for _, first, end in documents])
    states = np.stack([warm[row] if first == 0 else 0 * warm[row] for row, first, _ in documents])
    arrays = {name: alone(a) for name, a in arrays.items()}
    want, finals = map(np.asarray, compiled(bound(case, "reference"))(**arrays, initial_state=states, valid=valid))
    for i, (row, first, end) in enumerate(documents):
        assert error(o[row, first:end], want[i, : end - first]) < 1e-5
        if end == case.t:
            assert error(final[row], finals[i]) < 1e-5


@of_variants(*PLAIN.values(), ALL_AT_ONCE)
def test_a_sequence_may_be_cut_anywhere(variant):
    case = variant._replace(name="cut", t=40, gates="mild")
    arrays, _ = cases.arrays(case, np.float32)
    state = arrays.pop("initial_state")
    run = compiled(bound(case, "xla"))
    o, final = run(**arrays, initial_state=state)

    def tokens(first, end):
        return {name: a[:, first * (n := a.shape[1] // case.t) : end * n] for name, a in arrays.items()}

    for cut in (13, 27):
        head, middle = run(**tokens(0, cut), initial_state=state)
        tail, last = run(**tokens(cut, case.t), initial_state=middle)
        assert error(np.concatenate([head, tail], 1), o) < 1e-6
        assert error(last, final) < 1e-6


@both_implementations
@one_of_each_op
def test_zeros_are_an_exact_no_op(variant, implementation):
    case = variant._replace(name="padding", t=23, gates="mild")
    arrays, _ = cases.arrays(case, np.float32)
    for name in arrays.keys() - {"q", "initial_state"}:
        arrays[name][:, 19:] = 0
    short = {n: a if n == "initial_state" else a[:, :19] for n, a in arrays.items()}
    run = compiled(bound(case, implementation))
    np.testing.assert_array_equal(run(**arrays)[1], run(**short)[1])


@both_implementations
@of_variants(*PLAIN.values(), ALL_AT_ONCE)
def test_where_nothing_is_valid_nothing_changes(variant, implementation):
    """Every input is NaN, and the gradients have none."""
    with jax.enable_x64(True):
        arrays, (do, dS) = cases.arrays(variant)
        tokens = {name: np.full_like(a, np.nan) for name, a in arrays.items() if name != "initial_state"}
        masks = dict.fromkeys(("valid", "start"), np.zeros(do.shape[:2], bool))
        got = value_and_gradients(variant.op, **settings(variant, implementation))(arrays | tokens, masks, (do, dS))
    for name, want in {"final_state": arrays["initial_state"], "grad_initial_state": dS}.items():
        np.testing.assert_array_equal(got.pop(name), want)
    for a in got.values():
        np.testing.assert_array_equal(a, 0)


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [
        (ALL_AT_ONCE, "reference"),
        (ALL_AT_ONCE, "xla"),
        (PLAIN[linear_attention], "xla"),
        (PLAIN[dplr_delta_rule], None),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_transforms(variant, implementation):
    """vmap, scan, remat and grad inside one jit equal the plain calls."""
    case = variant._replace(name="transforms", t=19, start="inside", gates="mild", chunk_size=8)
    arrays, masks = cases.arrays(case, np.float32)[0], cases.masks(case)
    op = bound(case, implementation)

    def loss(arrays, masks):
        o, state = op(**arrays, **masks)
        return (o**2).sum() + (state**2).sum()

    def by_row(a):
        return np.stack([a[:1], a[1:]])

    split = jax.tree.map(by_row, (arrays, masks))
    plain = jax.tree.map(by_row, compiled(jax.grad(loss))(arrays, masks))
    batched = compiled(jax.vmap(jax.grad(jax.checkpoint(loss))))(*split)
    scanned = compiled(lambda xs: jax.lax.scan(lambda c, x: (c, jax.grad(loss)(*x)), 0, xs)[1])(split)
    assert_close(batched, plain, {"": 1e-5})
    assert_close(scanned, plain, {"": 1e-5})


@pytest.mark.parametrize(
    ("variant", "implementation", "t"),
    [
        *((variant, None, t) for variant in PLAIN.values() for t in (1, 37)),
        *((variant, "xla", 37) for variant in MANY_CHUNKS),
        (PLAIN[delta_rule], "reference", 37),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_under_shard_map(variant, implementation, t):
    """Rows over 8 devices, from no state and from one that all devices share, and the gradient of that."""
    case = variant._replace(name="sharded", t=t, gates="mild")
    arrays, _ = cases.arrays(case, np.float32)
    shared = arrays.pop("initial_state")[:1]
    arrays = {n: np.concatenate([a] * 4) for n, a in arrays.items()}
    start = np.zeros((8, t), bool)
    start[3, t // 2] = True
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = jax.P("data"), jax.P()
    op = bound(case, implementation)

    def loss(arrays, shared, start):
        total = 0.0
        for state in (None, jnp.broadcast_to(shared, (arrays["q"].shape[0], *shared.shape[1:]))):
            o, final = op(**arrays, initial_state=state, start=start)
            total += (o**2).sum() + (final**2).sum()
        return total

    gradients = jax.grad(loss, (0, 1))
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(rows, everywhere, rows), out_specs=(rows, everywhere), check_vma=True
    )
    want, got = (compiled(f)(arrays, shared, start) for f in (gradients, sharded))
    assert_close(got[0] | {"shared": got[1]}, want[0] | {"shared": want[1]}, {"": 1e-5})


@of_variants(*MANY_CHUNKS)
def test_a_mask_may_be_shared(variant):
    """vmap over the rows with one `start` for all of them, inside jax.checkpoint, equals the plain call."""
    case = variant._replace(name="shared", t=19, gates="mild")
    arrays = cases.arrays(case, np.float32)[0]
    start = np.arange(case.t)[None] % 7 == 3
    op = bound(case, "xla")

    def loss(arrays, start):
        o, state = op(**arrays, start=start)
        return (o**2).sum() + (state**2).sum()

    want = compiled(jax.grad(loss))(arrays, np.repeat(start, 2, 0))
    rows = {name: a[:, None] for name, a in arrays.items()}
    mapped = compiled(jax.vmap(jax.grad(loss), in_axes=(0, None)))(rows, start)
    assert_close({name: a[:, 0] for name, a in mapped.items()}, want, {"": 1e-5})
    again = compiled(jax.grad(jax.checkpoint(loss)))(arrays, np.repeat(start, 2, 0))
    assert_close(again, want, {"": 1e-6})


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@one_of_each_op
def test_a_state_may_be_donated(variant, implementation):
    case = variant._replace(name="donated", t=19)
    arrays = cases.arrays(case, np.float32)[0]
    state = jnp.asarray(arrays.pop("initial_state"))

    def op(state, arrays):
        return case.op(**arrays, initial_state=state, **settings(case, implementation))

    want = compiled(op)(state, arrays)
    got = compiled(op, donate_argnums=0)(state, arrays)
    assert state.is_deleted()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@one_of_each_op
def test_a_start_forgets_a_state_that_is_not_finite(variant, implementation):
    """The document before has overflowed; the next one begins at the first token, valid or not."""
    with jax.enable_x64(True):
        masked = variant._replace(name="overflow", start="dense", valid="random")
        (arrays, cotangents), masks = cases.arrays(masked), cases.masks(masked)
        masks["start"][:, 0] = True
        program = value_and_gradients(variant.op, **settings(masked, implementation))
        for value in (np.nan, np.inf):
            state = np.full_like(arrays["initial_state"], value)
            got, want = (
                program(arrays | {"initial_state": s}, masks, cotangents) for s in (state, np.zeros_like(state))
            )
            np.testing.assert_array_equal(got["grad_initial_state"], 0)
            assert_close(got, want, {"": 0.0})


@one_of_each_op
def test_none_is_the_recurrence_for_short_sequences(variant):
    for t in (1, 16):
        arrays = cases.arrays(variant._replace(t=t), np.float32)[0]
        default, named = (jax.make_jaxpr(bound(variant, choice))(**arrays) for choice in (None, "reference"))
        assert str(default) == str(named)


@one_of_each_op
def test_none_equals_a_named_one(variant):
    with jax.enable_x64(True):
        masked = variant._replace(name="none", valid="random", start="dense")
        (arrays, cotangents), masks = cases.arrays(masked), cases.masks(masked)
        want, got = (
            value_and_gradients(variant.op, **settings(masked, choice))(arrays, masks, cotangents)
            for choice in ("xla", None)
        )
        o, state = compiled(bound(masked, None))(**arrays, **masks)  # where no gradient is taken, another form may run
        assert_close(got, want, {"": 1e-12})
        assert_close({"o": o, "final_state": state}, {n: want[n] for n in ("o", "final_state")}, {"": 1e-12})


@pytest.mark.usefixtures("as_user")
@one_of_each_op
def test_errors_name_the_argument(variant):
    x, _ = cases.arrays(variant._replace(name="errors", t=5), np.float32)
    wrong = [
        ({"q": x["q"][0]}, rf"{variant.op.__name__}: q has shape \[5, 3, 5\], needs \[b t hk? k\]"),
        ({"k": x["k"][:, 1:]}, r"k has shape \[2, 4, 3, 5\], needs \[2, 5, 3, 5\]"),
        ({"v": x["v"][:, :, :2]}, "v has"),
        ({"v": x["v"][:, 1:]}, r"v has shape \[2, 4, 3, 7\], needs \[2, 5, 3, 7\]"),
        ({"log_decay": x["v"]}, r"log_decay has shape \[2, 5, 3, 7\], needs \[2, 5, 3"),
        ({"initial_state": x["v"]}, r"initial_state has .* needs \[2, 3, 5, 7\]"),
        ({"start": jnp.zeros((2, 4), bool)}, r"start has shape \[2, 4\], needs \[2, 5\]"),
        ({"start": jnp.zeros((2, 5), jnp.int32)}, "start has dtype int32, needs bool"),
        ({"valid": jnp.zeros((2, 4), bool)}, r"valid has shape \[2, 4\], needs \[2, 5\]"),
        ({"chunk_size": 48}, "chunk_size is 48, needs a power of two"),
        ({"implementation": "fast"}, f"implementation is 'fast', needs None or one of {', '.join(IMPLEMENTATIONS)}"),
    ]
    wrong += [
        ({name: x[name].astype(dtype)}, f"{variant.op.__name__}: {name} has dtype {dtype}, needs a real floating dtype")
        for name in x
        for dtype in ("int32", "complex64")
    ]
    if variant.op is not linear_attention:
        message = "inverse_precision is 'half', needs one of float32, bf16x3, bf16"
        wrong += [({"inverse_precision": "half", "implementation": name}, message) for name in IMPLEMENTATIONS]
    if variant.op is dplr_delta_rule:
        wrong += [({name: x["v"]}, rf"{name} has shape \[2, 5, 3, 7\], needs \[2, 5, 3, 5\]") for name in "ab"]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            variant.op(**x | changed)


@pytest.mark.usefixtures("as_user")
def test_errors_of_rates_and_updates():
    x, _ = cases.arrays(variant("beta-head")._replace(name="errors", t=6), np.float32)
    k, v = x["k"], x["v"]
    for changed, message in [
        ({"beta": k}, r"beta has shape \[2, 6, 3, 5\], needs \[2, 6, 3\]"),
        ({"erase": k}, "delta_rule: got beta and erase, needs beta, or erase and write"),
        ({"beta": None, "write": v}, "got write, needs beta, or erase and write"),
        ({"beta": None}, "got none of beta, erase and write, needs"),
        ({"beta": None, "erase": v, "write": v}, r"erase has shape \[2, 6, 3, 7\], needs \[2, 6, 3, 5\]"),
        ({"beta": None, "erase": k, "write": k}, r"write has shape \[2, 6, 3, 5\], needs \[2, 6, 3, 7\]"),
        ({"v": jnp.repeat(v, 2, 2)[:, :, 1:]}, "v has 5 heads, needs a multiple of the 3 heads of k"),
        ({"num_householder": 0}, "num_householder is 0, needs at least 1"),
        ({"num_householder": 2}, r"k has shape \[2, 6, 3, 5\], needs \[2, 12, 3, 5\]"),
        ({"num_householder": 2, "k": jnp.repeat(k, 2, 1)}, r"v has shape \[2, 6, 3, 7\], needs \[2, 12, 3, 7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            delta_rule(**x | changed)


def test_annotations_agree_with_the_checks():
    x, _ = cases.arrays(variant("beta-head-twice")._replace(name="types", t=3), np.float32)
    run = compiled(delta_rule, static_argnames="num_householder")
    assert run(**x, num_householder=2)[0].shape == x["v"][:, ::2].shape
    with pytest.raises(jaxtyping.TypeCheckError, match="num_householder"):
        run(**x, num_householder=3)
