import json
import subprocess
import sys

import pytest

from memjax.errors import DataError
from memjax.plots import plot_loss, plot_needle_bank


def _metrics(path, n=40):
    rows = [{"step": 10 * i, "loss": 8 * 0.9**i, "accuracy": i / n, "bad": float("nan")} for i in range(1, n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_one_panel_a_series(tmp_path):
    _metrics(tmp_path / "m.jsonl")
    plot_loss(tmp_path / "m.jsonl", tmp_path / "plots" / "loss.png")
    from PIL import Image

    with Image.open(tmp_path / "plots" / "loss.png") as image:
        image.load()
        assert image.size == (1050, round((0.6 + 2 * 1.5) * 150)) and len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "file is missing"), ('{"step": 1, "loss": 2}\n{"ste', "line 2 is"), ('{"step": 1}\n', "no series")],
)
def test_errors_name_the_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"m\.jsonl: .*{message}"):
        plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def needle_bank_record(seeds=3, sizes=5):
    """The layout that experiments.needle_bank writes; shares fall with the size, seeds differ by a hundredth."""
    runs = [
        {
            "seed": seed,
            "sizes": [
                {
                    "tokens": (16 << 10) * 4**i,
                    "documents": 256 * 4**i,
                    "recall_at_4": [0.998 - 0.004 * i - 0.004 * seed, 0.996 - 0.006 * i - 0.004 * seed],
                    "accuracy": 0.975 - 0.012 * i - 0.01 * seed,
                    "drop": 0.0123 * i,
                    "drop_interval": [0.0123 * i - 0.01, 0.0123 * i + 0.01],
                    "seconds_per_question": 0.01 * (i + 1),
                }
                for i in range(sizes)
            ],
            "bank": {"bytes_per_token": 12.5, "tokens_per_second": 9000.0},
            "train_seconds": 100.0,
        }
        for seed in range(seeds)
    ]
    return {
        "experiment": "needle_bank",
        "date": "2026-01-02",
        "environment": {"device": "cpu", "cpu": "A processor", "cores": 2, "versions": {"jax": "0.10.2"}},
        "config": {"tokens": "4M"},
        "trained_on": 4096,
        "runs": runs,
    }


def _colors(path):
    from PIL import Image

    with Image.open(path) as image:
        counted = image.convert("RGB").getcolors(1 << 20)
    return {color: number for number, color in counted}


ANSWERS, FIRST_LAYER = (0xC8, 0x55, 0x3D), (0x2A, 0x6F, 0x97)


@pytest.mark.parametrize("seeds", [1, 3])
def test_needle_bank_has_a_line_a_layer_and_one_for_the_answers(tmp_path, seeds):
    (tmp_path / "r.json").write_text(json.dumps(needle_bank_record(seeds)))
    plot_needle_bank(tmp_path / "r.json", tmp_path / "r.png")
    colors = _colors(tmp_path / "r.png")
    assert all(colors.get(line, 0) > 200 for line in (ANSWERS, FIRST_LAYER))


def test_needle_bank_hides_no_share(tmp_path):
    record = needle_bank_record(seeds=1)
    for row in record["runs"][0]["sizes"]:
        row["accuracy"] = 0.0  # all answers wrong: a line at the very bottom
    (tmp_path / "r.json").write_text(json.dumps(record))
    plot_needle_bank(tmp_path / "r.json", tmp_path / "r.png")
    assert _colors(tmp_path / "r.png")[ANSWERS] > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("trained_on"), "trained_on"),
        (lambda record: record["runs"][0]["sizes"][0].pop("accuracy"), "accuracy"),
        (lambda record: record["runs"].clear(), "no record"),
        (lambda record: record["runs"][1]["sizes"].pop(), "different numbers of sizes"),
    ],
)
def test_needle_bank_errors_name_file_and_field(tmp_path, change, message):
    record = needle_bank_record()
    change(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=rf"r\.json: .*{message}"):
        plot_needle_bank(tmp_path / "r.json", tmp_path / "r.png")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(("text", "message"), [(None, "file is missing"), ('{"runs', "is not JSON")])
def test_needle_bank_file_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=rf"r\.json: .*{message}"):
        plot_needle_bank(tmp_path / "r.json", tmp_path / "r.png")


def test_matplotlib_is_not_imported_with_the_module():
    code = "import sys, memjax.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
