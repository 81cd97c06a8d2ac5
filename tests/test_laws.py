"""The laws over the catalog, over compositions, and over a user's own memory, sound and broken.

One bench an entry: what is compiled for one law serves the others and every example that hypothesis draws.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memjax import laws
from memjax.catalog import CATALOG
from memjax.combinators import Gate, Repeat, Residual, Stack, pattern
from memjax.in_state.rwkv7 import RWKV7ChannelMixing
from memjax.laws.bench import B, T
from memjax.layers import linear, positions, scan_tokens
from memjax.lm.model import LanguageModel, block
from memjax.memory import How, Memory, NoState, Slot, dense
from tests import golden, laws_table
from tests.exceptions import EXCEPTIONS

GOLDENS = Path(__file__).parent / "goldens"
BY_CONTENTS = ("split", "step", "causal", "batch", "padding", "packing")


def small(name: str) -> Memory:
    return CATALOG[name].build_small()


def residual(name: str) -> Memory:
    return Residual(small(name))


COMPOSITIONS: dict[str, Callable[[], Memory]] = {
    "gate": lambda: Residual(Gate(small("gla"), small("sliding_window_attention"))),
    "pattern": lambda: pattern(residual("canon"), residual("sliding_window_attention"), n=2),
    "hgrn2_stack": lambda: Stack(
        tuple(Residual(CATALOG["hgrn2"].build_small(layer=i, layers=2, use_short_conv=False)) for i in range(2))
    ),
    "rwkv7_stack": lambda: Stack(
        tuple(
            Residual(mixing)
            for layer in range(2)
            for mixing in (
                CATALOG["rwkv7"].build_small(layer=layer, layers=2),
                RWKV7ChannelMixing(dim=16, hidden=24, layer=layer, layers=2),
            )
        )
    ),
    "language_model": lambda: LanguageModel(Stack((residual("stem"), Repeat(residual("gla"), 2))), 50),
    "language_model_with_store": lambda: LanguageModel(Stack((residual("canon"), Repeat(residual("msa"), 2))), 50),
    "language_model_of_all": lambda: LanguageModel(
        Stack(
            (
                block(small("canon"), 24),
                pattern(*map(residual, ("gated_delta_net", "stem", "sliding_window_attention")), n=2),
                Repeat(residual("gla"), 2),
            )
        ),
        50,
        tied=False,
    ),
}
SLOW = ("language_model_of_all",)


class Subject(NamedTuple):
    """What is under the laws."""

    name: str
    bench: laws.Bench
    exceptions: dict[str, str]
    recorded: Callable | None


def recorded(stems: tuple[str, ...]) -> Callable | None:
    """The verdicts of the golden files, for law 14."""
    if not stems:
        return None
    return lambda: [(f"{r.system} {r.array}", r.error, r.ok) for s in stems for r in golden.judge(GOLDENS / f"{s}.npz")]


@pytest.fixture(
    scope="module",
    # one worker for all of a subject: what is compiled for one law serves the others
    params=[
        pytest.param(n, marks=[pytest.mark.xdist_group(n), *([pytest.mark.slow] if n in SLOW else [])])
        for n in (*CATALOG, *COMPOSITIONS)
    ],
)
def subject(request):
    name = request.param
    build = CATALOG[name].build_small if name in CATALOG else COMPOSITIONS[name]
    stems = CATALOG[name].goldens if name in CATALOG else ()
    return Subject(name, laws.Bench(build()), EXCEPTIONS.get(name, {}), recorded(stems))


@pytest.mark.parametrize("law", laws.NAMES)
def test_law(subject, law, record_property):
    result = laws.judge(subject.bench, law, subject.exceptions.get(law), subject.recorded)
    if subject.name in CATALOG:
        record_property("law", [subject.name, law, laws_table.verdict(result, law in subject.exceptions)])
    assert result.ok is not False, str(result)
    may_not_apply = {"golden": subject.recorded is None, "kernels": not subject.bench.memory.implementations}
    assert result.ok is True or may_not_apply.get(law), str(result)


@pytest.mark.parametrize("law", BY_CONTENTS)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_law_on_any_contents(subject, law, data):
    masks = arrays(bool, (B, T))
    seed, valid, start, fresh = data.draw(st.tuples(st.integers(0, 2**32 - 1), masks, masks, st.booleans()))
    if law in subject.exceptions:
        start, fresh = np.zeros_like(start), False
    case = subject.bench.contents(valid, start, fresh, np.random.default_rng(seed))
    laws.CONTENTS[law](subject.bench, case)  # raises Broken


def test_exceptions_are_of_entries_and_laws():
    assert set(EXCEPTIONS) <= {*CATALOG, *COMPOSITIONS}
    assert {law for table in EXCEPTIONS.values() for law in table} <= set(laws.CONTENTS)


# ---------------------------------------------------------------------------------------------- a user's own memory


class FadingState(NamedTuple):
    S: jax.Array  # [b d] float32
    count: jax.Array  # [b] int32


@dataclass(frozen=True)
class Fading(Memory):
    """S_t = e^-g S_{t-1} + x_t W, y_t = S_t / (1 + position / 8). `bug` names what is wrong with it."""

    dim: int
    bug: str = ""

    def param_specs(self):
        return {"w": dense(self.dim, self.dim)}

    def state_specs(self, batch):
        return FadingState(Slot((batch, self.dim), ("batch", "model")), Slot((batch,), ("batch",), jnp.int32))

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        decay = jnp.exp(jnp.asarray(0.2 if self.bug == "decay sign" else -0.2, state.S.dtype))
        begun = jnp.zeros_like(state.count) if self.bug == "position" else state.count
        position, count = positions(begun, x.shape[1], valid, start)

        def token(S, x):
            S = decay * S + x.astype(S.dtype)
            return S, S

        reads = linear(x, params["w"])
        if self.bug == "batch":
            reads = reads + x.mean(0, keepdims=True)
        seen, begins = (None if self.bug == name else a for name, a in (("padding", valid), ("start", start)))
        y, S = scan_tokens(token, state.S, reads, valid=seen, start=begins)
        if self.bug == "causal":
            y = y + S[:, None]
        if self.bug == "gradient":
            y = jax.lax.stop_gradient(y)
        scale = 1 / (1 + position.astype(y.dtype) / 8)
        return (y * scale[..., None]).astype(x.dtype), FadingState(S, count)


@dataclass(frozen=True)
class Keyed(Memory):
    """A memory whose configuration is no JSON, and which raises where it is asked for bfloat16."""

    dim: int
    table: frozenset[int] = frozenset({1})

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        if x.dtype == jnp.bfloat16:
            raise RuntimeError("no bfloat16\nsecond line")
        return 2 * x, NoState()


def checked(memory: Memory, **arguments):
    out = io.StringIO()
    results = laws.check(memory, out=out, **arguments)
    return results, out.getvalue().splitlines()


def test_a_users_memory_passes():
    results, lines = checked(Fading(dim=16), raise_on_failure=True)
    assert {r.law for r in results.values() if r.ok is None} == {"kernels", "golden"}
    assert lines[0] == "Fading(dim=16, bug='')"
    assert lines[1].startswith("  ✓ split")
    assert "– golden       n/a: no recorded numbers given" in lines[14]
    assert lines[15].startswith("  12 hold, 0 broken, 2 not applicable (")


@pytest.mark.parametrize(
    "bug, law, case",
    [
        ("decay sign", "bounded", "no padding, no start, fresh rows, read twice)"),
        ("padding", "padding", "state.S off by 1.4e+00, nothing valid (1 row of 1 token, no padding, no start)"),
        ("start", "packing", "(1 row of "),
        ("position", "split", "off by"),
        ("batch", "batch", "beside copies of itself (1 row of 1 token, no padding, no start)"),
        ("causal", "causal", "other tokens from 1 on (1 row of 1 token, no padding, no start)"),
        ("gradient", "gradients", "params.w"),
    ],
)
def test_a_broken_memory_is_caught_with_a_small_case(bug, law, case):
    results, lines = checked(Fading(dim=16, bug=bug), only=[law, "saved"])
    assert results["saved"].ok is True
    assert results[law].ok is False
    assert case in results[law].detail, results[law].detail
    assert f"  ✗ {law}" in lines[1]


def test_what_raises_is_a_broken_law():
    results, _ = checked(Keyed(dim=16), only=("step", "precision", "saved"))
    assert results["step"].ok is True
    assert results["precision"] == laws.Result("precision", False, "raises RuntimeError: no bfloat16")
    assert "the configuration is not JSON" in results["saved"].detail


def test_raise_on_failure_names_the_laws():
    with pytest.raises(AssertionError, match="Keyed breaks\n  ✗ precision"):
        checked(Keyed(dim=16), only="precision", raise_on_failure=True)


def test_an_exception_that_is_not_needed_is_broken():
    results, _ = checked(Fading(dim=16), only="causal", exceptions={"causal": "it reads ahead"})
    assert results["causal"] == laws.Result("causal", False, "declared off, but it holds: it reads ahead")


def test_golden_rows_are_judged():
    rows = [("out_y", 1e-7, True), ("grad_w", 0.5, False)]
    assert checked(Keyed(dim=16), only="golden", golden=lambda: rows[:1])[0]["golden"].ok is True
    result = checked(Keyed(dim=16), only="golden", golden=lambda: rows)[0]["golden"]
    assert result == laws.Result("golden", False, "grad_w off by 5.0e-01")
    assert checked(Keyed(dim=16), only="golden", golden=lambda: [])[0]["golden"].ok is False


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"only": "splt"}, "only: got 'splt', needs names among split, step"),
        ({"exceptions": {"saved": "why"}}, "exceptions: got 'saved'"),
    ],
)
def test_unknown_laws_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        checked(Keyed(dim=16), **arguments)
