"""The table of laws follows the runs, and says where it does not."""

import json

import pytest

from memjax import laws
from memjax.catalog import CATALOG
from tests import laws_table

HELD = dict.fromkeys(laws.NAMES, "held")
FIRST, SECOND = list(CATALOG)[:2]


def as_in_the_package(row):
    return {what: [law for law in laws.NAMES if row[law] == what] for what in laws_table.VERDICTS}


@pytest.fixture
def table():
    """A table and a run that agree."""
    found = {name: dict(HELD) for name in CATALOG} | {SECOND: {**HELD, "golden": "not applicable"}}
    return {name: as_in_the_package(row) for name, row in found.items()}, found


def test_verdicts():
    assert laws_table.verdict(laws.Result("split", True, ""), declared=False) == "held"
    assert laws_table.verdict(laws.Result("split", True, ""), declared=True) == "declared off"
    assert laws_table.verdict(laws.Result("golden", None, ""), declared=False) == "not applicable"
    assert laws_table.verdict(laws.Result("split", False, ""), declared=True) == "broken"


def test_what_agrees(table):
    assert laws_table.differences(*table) == []
    assert laws_table.merged({}, table[1]) == table[0]
    assert json.loads(laws_table.text_of(table[0])) == table[0]


def test_differences_are_named(table):
    committed, found = table
    file = laws_table.COMMITTED.name
    found[FIRST]["split"] = "broken"
    assert laws_table.differences(committed, found) == [f"{FIRST}: split is 'held' in {file}, 'broken' in the run"]
    del found[FIRST]["split"]
    assert laws_table.differences(committed, found) == [f"{FIRST}: split is 'held' in {file}, 'not judged' in the run"]
    del found[FIRST]
    assert laws_table.differences(committed, found) == [f"{FIRST}: was not run"]
    found[FIRST] = dict(HELD)
    del committed[FIRST]
    committed["gone"] = committed[SECOND]
    assert laws_table.differences(committed, found) == [
        f"gone: is in {file}, and not in the catalog",
        f"{FIRST}: is not in {file}",
    ]


def test_only_whole_and_sound_rows_are_taken_over(table):
    committed, found = table
    found = {FIRST: {**HELD, "split": "declared off"}, SECOND: {"split": "declared off"}, "gone": HELD}
    new = laws_table.merged(committed, found)
    assert new == {**committed, FIRST: as_in_the_package(found[FIRST])}
    assert laws_table.merged(committed, {FIRST: {**HELD, "split": "broken"}}) == committed


def test_runs_add_up(tmp_path):
    file = tmp_path / "build" / "laws.json"
    laws_table.keep([("a", "split", "held"), ("b", "split", "held")], file)
    laws_table.keep([("a", "step", "held"), ("b", "split", "broken")], file)
    assert json.loads(file.read_text()) == {"a": {"split": "held", "step": "held"}, "b": {"split": "broken"}}


def test_the_commands(table, tmp_path, monkeypatch, capsys):
    committed, found = table
    for name in ("COMMITTED", "FOUND"):
        monkeypatch.setattr(laws_table, name, tmp_path / f"{name}.json")
    monkeypatch.setattr(laws_table, "ROOT", tmp_path)
    assert laws_table.main(["--check"]) == 1
    assert "FOUND.json: missing" in capsys.readouterr().out
    laws_table.FOUND.write_text(json.dumps(found))
    assert laws_table.main(["--check"]) == 1
    assert f"{FIRST}: is not in COMMITTED.json" in capsys.readouterr().out
    assert laws_table.main(["--write"]) == 0
    assert laws_table.main(["--check"]) == 0
    assert json.loads(laws_table.COMMITTED.read_text()) == committed
