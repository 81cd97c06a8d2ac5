"""The peers compute what the ops compute (flash-linear-attention's after `make peers`), and say when they can't."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from memjax.bench import ops, peers
from memjax.bench.cases import CASES, Shape, on_device
from memjax.bench.timing import compiled

PYTHON = peers.find_python(None)
SHAPE = Shape(1, 128, 2, 8)
DYING = """
import json, os, sys
import numpy
print(json.dumps(dict(waits=os.environ["OMP_WAIT_POLICY"])), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question["do"] == "{at}":
        sys.exit(3)
    case = numpy.load(question["file"])
    names = {{name: name.replace("in ", "d ") for name in case}} | dict(do="o", dstate="state")
    numpy.savez("results.npz", **{{names[name]: case[name] for name in case}})
    print(json.dumps(dict(file=os.path.abspath("results.npz"))), flush=True)
"""


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
        pytest.raises(peers.PeerError, match="has ended with code 1; its last line: no torch here"),
        peers.Fla(Path(sys.executable)),
    ):
        pass


def test_a_process_that_is_no_peer_is_refused(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("print('hello')")
    monkeypatch.setattr(peers, "SCRIPT", script)
    with pytest.raises(peers.PeerError, match="says 'hello', which is no answer"), peers.Fla(Path(sys.executable)):
        pass


@pytest.mark.parametrize("at", ["prepare", "run"])
def test_a_peer_that_dies_is_left_out_from_then_on(tmp_path, monkeypatch, at):
    """Two cases: the first says why, the second is timed without it, and closing what has ended is no error."""
    script = tmp_path / "script.py"
    script.write_text(DYING.format(at=at))
    monkeypatch.setattr(peers, "SCRIPT", script)
    monkeypatch.setattr(peers, "error", lambda x, ref: 0.0)
    two = tuple(CASES[name] for name in ("linear_attention/head", "delta_rule"))
    with peers.Fla(Path(sys.executable)) as fla:
        assert fla.about == {"waits": "PASSIVE", **peers.THREADS}
        plan = ops.Plan(two, (Shape(1, 70, 2, 4),), repeats=1, hasty=True, fla=fla)
        first, second = ops.times(plan)
        with pytest.raises(peers.PeerGone):
            fla.run("both")
    message = "the peers' process has ended with code 3; its last line: nothing"
    assert [row["refused"] for row in first if "refused" in row] == [message] and fla.gone == message
    assert {row["who"] for row in second} == {"default"}
    for rows in (first, second):
        assert {row["mode"] for row in rows if row["who"] == "default"} == set(ops.MODES)


def test_a_python_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(peers.PeerError, match="--peers-python .*nowhere: no such file"):
        peers.find_python(tmp_path / "nowhere")


def test_error():
    assert peers.error((np.zeros(2), np.asarray([3.0])), (np.zeros(2), np.asarray([4.0]))) == 0.25
    assert peers.error(np.asarray([3.0, 4.0]), np.zeros(2)) == pytest.approx(12.5**0.5)
    assert peers.error(np.asarray([np.nan]), np.ones(1)) == np.inf
