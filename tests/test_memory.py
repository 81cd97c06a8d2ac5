"""What the base class derives from declarations, what it checks at trace time, and configurations as JSON."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.catalog import CATALOG
from memjax.combinators import Gate, Repeat, Residual, Stack, pattern
from memjax.errors import ConfigError
from memjax.layers import beside, linear
from memjax.lm.model import LanguageModel, block
from memjax.memory import (
    How,
    Memory,
    NoState,
    Param,
    Slot,
    config_hash,
    constant,
    dense,
    from_config,
    normal,
    to_config,
)


class SumState(NamedTuple):
    S: jax.Array
    seen: jax.Array
    store: jax.Array


@dataclass(frozen=True)
class Sum(Memory):
    """y is the sum of x W so far. `store` [3] is shared by all rows; `bug` breaks the contract."""

    dim: int = 4
    bias: bool = False
    bug: str = ""

    def param_specs(self):
        bias = {"a_bias": Param((self.dim,), (None,), normal(1.0), "vector")} if self.bias else {}
        return bias | {"w": dense(self.dim, self.dim), "w_again": dataclasses.replace(dense(4, 4), draws_like="w")}

    def state_specs(self, batch):
        return SumState(
            Slot((batch, self.dim), ("batch", "model")),
            Slot((batch,), ("batch",), jnp.int32, 7),
            Slot((3,), (None,), jnp.bool_, True),
        )

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        now = linear(x, params["w"])
        sums = state.S[:, None] + jnp.cumsum(now if valid is None else jnp.where(beside(valid, now), now, 0.0), 1)
        S = sums[:, -1].astype(jnp.bfloat16 if self.bug == "state" else state.S.dtype)
        return sums.astype(jnp.bfloat16 if self.bug == "y" else x.dtype), state._replace(S=S)


@dataclass(frozen=True)
class Lookup(Memory):
    """A row of a table for each token."""

    dim: int = 4

    reads_ids = 5

    def param_specs(self):
        return {"table": Param((5, self.dim), ("vocab", "model"), normal(1.0), "embedding")}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return x + params["table"][ids].astype(x.dtype), state


PARAMS, STATE, X = Sum().init(jax.random.key(0)), Sum().init_state(2), np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": X[..., :3]}, r"Sum.apply: x is float32\[2, 3, 3\], needs floating\[b, t, 4\]"),
        ({"x": X[0]}, r"Sum.apply: x is float32\[3, 4\]"),
        ({"x": X.astype(int)}, r"Sum.apply: x is int32\[2, 3, 4\], needs floating"),
        ({"x": X[:, :0]}, "at least one row and one token"),
        ({"x": X[:0]}, "at least one row and one token"),
        ({"valid": X[:, :, 0]}, r"valid is float32\[2, 3\], needs bool\[2, 3\]"),
        ({"start": np.ones((2, 4), bool)}, r"start is bool\[2, 4\], needs bool\[2, 3\]"),
        ({"ids": X[:, :, 0]}, r"ids is float32\[2, 3\], needs integer\[2, 3\]"),
        ({"state": Sum().init_state(3)}, r"state.S is float32\[3, 4\], needs float32\[2, 4\]"),
        ({"state": STATE._replace(seen=np.ones(2, np.float32))}, r"state.seen is float32\[2\], needs int32\[2\]"),
        ({"state": NoState()}, "state has no state.S; it belongs to another configuration"),
        ({"params": {"w": PARAMS["w"]}}, r"params has no params\['w_again'\]; it belongs to another configuration"),
        ({"params": PARAMS | {"u": X}}, r"params\['u'\] is not declared; it belongs to another configuration"),
        ({"params": PARAMS | {"w": X[0]}}, r"params\['w'\] is float32\[3, 4\], needs float32\[4, 4\]"),
    ],
)
def test_misuse_names_the_argument(change, message):
    arguments = {"params": PARAMS, "state": STATE, "x": X} | change
    with pytest.raises(ValueError, match=message):
        Sum().apply(**arguments)


def test_inherited_verbs_check_too():
    with pytest.raises(ValueError, match=r"Sum.step: x is float32\[2, 3, 4\], needs floating\[b, 4\]"):
        Sum().step(PARAMS, STATE, X)
    with pytest.raises(ValueError, match=r"Sum.step: valid is bool\[2, 3\], needs bool\[2\]"):
        Sum().step(PARAMS, STATE, X[:, 0], valid=X[..., 0] > 0)
    with pytest.raises(ValueError, match="Sum.write: state has no state.S"):
        Sum().write(PARAMS, NoState(), X)


def test_ids_are_asked_for():
    params = Lookup().init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"Lookup.apply: this memory is indexed by tokens, pass ids \[2, 3\]"):
        Lookup().apply(params, NoState(), X)
    with pytest.raises(ValueError, match=r"Residual.step: this memory is indexed by tokens, pass ids \[2\]"):
        memory = Residual(Lookup())
        memory.step(memory.init(jax.random.key(0)), memory.init_state(2), X[:, 0])


@pytest.mark.parametrize(
    "bug, message",
    [("y", r"x is float32\[2, 3, 4\], y is bfloat16"), ("state", "the state changed from .*float32.* to .*bfloat16")],
)
def test_a_memory_that_breaks_the_contract_is_told(bug, message):
    with pytest.raises(TypeError, match=message):
        Sum(bug=bug).apply(PARAMS, STATE, X)


def test_a_memory_needs_a_verb():
    with pytest.raises(TypeError, match="Empty must define apply or apply_with_aux"):
        type("Empty", (Memory,), {})


def test_what_stands_at_an_invalid_token_does_not_travel():
    valid = np.array([[True, False, True]] * 2)
    x = np.where(valid[..., None], X, np.nan)
    y, state = Sum().apply(PARAMS, STATE, x, valid=valid)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(state.S, 2 * X[:, 0] @ PARAMS["w"], rtol=1e-6)
    params = Lookup().init(jax.random.key(0))
    y, _ = Lookup().apply(params, NoState(), x, ids=np.array([[0, -9999, 1]] * 2), valid=valid)
    np.testing.assert_allclose(y[:, 1], np.broadcast_to(params["table"][0], (2, 4)))


def test_numpy_arrays_of_the_hosts_width_are_taken():
    y, _ = Sum().apply(PARAMS, STATE, X.astype(np.float64))
    assert y.dtype == jnp.float32
    y, _ = Lookup().apply(Lookup().init(jax.random.key(0)), NoState(), X, ids=np.zeros((2, 3), np.int64))
    assert y.shape == X.shape


def test_init_draws_by_path():
    more, other = Sum(bias=True).init(jax.random.key(0)), Sum().init(jax.random.key(1))
    np.testing.assert_array_equal(more["w"], PARAMS["w"])  # "a_bias" comes first and changes nothing
    np.testing.assert_array_equal(PARAMS["w"], PARAMS["w_again"])
    assert np.abs(more["w"] - other["w"]).max() > 0.1
    stack = Stack((Sum(), Sum())).init(jax.random.key(0))
    assert np.abs(stack["0"]["w"] - stack["1"]["w"]).max() > 0.1
    repeat = Repeat(Sum(), 2).init(jax.random.key(0))
    np.testing.assert_array_equal(repeat["w"], repeat["w_again"])
    assert np.abs(repeat["w"][0] - repeat["w"][1]).max() > 0.1


def test_declarations_are_derived_from():
    memory = Sum()
    assert STATE.S.shape == (2, 4) and STATE.seen.tolist() == [7, 7] and STATE.store.all()
    assert memory.param_axes() == {"w": ("model", "heads"), "w_again": ("model", "heads")}
    assert memory.state_axes() == SumState(("batch", "model"), ("batch",), (None,))
    assert memory.param_bytes() == sum(a.nbytes for a in jax.tree.leaves(PARAMS))
    assert memory.state_bytes(2) == sum(a.nbytes for a in jax.tree.leaves(STATE))
    assert memory.has_store and not Residual(Lookup()).has_store
    assert constant(3)(jax.random.key(0), (2,)).tolist() == [3, 3]


def test_restart_keeps_the_store():
    used = SumState(STATE.S + 1, STATE.seen + 1, ~STATE.store)
    fresh = Sum().restart(used, 3)
    assert fresh.S.shape == (3, 4) and not fresh.S.any() and fresh.seen.tolist() == [7, 7, 7]
    assert fresh.store is used.store


def test_write_without_a_store_reads_from_empty_and_forgets():
    warm = STATE._replace(S=STATE.S + 5)
    y, state = Sum().write(PARAMS, warm, X)
    np.testing.assert_array_equal(y, Sum().apply(PARAMS, STATE, X)[0])
    assert state.S is warm.S


def test_summary_is_a_table():
    lines = Sum().summary().splitlines()
    assert lines[0] == "Sum(dim=4, bias=False, bug='')"
    assert lines[1].split() == ["params['w']", "float32", "64", "B", "[4,", "4]"]
    assert lines[4].split() == ["state.seen", "int32", "4", "B", "[1]"]
    assert lines[-1] == "params 128 B, state 23 B a row"
    assert "params 0 B" in type("Nothing", (Memory,), {"apply": lambda *a, **k: None})().summary()


def test_how_is_static():
    traces = []

    @jax.jit
    def run(how, x):
        traces.append(how)
        return x

    for how in (How(), How(), How(remat=True), How(implementation="xla")):
        run(how, 1.0)
    assert traces == [How(), How(remat=True), How(implementation="xla")]
    assert jax.tree.leaves(How()) == []


# ---------------------------------------------------------------------------------------------- configurations

SMALL = {name: CATALOG[name].build_small() for name in ("gla", "sliding_window_attention", "msa", "stem", "canon")}
NESTED = LanguageModel(
    Stack(
        (pattern(block(SMALL["gla"], 24), Residual(SMALL["canon"]), n=2), Residual(Gate(SMALL["msa"], SMALL["stem"])))
    ),
    50,
    dtype="bfloat16",
    embed_std=None,
)


def test_configurations_travel_as_json():
    again = from_config(json.loads(json.dumps(to_config(NESTED))))
    assert again == NESTED and hash(again) == hash(NESTED)
    assert to_config(NESTED)["class"] == "memjax.lm.model.LanguageModel"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"class": "subprocess.Popen", "args": ["true"]}, "'subprocess.Popen' is not a Memory"),
        ({"class": "this.Evil"}, "is not memjax's; import its module first"),
        ({"class": "memjax.nowhere.GLA"}, "cannot be imported"),
        ({"class": "memjax.memory.How"}, "is not a Memory"),
        ({"class": "memjax.memory.Missing"}, "is not a Memory"),
        ({"class": "GLA"}, "'class' is 'GLA', needs 'module.Class'"),
        ({"dim": 4}, "'class' is None"),
        (
            {"class": "memjax.lm.model.FeedForward", "dim": 4, "width": 8},
            "has no field 'width'; it has .'dim', 'hidden'.",
        ),
        ({"class": "memjax.lm.model.FeedForward", "dim": 4}, "FeedForward cannot be built"),
        ({"class": "memjax.in_context.canon.Canon", "dim": 4, "width": 1}, "width is 1, needs at least 2"),
    ],
)
def test_foreign_configurations_are_refused(config, message):
    with pytest.raises(ConfigError, match=message) as alone:
        from_config(config)
    outer = {"class": "memjax.combinators.Residual", "memory": config}
    with pytest.raises(ConfigError) as nested:
        from_config(outer)
    assert str(nested.value) == str(alone.value)


def test_the_hash_is_of_canonical_json():
    canon = dataclasses.replace(SMALL["canon"], dim=4)
    text = '{"class": "memjax.in_context.canon.Canon", "dim": 4, "init_std": 0.3, "width": 4}'
    assert config_hash(canon) == hashlib.sha256(text.encode()).hexdigest()
    assert config_hash(canon) != config_hash(SMALL["canon"])
