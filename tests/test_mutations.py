"""Every deliberate bug breaks a law, in every entry that has the part. A few run by default, the rest with -m slow."""

from __future__ import annotations

import re

import pytest

from memjax import laws
from tests import mutations
from tests.exceptions import EXCEPTIONS
from tests.mutations import MUTATIONS, Mutation
from tests.test_laws import COMPOSITIONS, Fading, small

# One of each sort; the laws they break compile little.
QUICK = (
    "decay sign in GLA",
    "padding is written",
    "start not given to the convolution",
    "no causal mask",
    "rotary from 0 in every call",
)

CASES = [
    pytest.param(m, entry, law, id=f"{m.name}-{entry}", marks=[] if m.name in QUICK else [pytest.mark.slow])
    for m in MUTATIONS
    for entry, law in m.seen.items()
]


def build(entry: str):
    if entry == "fading":
        return Fading(dim=16)
    return COMPOSITIONS[entry]() if entry in COMPOSITIONS else small(entry)


@pytest.mark.parametrize("mutation, entry, law", CASES)
def test_a_law_sees_it(mutation, entry, law):
    with mutations.applied(mutation):
        result = laws.judge(laws.Bench(build(entry)), law, EXCEPTIONS.get(entry, {}).get(law))
    assert result.ok is False, f"{law} holds in spite of it"
    assert not re.match("raises (Name|Attribute|UnboundLocal)Error", result.detail), "the mutation itself is broken"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_none_is_stale_and_all_are_undone(mutation):
    function = mutations.target(mutation)
    sound = function.__code__
    with mutations.applied(mutation):
        assert function.__code__ is not sound
    assert function.__code__ is sound


def test_the_bug_is_gone_afterwards():
    mutation = next(m for m in MUTATIONS if m.name == "start not given to the convolution")
    with mutations.applied(mutation):
        assert laws.judge(laws.Bench(small("canon")), "packing").ok is False
    assert laws.judge(laws.Bench(small("canon")), "packing").ok is True


def test_a_stale_mutation_is_an_error():
    stale = Mutation("stale", "memjax.layers:gate", (("no such source", ""),), {})
    with pytest.raises(mutations.StaleMutation, match="'no such source' is 0 times in memjax.layers:gate, needs 1"):
        with mutations.applied(stale):
            pass


def test_quick_names_exist():
    assert set(QUICK) <= {m.name for m in MUTATIONS}
