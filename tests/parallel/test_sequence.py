"""Sequence parallelism on 8 CPU devices: outputs, states and gradients are those of one device, in float64 to 1e-12."""

import json
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.extend.core import jaxprs_in_params

from memjax.combinators import Repeat
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_state.gla import GatedLinearAttention
from memjax.layers import Ring, heads, linear, merge, positions, ring_append, scan_tokens
from memjax.lm.model import LanguageModel, block
from memjax.memory import How, Memory, Param, Slot, config_hash, constant, dense, from_config, to_config
from memjax.parallel import SequenceParallel, make_mesh, sequence_parallel
from pallas_kernels.compat import QUICK_COMPILE

T = 16  # four tokens a rank


class AverageState(NamedTuple):
    mean: Array
    count: Array


@dataclass(frozen=True)
class Average(Memory):
    """A fading mean that begins at a learned vector, and tells positions."""

    dim: int = 6

    def param_specs(self):
        vector = Param((self.dim,), ("model",), constant(0.3), "vector")
        return {"begin": vector, "decay": vector}

    def state_specs(self, batch):
        return AverageState(Slot((batch, self.dim), ("batch", "model")), Slot((batch,), ("batch",), jnp.int32))

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        begin, a = params["begin"][None], jax.nn.sigmoid(params["decay"])[None]
        position, count = positions(state.count, x.shape[1], valid, start)
        mean = jnp.where(state.count[:, None] == 0, begin, state.mean)

        def step(m, x):
            m = a * m + (1 - a) * x
            return m, m

        y, mean = scan_tokens(step, mean, x, valid=valid, start=start, empty=begin)
        mean = jnp.where(count[:, None] == 0, jnp.zeros_like(mean), mean)
        return y + jnp.sin(position.astype(x.dtype))[..., None], AverageState(mean, count)


@dataclass(frozen=True)
class Window(Memory):
    """Attention over a ring that is longer than the slice of a rank, so that keys travel over more than one border."""

    dim: int = 8
    window: int = 6

    def param_specs(self):
        return {name: dense(self.dim, self.dim) for name in ("w_q", "w_k", "w_v")}

    def state_specs(self, batch):
        return Ring.specs(batch, self.window, 2, self.dim // 2)

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        q, k, v = (heads(linear(x, params[w]), 2) for w in ("w_q", "w_k", "w_v"))
        k, v, visible, state = ring_append(state, k, v, valid, start)
        scores = jnp.where(visible[:, None], jnp.einsum("bthd,buhd->bhtu", q, k), -1e9)
        return merge(jnp.einsum("bhtu,buhd->bthd", jax.nn.softmax(scores), v)), state


class Shelf(NamedTuple):
    table: Array
    count: Array


@dataclass(frozen=True)
class Shelved(Memory):
    """A store that every row reads, a count, and auxiliary values of each kind."""

    dim: int = 4

    def state_specs(self, batch):
        return Shelf(Slot((3, self.dim), ("documents", "model")), Slot((batch,), ("batch",), jnp.int32))

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        y = jax.nn.softmax(x @ state.table.T) @ state.table
        aux = {"loss": jnp.mean(y * y), "tokens": jnp.asarray(x[..., 0].size, jnp.int32), "large": jnp.any(x > 9)}
        return y, Shelf(state.table, state.count + x.shape[1]), aux

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return x, Shelf(x[0, :3], state.count)


@pytest.fixture(scope="module")
def line():
    return make_mesh({"sequence": 4})


@pytest.fixture(scope="module")
def grid():
    return make_mesh({"data": 2, "sequence": 4})


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def jit(f):
    return jax.jit(f, compiler_options=QUICK_COMPILE)


def cast(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def tokens_for(b, masked):
    """No masks; or holes, documents that begin anywhere, one rank without a valid token, and one row without any."""
    if not masked:
        return {}
    rng = np.random.default_rng(1)
    valid, start = rng.random((b, T)) > 0.3, rng.random((b, T)) < 0.15
    valid[:, T // 4 : T // 2] = valid[1] = False
    return {"valid": jnp.asarray(valid), "start": jnp.asarray(start)}


def case(memory, b, warm=False, dtype=jnp.float64):
    """Parameters, a state (empty, or in mid-stream), x."""
    rng = np.random.default_rng(0)
    params, state = cast((memory.init(jax.random.key(0)), memory.init_state(b)), dtype)
    if memory.takes_ids:
        before, x = (jnp.asarray(rng.integers(0, memory.reads_ids, (b, t)), jnp.int32) for t in (5, T))
    else:
        before, x = (jnp.asarray(rng.normal(size=(b, t, memory.dim)), dtype) for t in (5, T))
    return params, jit(memory.apply)(params, state, before)[1] if warm else state, x


def outputs_and_gradients(memory, params, state, x, tokens, how=How()):  # noqa: B008
    """y where it is valid, the new state, and gradients of a loss over both."""
    floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731

    def loss(inputs):
        y, new = memory.apply(*inputs, **tokens, how=how)
        if tokens:
            y = jnp.where(tokens["valid"][..., None], y, jnp.zeros_like(y))
        total = jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
        states = [a.astype(y.dtype) for a in jax.tree.leaves(new) if floating(a)]
        return total + sum(jnp.sum(jnp.sin(a + 1.3)) for a in states), (y, new)

    (_, out), grads = jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))((params, state, x))
    return out, jax.tree.map(lambda g: g if floating(g) else None, grads)


def assert_same(got, want, tolerance=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=str(path))


def assert_equal_to_one_device(memory, parallels, b, masked, how=How(), dtype=jnp.float64):  # noqa: B008
    args, tokens = case(memory, b, masked, dtype), tokens_for(b, masked)
    want = outputs_and_gradients(memory, *args, tokens)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(want[1][0])), "a parameter that is not used"
    for parallel in parallels:
        got = outputs_and_gradients(parallel, *args, tokens, how)
        assert_same(got, want, 1e-12 if dtype == jnp.float64 else 2e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("toy", [Average(), Window()], ids=lambda m: type(m).__name__)
def test_time_over_a_mesh(toy, masked, line):
    assert_equal_to_one_device(toy, [sequence_parallel(toy, line)], 3, masked)


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (GatedDeltaNet(8, heads=2, head_dim=4, conv_size=4), jnp.float64),
        (GatedLinearAttention(8, heads=2, use_short_conv=True), jnp.float64),
        (SlidingWindowAttention(8, heads=2, window=6), jnp.float32),
    ],
    ids=["GatedDeltaNet", "GatedLinearAttention", "SlidingWindowAttention"],
)
def test_time_and_rows_over_a_mesh(leaf, dtype, grid):
    assert_equal_to_one_device(leaf, [sequence_parallel(leaf, grid, batch_axis="data")], 4, True, dtype=dtype)


def test_narrow_states_over_one_axis_of_two(grid):
    """A bfloat16 cache is handed over to the bit, and its gradient is summed over ranks without aborting."""
    memory = SlidingWindowAttention(8, heads=2, window=6, cache_dtype="bfloat16")
    params, state, x = memory.init(jax.random.key(0)), memory.init_state(2), case(memory, 2)[2].astype(jnp.float32)
    state = jit(memory.apply)(params, state, x[:, :5])[1]
    want = outputs_and_gradients(memory, params, state, x, {})
    got = outputs_and_gradients(sequence_parallel(memory, grid), params, state, x, {})
    assert_same(got[0][1], want[0][1], 0)
    assert_same(got, want, 1e-2)


def test_a_language_model(grid):
    model = LanguageModel(Repeat(block(Window(), 8), 2), vocab=11, dtype="float64")
    assert_equal_to_one_device(model, [sequence_parallel(model, grid, batch_axis="data")], 4, True)


def test_micro_batches_and_remat(line):
    parallels = [sequence_parallel(Average(), line, micro_batches=n) for n in (1, 2, 6)]
    assert_equal_to_one_device(Average(), parallels, 6, True, How(remat=True))


def test_rows_alone_over_a_mesh():
    mesh = make_mesh({"data": 4, "sequence": 1})
    assert_equal_to_one_device(Average(), [sequence_parallel(Average(), mesh, batch_axis="data")], 4, True)


def test_the_state_goes_on(line):
    """Two parallel calls, then single tokens, equal one call; the state is whole on every device."""
    memory, parallel = Average(), sequence_parallel(Average(), line)
    params, state, x = case(memory, 2)
    want = jit(memory.apply)(params, state, x)
    y1, s = jit(parallel.apply)(params, state, x[:, :8])
    y2, s = jit(parallel.apply)(params, s, x[:, 8:12])
    assert s.mean.sharding.is_fully_replicated
    assert y2.sharding.spec[1] == "sequence"
    step, ys = jit(parallel.step), []
    for t in range(12, T):
        y, s = step(params, s, x[:, t])
        ys.append(y)
    assert_same((jnp.concatenate([y1, y2, jnp.stack(ys, 1)], 1), s), want)


def test_stores_and_auxiliary_values(grid):
    memory, parallel = Shelved(), sequence_parallel(Shelved(), grid, batch_axis="data")
    params, state, x = case(memory, 4)
    y, state = jit(parallel.write)(params, state, x)
    assert_same((y, state), jit(memory.write)(params, state, x))
    apply, one = jit(parallel.apply_with_aux), jit(memory.apply_with_aux)
    got = apply(params, state, x)
    assert_same(got, one(params, state, x))
    assert got[2]["tokens"] == 4 * T
    assert not got[2]["large"]
    assert apply(params, state, x.at[3, -1, 0].set(10.0))[2]["large"]
    assert_same(
        outputs_and_gradients(parallel, params, state, x, {}), outputs_and_gradients(memory, params, state, x, {})
    )


def test_one_program(line):
    """Other values don't trace again, and the loop over ticks exchanges nothing but states, gradients included."""
    parallel = sequence_parallel(Average(), line)
    params, state, x = case(parallel.memory, 3)
    traces = []

    def gradient(params, state, x):
        traces.append(x)
        return jax.grad(lambda p: jnp.sum(parallel.apply(p, state, x)[0]))(params)

    compiled = jit(gradient)
    compiled(params, state, x)
    compiled(params, jax.tree.map(jnp.ones_like, state), x + 1)
    assert len(traces) == 1

    collectives = {"inside": set(), "outside": set()}

    def visit(jaxpr, where):
        for eqn in jaxpr.eqns:
            if "axes" in eqn.params and "psum" in eqn.primitive.name or eqn.primitive.name == "ppermute":
                collectives[where].add(eqn.primitive.name)
            for sub in jaxprs_in_params(eqn.params):
                visit(sub, "inside" if eqn.primitive.name == "scan" else where)

    visit(jax.make_jaxpr(gradient)(params, state, x).jaxpr, "outside")
    assert collectives["inside"] == {"ppermute"}
    assert len(collectives["outside"]) == 1


def test_configuration(line):
    """A checkpoint written on a mesh is one of the memory, and loads anywhere."""
    parallel = sequence_parallel(Average(), line)
    assert isinstance(parallel, SequenceParallel)
    assert json.loads(json.dumps(to_config(parallel))) == to_config(Average())
    assert from_config(to_config(parallel)) == Average()
    assert config_hash(parallel) == config_hash(Average())
    assert hash(parallel) == hash(sequence_parallel(Average(), line))
    assert parallel.state_bytes(3) == Average().state_bytes(3)
    assert to_config(Repeat(parallel, 2)) == to_config(Repeat(Average(), 2))


def test_nothing_to_split():
    one = make_mesh({"sequence": 1, "model": 2})
    memory = Average()
    assert sequence_parallel(memory, one) is memory


def test_refusals(line, grid):
    explicit = jax.make_mesh((4,), ("sequence",), (jax.sharding.AxisType.Explicit,))
    for message, args in (
        ("axis is 'time', the mesh has", (line, "time")),
        ("batch_axis is 'rows', the mesh has", (line, "sequence", "rows")),
        ("is Explicit, needs Auto", (explicit,)),
        ("both 'sequence'", (line, "sequence", "sequence")),
        ("micro_batches is 0", (line, "sequence", None, 0)),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_parallel(Average(), *args)

    def apply(parallel, b, t):
        state = parallel.init_state(b)
        return parallel.apply(parallel.init(jax.random.key(0)), state, jnp.ones((b, t, parallel.dim), jnp.float32))

    with pytest.raises(ValueError, match="t = 10 tokens, needs a multiple of the 4 ranks .* valid=False"):
        apply(sequence_parallel(Average(), line), 2, 10)
    with pytest.raises(ValueError, match="b = 3 rows, needs a multiple of the 2 devices"):
        apply(sequence_parallel(Average(), grid, batch_axis="data"), 3, T)
    with pytest.raises(ValueError, match="3 rows on a device, needs a multiple of micro_batches = 2"):
        apply(sequence_parallel(Average(), line, micro_batches=2), 3, T)
    with pytest.raises(ValueError, match="x is float32"):
        parallel = sequence_parallel(Average(), line)
        parallel.apply(parallel.init(jax.random.key(0)), parallel.init_state(2), jnp.ones((2, T, 5), jnp.float32))
