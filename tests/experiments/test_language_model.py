"""The experiment that trains language models: one that was killed ends as one that was left alone, to the last bit."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = "--memories gla --steps 24 --save-every 6 --dim 32 --layers 2 --head-dim 16 --context 32 --batch 4 --vocab 512"


def command(output: Path) -> list[str]:
    module = [sys.executable, "-m", "experiments.language_model"]
    return [*module, *SIZES.split(), "--folder", str(output.parent / "text"), "--output", str(output)]


def result(output: Path) -> dict:
    """What the record says of the run, without times."""
    (record,) = output.glob("language_model-*.json")
    (run,) = json.loads(record.read_text())["runs"]
    return {**run, "metrics": [{k: v for k, v in line.items() if "second" not in k} for line in run["metrics"]]}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_last_bit(tmp_path):
    shutil.copytree(ROOT / "memjax", tmp_path / "text", ignore=lambda _, names: {"__pycache__"} & set(names))
    child = subprocess.Popen(command(tmp_path / "killed"), cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "killed" / "gla-0" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and '"step": 10,' in metrics.read_text()):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (metrics.parent / "step_00000024").exists()
    for name in ("killed", "undisturbed"):
        subprocess.run(command(tmp_path / name), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert [line["step"] for line in result(tmp_path / "killed")["metrics"]] == [1, 10, 20, 24]
