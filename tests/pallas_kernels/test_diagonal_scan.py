"""diagonal_scan: every form against the token recurrence, that against a loop, and the scan of RG-LRU's golden file."""

import functools
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.diagonal_scan import FORMS, diagonal_scan, xla
from tests.pallas_kernels.compare import assert_close, compiled

GOLDEN = Path(__file__).parents[1] / "goldens" / "recurrentgemma_lru_a.npz"
C, B, D = 8, 3, 4
LENGTHS = (1, C - 1, C, C + 1, 3 * C + 7)
T = LENGTHS[-1]
FAST_FORMS = ("xla", "chunks")
EVERY_FORM = ("reference", *FAST_FORMS, None)
both = pytest.mark.parametrize("kind", ["real", "complex"])


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """The form that "xla" takes on accelerators, as an implementation of its own, in chunks of C tokens."""
    monkeypatch.setitem(FORMS, "chunks", functools.partial(xla.diagonal_scan, chunk_size=C))


class Case(NamedTuple):
    name: str
    t: int = T
    gates: str = "mixed"  # mild; strong: -20 throughout; mixed: 0, -20 and mild; zero
    start: str = "none"  # edges: of chunks; inside; dense: a third of all tokens
    valid: str = "all"  # left, middle, right: which tokens are not; random: half of them; none: no token is valid
    state: float = 1.0  # scale of the initial state


CASES = [
    *(Case(f"t{t}", t) for t in LENGTHS),
    *(Case(f"gates-{gates}", gates=gates) for gates in ("zero", "strong", "mild")),
    *(Case(f"start-{start}", start=start) for start in ("edges", "inside", "dense")),
    *(Case(f"valid-{valid}", valid=valid) for valid in ("left", "middle", "right", "random", "none")),
    Case("start-where-not-valid", start="dense", valid="random"),
    Case("large-state", gates="mild", state=1e4),
]


def arrays(case, kind, dtype=np.float64, rest=(D,)):
    """The arguments by name, masks None where the case has none, and cotangents of h and the final state."""
    draw = np.random.default_rng(zlib.crc32(case.name.encode()))
    shape = (B, case.t, *rest)

    def values(*shape):
        real, imag = draw.standard_normal((2, *shape))
        return (real, imag) if kind == "complex" else real

    mild = -0.1 * draw.standard_normal(shape) ** 2
    which = draw.integers(3, size=shape)
    mixed = np.where(which == 0, 0, np.where(which == 1, -20, mild))
    found = {
        "x": values(*shape),
        "log_decay": {"mild": mild, "zero": 0 * mild, "strong": 0 * mild - 20, "mixed": mixed}[case.gates],
        "phase": 3 * draw.standard_normal(shape) if kind == "complex" else None,
        "initial_state": jax.tree.map(lambda a: case.state * a, values(B, *rest)),
    }
    found, cotangents = jax.tree.map(lambda a: jnp.asarray(a, dtype), (found, (values(*shape), values(B, *rest))))
    return found, masks(case), cotangents


def masks(case):
    """Both or none, so that cases share their programs."""
    if case.start == "none" and case.valid == "all":
        return {"start": None, "valid": None}
    at, draw = np.arange(case.t), np.random.default_rng(5)
    start = {
        "none": [at < 0] * B,
        "edges": [at % C == 0, (at == C) | (at == 2 * C), at == 0],
        "inside": [at % 5 == 3, (at == 3) | (at == 2 * C + 1), at == case.t - 1],
        "dense": draw.random((B, case.t)) < 1 / 3,
    }
    valid = {
        "all": [at >= 0] * B,
        "left": [at >= 3, at >= C, at >= C + 1],
        "middle": [(at < 3) | (at > 6), (at < C) | (at >= 2 * C), at != C - 1],
        "right": [at < 3, at < 2 * C, at < case.t - 1],
        "random": draw.random((B, case.t)) < 1 / 2,
        "none": [at < 0] * B,
    }
    return {"start": jnp.asarray(np.stack(start[case.start])), "valid": jnp.asarray(np.stack(valid[case.valid]))}


@functools.cache
def program(implementation):
    """(arrays, masks, cotangents) -> every output and gradient by name, those of complex numbers by two names."""

    def loss(arrays, masks, cotangents):
        outputs = diagonal_scan(**arrays, **masks, implementation=implementation)
        products = jax.tree.map(lambda a, ct: (a.astype(ct.dtype) * ct).sum(), outputs, cotangents)
        return sum(jax.tree.leaves(products)), dict(zip(("h", "final_state"), outputs, strict=True))

    @compiled
    def run(arrays, masks, cotangents):
        gradients, outputs = jax.grad(loss, has_aux=True)(arrays, masks, cotangents)
        return outputs | {f"grad_{name}": a for name, a in gradients.items()}

    return lambda *args: flat(run(*args))


def flat(tree):
    return {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(tree)}


@both
@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case, implementation, kind):
    with jax.enable_x64(True):
        args = arrays(case, kind)
        assert_close(program(implementation)(*args), program("reference")(*args), {"": 1e-13})


@both
@pytest.mark.parametrize(
    "case", [Case("loop"), Case("loop-masks", start="dense", valid="random")], ids=lambda c: c.name
)
def test_reference_equals_a_loop(case, kind):
    number = (lambda a: a[0] + 1j * a[1]) if kind == "complex" else (lambda a: a)
    with jax.enable_x64(True):
        found, mask, _ = arrays(case, kind)
        h, final = diagonal_scan(**found, **mask, implementation="reference")
    found, h, final = jax.tree.map(np.asarray, (found, h, final))
    a = np.exp(found["log_decay"] + (1j * found["phase"] if kind == "complex" else 0))
    x, h, final, state = (number(v) for v in (found["x"], h, final, found["initial_state"]))
    for row in range(B):
        now = state[row]
        for i in range(case.t):
            if mask["start"] is not None and mask["start"][row, i]:
                now = 0 * now
            if valid := mask["valid"] is None or mask["valid"][row, i]:
                now = a[row, i] * now + x[row, i]
            np.testing.assert_allclose(h[row, i], now if valid else 0 * now, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(final[row], now, rtol=1e-12, atol=1e-13)


@both
@pytest.mark.parametrize("implementation", EVERY_FORM)
@pytest.mark.parametrize("valid", ["left", "middle", "right"])
def test_what_stands_at_invalid_tokens_reaches_nothing(valid, implementation, kind):
    found, mask, cotangents = arrays(Case("poison", start="inside", valid=valid), kind, np.float32)
    shown = mask["valid"][..., None]
    inputs = {name: a for name, a in found.items() if name != "initial_state"}
    poisoned = jax.tree.map(lambda a: jnp.where(shown, a, jnp.nan), inputs)
    run = program(implementation)
    clean, got = run(found, mask, cotangents), run(found | poisoned, mask, cotangents)
    for name in clean:
        assert np.isfinite(clean[name]).all()
        np.testing.assert_array_equal(got[name], clean[name], err_msg=name)
        if name.startswith(("['h']", "['grad_x']", "['grad_log_decay']", "['grad_phase']")):
            assert not np.where(shown, 0, got[name]).any(), name


DRAWN = Case("drawn", 2 * C + 3, start="dense", valid="random")  # for the shapes; every value is drawn


@both
@settings(max_examples=30)
@given(data=st.data())
def test_random_cases(kind, data):
    """Every form agrees with the derivatives of the reference, and these with finite differences."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    starts, valids = (data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), name) for name in ("starts", "valids"))
    gates = data.draw(st.sampled_from(["zero", "strong", "mixed", "mild"]), "gates")
    with jax.enable_x64(True):
        found, _, cotangents = arrays(DRAWN._replace(name=str(draw.integers(2**32)), gates=gates), kind)
        shape = (B, DRAWN.t)
        mask = {"start": jnp.asarray(draw.random(shape) < starts), "valid": jnp.asarray(draw.random(shape) < valids)}
        want = program("reference")(found, mask, cotangents)
        for implementation in FAST_FORMS:
            assert_close(program(implementation)(found, mask, cotangents), want, {"": 1e-13})
        for path, a in jax.tree_util.tree_leaves_with_path(found):
            direction = jnp.asarray(draw.standard_normal(a.shape))
            step = jax.tree_util.tree_map_with_path(lambda p, a: direction if p == path else jnp.zeros_like(a), found)  # noqa: B023
            name = jax.tree_util.keystr((jax.tree_util.DictKey(f"grad_{path[0].key}"), *path[1:]))
            slope = float(difference(found, step, mask, cotangents))
            assert slope == pytest.approx(float((want[name] * direction).sum()), rel=1e-7, abs=1e-7)


@compiled
def difference(arrays, step, masks, cotangents):
    """The slope of the sum of h dh + final_state dfinal_state along step, by central differences of fourth order."""

    def loss(size):
        moved = jax.tree.map(lambda a, s: a + size * s, arrays, step)
        outputs = diagonal_scan(**moved, **masks, implementation="reference")
        return sum(jax.tree.leaves(jax.tree.map(lambda a, ct: (a * ct).sum(), outputs, cotangents)))

    values = jax.lax.map(loss, jnp.asarray([-2e-3, -1e-3, 1e-3, 2e-3], jnp.float64))
    return (values * jnp.asarray([1, -8, 8, -1], jnp.float64)).sum() / 12e-3


@both
def test_none_is_one_of_the_forms(kind):
    """Beyond the short sequences that the recurrence runs, with its gradients, with masks and without."""
    with jax.enable_x64(True):
        for case in (Case("none"), Case("none-masks", start="inside", valid="middle")):
            args = arrays(case, kind)
            assert_close(program(None)(*args), program("reference")(*args), {"": 1e-13})


@pytest.mark.parametrize("implementation", FAST_FORMS)
@pytest.mark.parametrize("rest", [(), (2, 3)], ids=str)
def test_any_axes_after_the_time(rest, implementation):
    with jax.enable_x64(True):
        args = arrays(Case("axes", start="inside"), "complex", rest=rest)
        assert_close(program(implementation)(*args), program("reference")(*args), {"": 1e-13})


@both
@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_a_sequence_may_be_cut_anywhere(implementation, kind):
    found, _, _ = arrays(Case("cut"), kind, np.float32)
    run = compiled(functools.partial(diagonal_scan, implementation=implementation))
    state = found.pop("initial_state")
    h, final = run(**found, initial_state=state)
    for cut in (1, C, T - 3):
        first, middle = run(**jax.tree.map(lambda a: a[:, :cut], found), initial_state=state)  # noqa: B023
        second, end = run(**jax.tree.map(lambda a: a[:, cut:], found), initial_state=middle)  # noqa: B023
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), first, second)
        assert_close(flat((joined, end)), flat((h, final)), {"": 1e-6})


def test_no_initial_state_is_one_of_zeros():
    found, mask, _ = arrays(Case("empty", valid="left"), "complex", np.float32)
    zeros = jax.tree.map(jnp.zeros_like, found["initial_state"])
    got, want = (compiled(diagonal_scan)(**found | {"initial_state": state}, **mask) for state in (None, zeros))
    assert_close(flat(got), flat(want), {"": 0.0})


@both
@pytest.mark.parametrize("implementation", EVERY_FORM)
def test_bfloat16(implementation, kind):
    """In bfloat16, out bfloat16: h is rounded once, where it leaves; the state stays float32."""
    found, mask, cotangents = arrays(Case("bfloat16", gates="mild", start="inside"), kind, np.float32)
    narrow = found | {n: jax.tree.map(lambda a: a.astype(jnp.bfloat16), found[n]) for n in ("x", "log_decay", "phase")}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    got, want = (program(implementation)(a, mask, cotangents) for a in (narrow, wide))
    for name, a in got.items():
        assert a.dtype == (jnp.float32 if "state" in name else jnp.bfloat16), name
    assert_close(got, want, {"": 4e-3} | {name: 1e-6 for name in got if name.startswith("['final_state']")})


@both
@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_transformed(implementation, kind):
    """vmap, remat and a scan around it, and their gradients, against the plain call."""
    found, mask, _ = arrays(Case("transformed", 2 * C + 1, start="inside", valid="right"), kind, np.float32)
    op = functools.partial(diagonal_scan, implementation=implementation)

    def plain(found):
        return op(**found, **mask)

    def mapped(found):
        one = lambda found, mask: jax.tree.map(lambda a: a[0], op(**wrap(found), **wrap(mask)))  # noqa: E731
        wrap = functools.partial(jax.tree.map, lambda a: a[None])
        return jax.vmap(one)(found, mask)

    def scanned(found):
        rest = {n: a for n, a in found.items() if n != "initial_state"}
        segment = lambda now: jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], now)  # noqa: E731
        body = jax.checkpoint(lambda state, now: op(**now[0], **now[1], initial_state=state)[::-1])
        final, h = jax.lax.scan(body, found["initial_state"], segment((rest, mask)))
        return jax.tree.map(lambda a: jnp.moveaxis(a[:, :, 0], 0, 1), h), final

    def everything(f):
        outputs, pull = jax.vjp(f, found)
        return flat((outputs, pull(jax.tree.map(jnp.cos, outputs))))

    want = compiled(everything, static_argnums=0)(plain)
    for f in (mapped, scanned, jax.checkpoint(plain)):
        assert_close(compiled(everything, static_argnums=0)(f), want, {"": 1e-6})


@both
@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_a_mask_may_be_shared(implementation, kind):
    """vmap over the rows with one `start` for all of them."""
    found, _, _ = arrays(Case("shared", 2 * C + 1), kind, np.float32)
    start = jnp.arange(2 * C + 1)[None] % 5 == 3
    op = functools.partial(diagonal_scan, implementation=implementation)
    want = compiled(op)(**found, start=jnp.repeat(start, B, 0))
    rows = jax.tree.map(lambda a: a[:, None], found)
    got = compiled(jax.vmap(lambda found, start: op(**found, start=start), in_axes=(0, None)))(rows, start)
    assert_close(flat(jax.tree.map(lambda a: a[:, 0], got)), flat(want), {"": 1e-6})


@both
@pytest.mark.parametrize("implementation", EVERY_FORM)
def test_a_start_forgets_a_state_that_is_not_finite(implementation, kind):
    with jax.enable_x64(True):
        found, mask, cotangents = arrays(Case("overflow", start="dense", valid="random"), kind)
        mask["start"] = mask["start"].at[:, 0].set(True)
        states = (jax.tree.map(lambda a: jnp.full_like(a, v), found["initial_state"]) for v in (jnp.nan, 0))  # noqa: B023
        got, want = (program(implementation)(found | {"initial_state": s}, mask, cotangents) for s in states)
        assert all((np.asarray(a) == 0).all() for name, a in got.items() if "grad_initial_state" in name)
        assert_close(got, want, {"": 0.0})


@both
@pytest.mark.parametrize("implementation", EVERY_FORM)
def test_a_state_may_be_donated(implementation, kind):
    found, _, _ = arrays(Case("donated"), kind, np.float32)
    state = found.pop("initial_state")

    def op(state, found):
        return diagonal_scan(**found, initial_state=state, implementation=implementation)

    want = flat(compiled(op)(state, found))
    got = flat(compiled(op, donate_argnums=0)(state, found))
    assert all(a.is_deleted() for a in jax.tree.leaves(state))
    assert_close(got, want, {"": 0.0})


@both
def test_gradients_of_gradients(kind):
    with jax.enable_x64(True):
        found, mask, cotangents = arrays(Case("twice", gates="mild", start="inside", valid="right"), kind)
        directions = jax.tree.map(lambda a: jnp.cos(3 * a), found)

        def of(implementation):
            def products(a, b):
                return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), a, b)))

            def loss(found):
                outputs = diagonal_scan(**found, **mask, implementation=implementation)
                return products(jax.tree.map(jnp.sin, outputs), cotangents)

            return flat(compiled(jax.grad(lambda found: products(jax.grad(loss)(found), directions)))(found))

        want = of("reference")
        for implementation in (*FAST_FORMS, None):
            assert_close(of(implementation), want, {"": 1e-11})


@both
@pytest.mark.parametrize("implementation", EVERY_FORM)
def test_under_shard_map(implementation, kind):
    """Rows over 8 devices; a state that is the same on all of them gets its gradient summed over them."""
    found, _, _ = arrays(Case("sharded", 2 * C + 3, gates="mild"), kind, np.float32)
    shared = jax.tree.map(lambda a: a[:1], found.pop("initial_state"))
    found = jax.tree.map(lambda a: jnp.concatenate([a] * 3)[:8], found)
    start = jnp.zeros((8, 2 * C + 3), bool).at[3, C + 2].set(True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = jax.P("data"), jax.P()

    def loss(found, shared, start):
        total = 0.0
        for state in (None, jax.tree.map(lambda a: jnp.broadcast_to(a, (start.shape[0], D)), shared)):
            h, final = diagonal_scan(**found, initial_state=state, start=start, implementation=implementation)
            total += sum((a**2).sum() for a in jax.tree.leaves((h, final)))
            total += sum(a.sum() for a in jax.tree.leaves(final))
        return total

    gradients = jax.grad(loss, (0, 1))
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(rows, everywhere, rows), out_specs=(rows, everywhere), check_vma=True
    )
    want, got = (flat(compiled(f)(found, shared, start)) for f in (gradients, sharded))
    assert_close(got, want, {"": 1e-5})


@both
@pytest.mark.parametrize("implementation", FAST_FORMS)
def test_memory_is_that_of_the_inputs(implementation, kind):
    found, mask, cotangents = arrays(Case("memory", 8 * C, start="inside"), kind, np.float32)

    def loss(found):
        outputs = diagonal_scan(**found, **mask, implementation=implementation)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, ct: (a * ct).sum(), outputs, cotangents)))

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    assert max(sizes(jax.make_jaxpr(jax.grad(loss))(found).jaxpr)) == found["log_decay"].size


def test_on_accelerators_the_steps_grow_with_the_root_of_t():
    x = jax.ShapeDtypeStruct((1, 4096, 2), jnp.float32)
    traced = jax.jit(functools.partial(diagonal_scan, implementation="xla")).trace(x, x)
    for platform, steps in (("cpu", {4096}), ("tpu", {64}), ("cuda", {64})):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert {n for n in (64, 4096) if f"dense<{n}> : tensor<i32>" in text} == steps


def rg_lru(z, x, segment_pos, h0, implementation, prefix=""):
    """The gates of Griffin's recurrence around the op, as its paper has them; complex ones in two halves of x."""

    def gate(name):
        w, b = z[f"param_{prefix}{name}_w"], z[f"param_{prefix}{name}_b"]
        blocks = x.reshape(*x.shape[:2], w.shape[0], w.shape[1])
        return jax.nn.sigmoid(jnp.einsum("bthi,hij->bthj", blocks, w) + b[None, None]).reshape(*x.shape[:2], -1)

    r = gate("a_gate")
    log_decay = -8 * r * jax.nn.softplus(z[f"param_{prefix}a_param"])[None, None]
    start = segment_pos == 0
    multiplier = jnp.where(start[..., None], 1.0, jnp.sqrt(-jnp.expm1(2 * log_decay))) * gate("input_gate")
    if not prefix:
        return diagonal_scan(multiplier * x, log_decay, initial_state=h0, start=start, implementation=implementation)
    phase = r * z[f"param_{prefix}a_imag_param"][None, None]
    inputs = tuple(multiplier * half for half in jnp.split(x, 2, -1))
    outputs = diagonal_scan(inputs, log_decay, phase, start=start, implementation=implementation)
    return tuple(jnp.concatenate(pair, -1) for pair in outputs)


@pytest.mark.parametrize("implementation", EVERY_FORM)
def test_golden_rg_lru(implementation):
    with np.load(GOLDEN) as file:
        z = {name: jnp.asarray(a) for name, a in file.items() if name.startswith(("in_", "out_", "param_", "grad_"))}
    names = [n.removeprefix("grad_h0case_param_") for n in z if n.startswith("grad_h0case_param_")]

    @compiled
    def run(z):
        def loss(moved):
            y, h = rg_lru(z | moved, moved["in_x"], z["in_segment_pos_cont"], moved["in_h0"], implementation)
            return (y * z["in_cotangent"]).sum() + (h * z["in_cotangent_state"]).sum(), (y, h)

        moved = {n: z[n] for n in ("in_x", "in_h0", *(f"param_{n}" for n in names))}
        gradients, (y_h0, h_h0) = jax.grad(loss, has_aux=True)(moved)
        y, h = rg_lru(z, z["in_x"], z["in_segment_pos"], None, implementation)
        complex_y, complex_h = rg_lru(z, z["in_x"], z["in_segment_pos"], None, implementation, "complex_")
        got = {"y": y, "h": h, "y_h0": y_h0, "h_h0": h_h0, "complex_y": complex_y, "complex_h": complex_h}
        return {f"out_{n}": a for n, a in got.items()} | {
            f"grad_h0case_{n.removeprefix('in_')}": a for n, a in gradients.items()
        }

    assert len(names) == 5
    got = run(z)
    assert_close(got, {n: z[n] for n in got}, {"": 1e-5, **{n: 1e-6 for n in got if n.startswith("out_")}})


@pytest.mark.usefixtures("as_user")
def test_errors_name_the_argument():
    x, mask = jnp.zeros((2, 5, 3)), jnp.zeros((2, 5), bool)
    real, pair = {"x": x, "log_decay": x}, {"x": (x, x), "log_decay": x, "phase": x}
    for arguments, message in [
        (real | {"x": x[0, 0]}, r"x has shape \[3\], needs \[b t \.\.\.\], each at least 1"),
        (real | {"x": x[:, :0]}, r"x has shape \[2, 0, 3\], needs"),
        (real | {"log_decay": x[:, 1:]}, r"log_decay has shape \[2, 4, 3\], needs \[2, 5, 3\]"),
        (pair | {"phase": x[..., 0]}, r"phase has shape \[2, 5\], needs \[2, 5, 3\]"),
        (pair | {"x": (x, x[:1])}, r"x has shape \[1, 5, 3\], needs \[2, 5, 3\]"),
        (pair | {"x": x}, r"x is an array \[2, 5, 3\], needs a pair \(real, imag\) beside phase"),
        (pair | {"x": (x,)}, r"x is a tuple of 1, needs a pair"),
        (real | {"x": (x, x)}, r"x is a tuple of 2, needs one array where no phase is given"),
        (pair | {"initial_state": x[:, 0]}, r"initial_state is an array \[2, 3\], needs a pair"),
        (real | {"initial_state": x}, r"initial_state has shape \[2, 5, 3\], needs \[2, 3\]"),
        (real | {"start": mask[:, 1:]}, r"start has shape \[2, 4\], needs \[2, 5\]"),
        (real | {"valid": mask[:1]}, r"valid has shape \[1, 5\], needs \[2, 5\]"),
        (real | {"valid": mask.astype(jnp.int32)}, "valid has dtype int32, needs bool"),
        *(
            (real | {name: real[name].astype(dtype)}, f"{name} has dtype {dtype}, needs a real floating dtype")
            for name in real
            for dtype in ("int32", "complex64")
        ),
        (pair | {"x": (x.astype(jnp.int32), x)}, "x has dtype int32, needs a real floating dtype"),
        (pair | {"x": (x, x.astype(jnp.int32))}, "x has dtype int32, needs a real floating dtype"),
        (real | {"implementation": "fast"}, "implementation is 'fast', needs None or one of reference, xla"),
    ]:
        with pytest.raises(ValueError, match=f"diagonal_scan: {message}"):
            diagonal_scan(**arguments)
