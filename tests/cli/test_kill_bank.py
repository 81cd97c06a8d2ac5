"""The short form of kill_bank.py."""

import pytest

from tests.cli import kill_bank


@pytest.mark.slow
def test_killed_commands_go_on_to_the_same_bytes(capsys):
    kill_bank.main(instants=3)
    assert capsys.readouterr().out.count("equal bytes") == 4
