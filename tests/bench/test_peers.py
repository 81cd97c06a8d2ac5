"""The peers compute what the ops compute (flash-linear-attention's after `make peers`), and say when they can't."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from memjax.bench import peers
from memjax.bench.cases import CASES, Shape, on_device
from memjax.bench.timing import compiled

PYTHON = peers.find_python(None)
SHAPE = Shape(1, 128, 2, 8)


def both(case, op):
    """Inputs without an initial state, cotangents, and what the op makes of them."""
    drawn = case.draw(np.random.default_rng(0), SHAPE)
    inputs = on_device({name: x for name, x in drawn.items() if name != "initial_state"}, "float32")
    outputs = jax.eval_shape(op, **inputs)
    cotangents = jax.tree.map(lambda a: np.random.default_rng(1).standard_normal(a.shape).astype("float32"), outputs)
    return inputs, cotangents, peers.results(*compiled("both", op, hasty=True)(inputs, cotangents))


@pytest.mark.parametrize("name", ["diagonal_scan/real", "diagonal_scan/complex"])
def test_associative_scan_is_the_diagonal_scan(name):
    case = CASES[name]
    *_, want = both(case, case.bind("reference"))
    *_, got = both(case, peers.associative_scan)
    assert {key: peers.error(got[key], want[key]) < 1e-5 for key in want} == dict.fromkeys(want, True)


@pytest.mark.skipif(PYTHON is None, reason="needs `make peers`; nothing in CI does")
def test_fla_is_the_op():
    with peers.Fla(PYTHON) as fla:
        cases = [case for case in CASES.values() if case.peer in fla.about["peers"]]
        assert len(cases) == len(fla.about["peers"])
        for case in cases:
            inputs, cotangents, want = both(case, case.bind("reference"))
            got = fla.prepare(case.peer, inputs, cotangents)
            assert {key: peers.error(got[key], want[key]) < 1e-5 for key in want} == dict.fromkeys(want, True)
            assert all(fla.run(mode) > 0 for mode in ("forward", "residuals", "both"))
        with pytest.raises(peers.PeerError, match="KeyError: 'mamba'"):
            fla.prepare("mamba", inputs, cotangents)
        assert fla.prepare(case.peer, inputs, cotangents)  # a refusal ends nothing


def test_a_process_that_ends_says_why(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no torch here')")
    monkeypatch.setattr(peers, "SCRIPT", script)
    with (
        pytest.raises(peers.PeerError, match="has ended; its last line: no torch here"),
        peers.Fla(Path(sys.executable)),
    ):
        pass


def test_a_python_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(peers.PeerError, match="--peers-python .*nowhere: no such file"):
        peers.find_python(tmp_path / "nowhere")


def test_error():
    assert peers.error((np.zeros(2), np.asarray([3.0])), (np.zeros(2), np.asarray([4.0]))) == 0.25
    assert peers.error(np.asarray([3.0, 4.0]), np.zeros(2)) == pytest.approx(12.5**0.5)
    assert peers.error(np.asarray([np.nan]), np.ones(1)) == np.inf
