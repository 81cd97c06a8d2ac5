import io

import pytest
from rich.console import Console

from memjax.train.progress import Progress, number


def _run(total, *, terminal=False, times=None, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Progress(total, "build", unit="doc", console=console, **options) as bar:
        for i in range(total if times is None else times):
            bar.update(1, loss=1.0 / (i + 1), tokens_per_second=12345.0)
    return out.getvalue()


def test_plain_lines_are_few_and_the_first_comes_at_once():
    lines = _run(1000).splitlines()
    assert lines[0].startswith("build 1/1,000 (0 %)") and lines[-1].startswith("build 1,000/1,000 (100 %)")
    assert len(lines) <= 22
    assert lines[0].endswith("0:00:00  loss 1  tokens/s 12.35K")  # no rate: the first unit is mostly compilation
    assert "doc/s  ETA" in lines[1]
    assert lines[-1].endswith("doc/s  loss 0.001  tokens/s 12.35K") and "ETA" not in lines[-1]


def test_plain_lines_come_by_time_too(monkeypatch):
    now = map(float, range(0, 100_000, 3))
    monkeypatch.setattr("memjax.train.progress.time.perf_counter", lambda: next(now))
    lines = _run(1_000_000, times=21).splitlines()
    assert [line.split("/")[0] for line in lines] == [f"build {n}" for n in (1, 5, 9, 13, 17, 21)]  # every 12 seconds


def test_an_early_end_is_shown():
    assert _run(1000, times=7).splitlines()[-1].startswith("build 7/1,000 (1 %)")


def test_rate_leaves_out_earlier_sessions_and_the_first_unit(monkeypatch):
    now = iter([0.0, 60.0, 62.0, 64.0])  # a minute of compilation, then a unit in two seconds
    monkeypatch.setattr("memjax.train.progress.time.perf_counter", lambda: next(now))
    line = _run(90, times=3, done=80, share=0.01).splitlines()[-1]
    assert line.startswith("build 83/90 (92 %)  0:01:04  0.5 doc/s  ETA 0:00:14")


def test_terminal_shows_a_bar():
    text = _run(4, terminal=True)
    assert "4/4" in text and "\x1b[" in text and "loss 0.25" in text


def test_disabled_and_untouched_bars_are_silent():
    assert _run(100, enabled=False) == "" and _run(100, times=0) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0.00012345, "0.0001234"), (9999.0, "9999"), (12345.0, "12.35K"), (2.5e6, "2.5M"), (3e9, "3G")]
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
