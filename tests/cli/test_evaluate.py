"""`memjax eval` as a user types it."""

import json

import pytest

from memjax.cli import main
from memjax.tasks import SETTINGS

TASK = ["--task", "mqar", "--task-fields", '{"vocab": 32, "length": 16, "pairs": 2}']
SMALL = [*TASK, "--dim", "16", "--head-dim", "8", "--layers", "1", "--steps", "3", "--batch", "4", "--rows", "8"]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """memjax eval ARGUMENTS in an empty folder: code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capsys.readouterr()
        code = main(["eval", *(str(a) for a in arguments)])
        return code, *capsys.readouterr()

    return run


def assert_refused(result, *parts):
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_list_tasks(run):
    code, out, err = run("--list-tasks")
    assert (code, err) == (0, "")
    for name, setting in SETTINGS.items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert f"{setting.steps:,}" in line
    assert "K=4, K=8, K=16" in out and "2312.04927" in out


def test_a_table_and_a_file(run, tmp_path):
    code, out, err = run(*SMALL, "--memory", "gla", "--fields", '{"gate_low_rank_dim": 4}', "--json", "r/gla.json")
    assert (code, err) == (0, "")
    assert "gla, 1 layer, dim 16" in out and "train 3/3" in out and "ms an update" in out and "wrote r/gla.json" in out
    line = next(line for line in out.splitlines() if line.startswith("K=16"))
    accuracy, chance = line.split()[1:3]
    found = json.loads((tmp_path / "r" / "gla.json").read_text())
    (result,) = found["results"]
    assert f"{result['scores']['K=16']['accuracy']:.3f}" == accuracy and chance == "0.500"
    assert found["chance"] == {"K=4": 0.5, "K=8": 0.5, "K=16": 0.5}
    assert found["recipe"]["steps"] == 3 and found["recipe"]["learning_rate"] == SETTINGS["mqar"].learning_rate
    assert result["steps"] == 3 and len(result["losses"]) == 1 and "params" not in result
    mixer = found["model"]["body"]["blocks"][0]["memory"]
    assert mixer["gate_low_rank_dim"] == 4 and mixer["heads"] == 1
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["gla.json"]


@pytest.mark.slow
def test_seeds_give_a_spread(run):
    code, out, _ = run(*SMALL, "--memory", "sliding_window_attention", "--seeds", 0, 1, "--hidden", 8)
    assert code == 0 and "train 6/6" in out
    assert next(line for line in out.splitlines() if line.startswith("K=4")).count("±") == 4


def test_refuses(run):
    assert_refused(
        run("--memory", "gated_delta"), "no memory is called 'gated_delta'", "did you mean gated_delta_net or"
    )
    assert_refused(run("--task", "mqaar"), "no task is called 'mqaar'", "did you mean mqar")
    assert_refused(run("--task", "zzz"), "there are mqar, ")
    assert_refused(run("--task-fields", "{x"), "--task-fields: not JSON")
    assert_refused(run("--fields", "[1]"), "--fields: needs a JSON object, got list")
    assert_refused(run("--task-fields", '{"key": 1}'), "--task-fields: MQAR has no field 'key'; it has vocab, length")
    assert_refused(run("--task-fields", '{"length": 8}'), "--task-fields: MQAR: length is 8, needs at least 16")
    assert_refused(run("--fields", '{"head": 1}'), "--memory gated_delta_net: ", "GatedDeltaNet has no field 'head'")
    assert_refused(run("--fields", '{"v_heads": 0}'), "v_heads is 0")
    assert_refused(run("--fields", '{"layers": 3}'), "--fields: layers is set by --layers")
    assert_refused(run("--steps", 0), "--steps is 0, needs at least 1")
    assert_refused(run("--learning-rate", 0), "Recipe: learning_rate is 0")
    assert_refused(run("--hidden", -1), "--hidden is -1, needs at least 0")
    assert_refused(run("--conv", 1), "--conv is 1, needs 0 or at least 2")
    assert_refused(run("--implementation", "cuda"), "--implementation is 'cuda', gated_delta_net has reference, xla")
