"""The short form of kill_bank.py, in a process of its own: one that has computed with jax can't be forked."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.kill_bank import COMMANDS


@pytest.mark.slow
def test_killed_commands_go_on_and_end_as_if_never_killed():
    program = [sys.executable, "-m", "tests.cli.kill_bank", "--instants", "4"]
    run = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ended as if never killed") == len(COMMANDS) and "two builds at once" in run.stdout
