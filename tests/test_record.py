"""Records: the name, what stands in front of the body, and that none is half written."""

import datetime
import json

import jax
import pytest

from memjax import record


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


def test_the_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.environment()["commit"] is None
