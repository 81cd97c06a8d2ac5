import json
import subprocess
import sys

import pytest

from memjax.errors import DataError
from memjax.plots import plot_loss


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


def test_matplotlib_is_not_imported_with_the_module():
    code = "import sys, memjax.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
