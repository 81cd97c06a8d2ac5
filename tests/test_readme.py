"""The README: what it shows runs (`python -m tests.readme` runs all of it), and its tables are those of the catalog."""

import json
import re

import pytest

from experiments import readme_tables
from memjax.catalog import CATALOG
from tests import readme
from tests.test_plots import needle_bank_record

TEXT = readme.README.read_text(encoding="utf-8")
PROGRAM = "# title\n\n```python\n{}```\n\n```sh run\necho done\n```\n\n```sh\nexit 3\n```\n"


def test_the_first_program_is_short_and_on_the_first_screen():
    assert readme.first_program(TEXT) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# title\n", "no ```python block"),
        (PROGRAM.format("x = 1\n" * 14), "has 14 lines"),
        (PROGRAM.format("x = 1\n" * 21), "has 21 lines"),
        ("\n" * 30 + PROGRAM.format("x = 1\n" * 15), "ends at line 49"),
    ],
)
def test_what_is_wrong_with_the_first_program(text, message):
    assert message in readme.first_program(text)


def test_every_program_compiles():
    programs = [block for block in readme.blocks(TEXT) if block.kind == "python"]
    assert len(programs) >= 4
    for block in programs:
        compile(block.text, f"README.md:{block.line}", "exec")


def test_blocks_are_run_and_reported(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(PROGRAM.format("x = 1\n" * 15 + "print('ready')\n"))
    assert readme.main(path) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line[0] for line in out] == ["✓", "✓"] and out[0].endswith(": ready") and out[1].endswith(": done")

    path.write_text(PROGRAM.format("x = 1\n" * 15 + "raise SystemExit('no')\n"))
    assert readme.main(path) == 1
    assert capsys.readouterr().out.startswith("✗ README.md:4 python, 16 lines")


def test_files_that_it_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    missing = [link for link in links if not (readme.README.parent / link).exists()]
    assert links and not missing


def test_tables_are_up_to_date():
    assert readme_tables.redraw(TEXT) == TEXT, "run `python -m experiments.readme_tables`"


def test_tables_hold_the_catalog():
    drawn = readme_tables.catalog().splitlines()
    assert len(drawn) == 2 + len(CATALOG)
    counts = [int(count) for count in re.findall(r"\| (\d+): ", readme_tables.places())]
    assert len(counts) == 4 and sum(counts) == len(CATALOG)


def test_the_newest_record_is_shown(tmp_path):
    old, new = needle_bank_record(seeds=1), needle_bank_record(seeds=3)
    old["date"] = "2025-12-31"
    (tmp_path / "needle_bank-cpu-2025-12-31.json").write_text(json.dumps(old))
    (tmp_path / "needle_bank-cpu-2026-01-02.json").write_text(json.dumps(new))
    text = readme_tables.redraw(TEXT, tmp_path)
    assert "needle_bank-cpu-2026-01-02.json" in text and "2025-12-31" not in text
    assert "| 16K | 256 | 0.994 / 0.992 | 0.965 (0.955 to 0.975) | 0.0% (-1.0% to 1.0%) |" in text
    assert "| 4M |" in text and "1024 times the 4K of training" in text


def test_a_record_without_a_right_answer_has_no_drop(tmp_path):
    record = needle_bank_record(seeds=1)
    for row in record["runs"][0]["sizes"]:
        row.update(accuracy=0.0, drop=None, drop_interval=None)
    (tmp_path / "needle_bank-cpu-2026-01-02.json").write_text(json.dumps(record))
    assert "| 0.000 | – |" in readme_tables.redraw(TEXT, tmp_path)


def test_without_a_record_it_says_how_to_make_one(tmp_path):
    assert "There is no record yet: `python -m experiments.needle_bank" in readme_tables.redraw(TEXT, tmp_path)


def test_a_missing_block_is_named():
    with pytest.raises(SystemExit, match="<!-- catalog -->"):
        readme_tables.redraw(TEXT.replace("<!-- catalog -->", ""))
