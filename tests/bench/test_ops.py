"""`memjax bench ops`: that it sees a wrong op, and what it writes."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from memjax.bench import cases, ops
from memjax.cli import main
from pallas_kernels import linear_attention, triangular

CASE = "linear_attention/head"
PLAN = ops.Plan((cases.CASES[CASE],), (cases.Shape(1, 70, 2, 4),), ("float32",), cases.Shape(1, 70, 2, 4), repeats=2)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        code = main(["bench", "ops", *arguments])
        return code, *capsys.readouterr()

    return run


def test_errors_are_small_in_every_group():
    rows = [row for found in ops.errors(PLAN._replace(hasty=True)) for row in found]
    assert {row["group"] for row in rows} == {"outputs", "inputs", "gates", "state"}
    assert {row["who"] for row in rows} == {"xla", "default"}
    assert {row["contents"] for row in rows} == set(cases.CONTENTS)
    assert ops.too_large(rows) == []
    assert all(row["error"] > 0 for row in rows)


@pytest.mark.parametrize(("of", "group"), [("o", "outputs"), ("q", "inputs"), ("log_decay", "gates")])
def test_a_wrong_op_is_seen(run, monkeypatch, of, group):
    """Off by a thousandth: the command names the array and ends with 1."""

    def wrong(*, implementation, **arrays):
        if implementation == "xla" and of != "o":  # a wrong gradient, right outputs
            a = arrays[of]
            arrays[of] = a + 1e-3 * (a - jax.lax.stop_gradient(a))
        o, state = linear_attention(**arrays, implementation=implementation)
        return (o * 1.001 if implementation == "xla" and of == "o" else o), state

    monkeypatch.setattr("pallas_kernels.linear_attention", wrong)
    code, _, err = run("--ops", CASE, "--parts", "errors", "--quick")
    assert code == 1
    name = of if of == "o" else f"d {of}"
    assert f"{CASE} xla, float32, usual inputs: {name} has an error of 1.0e-03, allowed are" in " ".join(err.split())
    assert "default" not in err


@pytest.mark.slow
def test_an_unstable_inverse_is_seen(monkeypatch):
    """The product of powers, exact on paper, in place of the inverse of blocks of 16: alike inputs show it."""

    def product(A, precision="float32"):
        A = jnp.tril(A, -1)
        one = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
        X, power = one - A, A
        for _ in range(3):
            power = jnp.matmul(power, power, precision="highest")
            X = jnp.matmul(X, one + power, precision="highest")
        return X

    def inverse(A, precision="float32"):
        c = A.shape[-1]
        if c <= 16:
            return product(A)
        (X0, X1), b = (inverse(A[..., i : i + c // 2, i : i + c // 2]) for i in (0, c // 2)), c // 2
        cross = -jnp.matmul(jnp.matmul(X1, A[..., b:, :b], precision="highest"), X0, precision="highest")
        return triangular.join_blocks(X0, cross, X1)

    for module in [m for name, m in sys.modules.items() if name.startswith("pallas_kernels")]:
        if getattr(module, "unit_lower_inverse", None) is triangular.unit_lower_inverse and module is not triangular:
            monkeypatch.setattr(module, "unit_lower_inverse", inverse)
    plan = PLAN._replace(cases=(cases.CASES["delta_rule/head"],), checked=cases.Shape(1, 135, 2, 8), hasty=True)
    jax.clear_caches()
    try:
        rows = [row for found in ops.errors(plan) for row in found]
    finally:
        jax.clear_caches()
    assert {(row["contents"], row["group"]) for row in ops.too_large(rows)} >= {("alike", "outputs")}


def test_times_and_memory():
    (rows,) = ops.times(PLAN)
    assert {(row["who"], row["mode"]) for row in rows} == {
        (who, mode) for who in ("reference", "xla", "default") for mode in ops.MODES
    }
    assert all(len(row["samples"]) == 2 and 0 < row["p20"] <= row["median"] <= row["p80"] for row in rows)
    for row in rows:
        if row["mode"] == "both":
            found = row["memory"]
            arrays = 4 * 70 * 2 * (3 * 4 + 1)  # q, k, v and log_decay
            o, state = 4 * 70 * 2 * 4, 4 * 2 * 4 * 4
            assert found["inputs"] == arrays + o + state
            assert 0 <= found["outputs"] - found["inputs"] < 100  # as many, and a pointer to each
            assert found["chunk_states"] == 2 * state
            assert found["peak"] >= found["inputs"] + found["outputs"]


def test_a_peer_that_disagrees_is_not_timed(monkeypatch):
    monkeypatch.setattr(ops.peers, "associative_scan", lambda x, log_decay: (x, x[:, -1]))
    (rows,) = ops.times(PLAN._replace(cases=(cases.CASES["diagonal_scan/real"],), repeats=1, hasty=True))
    (row,) = [row for row in rows if row["who"] == "associative_scan"]
    assert row["error"] > 0.01 and "mode" not in row


def test_a_peer_that_refuses_is_not_timed():
    class Fla:
        gone = None

        def prepare(self, *_):
            raise ops.peers.PeerError("t is no multiple of 64")

    (rows,) = ops.times(PLAN._replace(fla=Fla(), repeats=1, hasty=True))
    assert [row for row in rows if row["who"].startswith("fla")] == [
        {"case": CASE, "shape": PLAN.shapes[0]._asdict(), "who": "fla simple_gla", "refused": "t is no multiple of 64"}
    ]


def test_scaling():
    plan = PLAN._replace(scaled=tuple(cases.Shape(1, t, 2, 4) for t in (64, 128)), hasty=True)
    (rows,) = ops.scaling(plan)
    assert [(row["mode"], row["t"]) for row in rows] == [("both", 64), ("both", 128)]
    assert rows[0]["ratio"] is None and rows[1]["ratio"] == rows[1]["median"] / rows[0]["median"]


@pytest.mark.slow
def test_a_plain_scan_that_would_keep_too_much_is_left_out(monkeypatch):
    monkeypatch.setattr(ops, "KEPT_BYTES", 1)
    (rows,) = ops.times(PLAN._replace(repeats=1))
    assert {row["mode"] for row in rows if row["who"] == "reference"} == {"forward", "decode"}


@pytest.mark.slow
def test_quick_shows_tables_and_writes_nothing(run, tmp_path):
    code, out, _ = run("--quick", "--ops", CASE)
    assert code == 0
    for title in ("Errors, float32", "Milliseconds, b=1 t=256", "Memory of forward and backward", "while t doubles"):
        assert title in out
    assert not list(tmp_path.iterdir())


def test_the_record_holds_samples_and_settings(run, tmp_path):
    code, out, _ = run("--ops", "short_conv", "--parts", "times", "--shapes", "tests", "--repeats", "1", "--no-peers")
    assert code == 0 and "How many times faster the default is" in out
    (path,) = (tmp_path / "build" / "bench").iterdir()
    record = json.loads(path.read_text())
    assert path.name.startswith("bench_ops-cpu-")
    assert record["config"]["ops"] == ["short_conv"] and record["config"]["repeats"] == 1
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert all(len(row["samples"]) == 1 for row in record["times"])
    assert max(map(len, out.splitlines())) <= 100


def test_a_record_of_another_run_is_not_replaced(run, tmp_path):
    arguments = ("--ops", "short_conv", "--shapes", "tests", "--repeats", "1", "--no-peers", "--parts")
    code, _, _ = run(*arguments, "times")
    (path,) = (tmp_path / "build" / "bench").iterdir()
    before = path.read_bytes()
    again, _, err = run(*arguments, "errors")
    assert (code, again) == (0, 2) and path.read_bytes() == before
    assert f"{path.name}: holds a record of other parts and is not replaced" in " ".join(err.split())


def test_a_part_that_fails_leaves_those_before_it(run, tmp_path, monkeypatch):
    def failing(plan):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setitem(ops.PARTS, "times", lambda plan: iter([[{"who": "xla"}]]))
    monkeypatch.setitem(ops.PARTS, "errors", failing)
    monkeypatch.setattr("memjax.cli.bench._print", lambda *_: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("--ops", "short_conv", "--parts", "times", "errors", "--no-peers")
    (path,) = (tmp_path / "build" / "bench").iterdir()
    assert json.loads(path.read_text())["times"] == [{"who": "xla"}]


@pytest.mark.slow
def test_narrow_terminals_show_medians(run, monkeypatch):
    arguments = ("--quick", "--ops", "diagonal_scan/complex", "delta_rule/householder")
    _, wide, _ = run(*arguments, "--parts", "scaling")
    monkeypatch.setenv("COLUMNS", "80")
    _, narrow, _ = run(*arguments)
    assert "(" in wide.partition("t=256")[2] and "(" not in narrow.partition("Milliseconds, ")[2].partition("\n\n")[0]
    assert "…" not in narrow and "+ backward" in narrow and "peak / sum" in narrow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "deltarule"], "--ops: no op or form is called 'deltarule'; there are linear_attention, "),
        (["--repeats", "0"], "--repeats is 0, needs at least 1"),
        (["--parts"], "--parts: needs one or more of errors, times, scaling"),
        (["--quick", "--repeats", "3"], "--quick has its own shape and samples, no peers and no record: leave out"),
        (["--out", __file__], "test_ops.py: File exists, needs a folder that can be written"),
        (["--peers-python", "nowhere"], "--peers-python nowhere: no such file"),
    ],
)
def test_bad_input_is_refused(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
