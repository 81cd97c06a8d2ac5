import json

from memjax.train.metrics import JSONLWriter, MultiWriter, Writer


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_there_at_once_and_appended(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JSONLWriter(path)
    writer.write(1, {"loss": 2.5})
    assert _lines(path) == [{"step": 1, "loss": 2.5}]
    writer.write(2, {"loss": 2.0})
    JSONLWriter(path).write(3, {"loss": 1.5})
    assert [line["step"] for line in _lines(path)] == [1, 2, 3]


def test_a_resumed_run_replaces_the_lines_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "loss": 9}}\n' for s in (10, 20, 30, 40)))
    writer = JSONLWriter(path)
    writer.write(30, {"loss": 1.0})
    writer.write(30, {"accuracy": 0.5})  # more about the same step, in the same session, stays
    assert [line["step"] for line in _lines(path)] == [10, 20, 30, 30]
    assert _lines(path)[2] == {"step": 30, "loss": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_in_two_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 9}\n{"step": 11, "lo')
    JSONLWriter(path).write(12, {"loss": 1.0})
    assert [line["step"] for line in _lines(path)] == [10, 12]


def test_multi_writer_hands_everything_to_each(tmp_path):
    seen = []

    class Memo:
        def write(self, step, values):
            seen.append((step, values))

    writer = MultiWriter([Memo(), JSONLWriter(tmp_path / "m.jsonl")])
    writer.write(4, {"loss": 1.0})
    assert isinstance(writer, Writer) and isinstance(Memo(), Writer)
    assert seen == [(4, {"loss": 1.0})] and _lines(tmp_path / "m.jsonl") == [{"step": 4, "loss": 1.0}]
