"""Records: the name, what stands in front of the body, and that none is half written."""

import datetime
import json

import jax
import pytest

from memjax import record
from memjax.errors import DataError


def test_write(tmp_path):
    path = record.write_record("speed", {"rows": [1.5, None]}, tmp_path / "new")
    date = datetime.date.today().isoformat()
    assert path == tmp_path / "new" / f"speed-cpu-{date}.json"
    found = json.loads(path.read_text())
    assert list(found) == ["experiment", "date", "environment", "rows"]
    assert found["environment"]["versions"]["jax"] == jax.__version__
    assert record.write_record("speed", {}, tmp_path / "new") == path  # replaces
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_can_not_be_written_leaves_the_old_record(tmp_path):
    path = record.write_record("speed", {"rows": 1}, tmp_path)
    with pytest.raises(TypeError):
        record.write_record("speed", {"rows": object()}, tmp_path)
    assert json.loads(path.read_text())["rows"] == 1


def test_what_json_lacks_is_null(tmp_path):
    path = record.write_record("speed", {"rows": [{"error": float("inf")}, (float("nan"), 1.0)]}, tmp_path)
    assert json.loads(path.read_text())["rows"] == [{"error": None}, [None, 1.0]]


def test_a_record_of_another_config_is_not_replaced(tmp_path):
    config = {"ops": ("a", "b"), "repeats": 2}
    path = record.begin_record("speed", tmp_path, config).write({"config": config})
    assert record.begin_record("speed", tmp_path, config).path == path
    with pytest.raises(DataError, match=f"{path.name}: holds a record of other repeats and is not replaced"):
        record.begin_record("speed", tmp_path, config | {"repeats": 3})
    path.write_text("{")
    with pytest.raises(DataError, match=f"{path.name}: is no record with a config"):
        record.begin_record("speed", tmp_path, config)


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.environment()["commit"] is None


def test_the_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.environment()["commit"] is None
