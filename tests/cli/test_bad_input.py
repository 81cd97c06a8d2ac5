"""What may be wrong with folders, banks, disks and questions, as a user meets it: one line that says what and where,
exit status 2, and nothing half written. (More of the same in test_cli.py and test_bank_change.py.)"""

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memjax.in_storage import bank_disk
from memjax.in_storage.bank_files import Change, open_bank
from memjax.in_storage.bank_manifest import read_manifest
from tests.cli.test_cli import QUESTION, assert_refused, corpus, models, run  # noqa: F401
from tests.in_storage.test_bank_files import rewrite, tree

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):  # noqa: F811
    """A bank of two files that no test may change."""
    from memjax.data import File
    from memjax.lm.build import build_bank
    from memjax.lm.files import load_model

    path = tmp_path_factory.mktemp("made") / "texts.bank"
    files = [File("a.txt", "The red house has number 1234567.\n"), File("b.txt", "Nothing to see.\n")]
    build_bank(load_model(models / "m0"), files, path, progress=False)
    return path


@pytest.fixture
def bank(made, tmp_path):
    """A copy for a test to damage."""
    return shutil.copytree(made, tmp_path / "texts.bank")


def commands(corpus, models):  # noqa: F811
    """Everything that changes the bank texts.bank."""
    return {
        "build": ("bank", "build", corpus, "--model", models / "m0"),
        "append": ("bank", "append", "texts.bank", corpus),
        "delete": ("bank", "delete", "texts.bank", "a.txt"),
        "compact": ("bank", "compact", "texts.bank"),
    }


# ---------------------------------------------------------------------------------------------- documents


def test_a_document_longer_than_the_limit_is_cut_and_a_file_over_it_is_skipped(run, models, tmp_path):  # noqa: F811
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one_line.txt").write_text("".join(map(str, range(100, 400))))
    with open(folder / "huge.txt", "wb") as file:
        file.truncate((1 << 24) + 1)  # no byte of it is on the disk
    code, out, err = run("bank", "build", folder, "--model", models / "m0")
    assert (code, err) == (0, "")
    assert "huge.txt: too large: 16777217 bytes, over max_bytes = 16777216" in out
    opened = open_bank("texts.bank")
    assert opened.documents.tokens.sum() == 900 and opened.documents.tokens.max() <= 64
    assert set(opened.documents.first_line) == set(opened.documents.last_line) == {1}


def test_top_k_larger_than_the_number_of_documents(run, bank):  # noqa: F811
    assert run("bank", "delete", "texts.bank", "b.txt")[0] == 0
    code, out, err = run("bank", "ask", "texts.bank", QUESTION, "--passages", 3)  # the model's top_k is 3
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines() if " score " in line] == ["a.txt:1"]


# ---------------------------------------------------------------------------------------------- banks


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.update(version=1), "field 'version' is 1, needs 2"),
        (lambda m: m["segments"][0].update(name="../texts"), "field 'segments[0].name' is '../texts', needs the form"),
        (lambda m: m["segments"][0].update(name="/etc"), "field 'segments[0].name' is '/etc', needs the form"),
    ],
)
def test_a_bank_of_another_version_or_with_path_tricks(run, models, corpus, bank, edit, message):  # noqa: F811
    rewrite(bank, edit)
    before = tree(bank.parent)
    for command in (("bank", "ask", bank, QUESTION), ("bank", "info", bank), *commands(corpus, models).values()):
        assert_refused(run(*command), "texts.bank/manifest.json: ", message)
    assert run("bank", "verify", bank)[0] == 1
    assert tree(bank.parent) == before


def test_a_chunk_that_is_truncated_flipped_or_deleted(run, bank):  # noqa: F811
    file = next(bank.glob("segment-*/rk/c/0/0/0/0"))
    data = file.read_bytes()
    for damaged, message in (
        (data[:-1], f"{len(data) - 1} bytes, needs {len(data)}"),
        (bytes([data[0] ^ 1]) + data[1:], "checksum mismatch, the file is damaged"),
        (None, "missing"),
    ):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        before = tree(bank)
        assert_refused(run("bank", "ask", bank, QUESTION), "rk/c/0/0/0/0: ", message)
        code, out, _ = run("bank", "verify", bank)
        assert code == 1 and "rk/c/0/0/0/0: " in out and message in out and "1 problem found" in out
        assert tree(bank) == before
        file.write_bytes(data)


# ---------------------------------------------------------------------------------------------- disks and processes


@pytest.mark.parametrize(
    "operation, number", [("open", errno.ENOSPC), ("replace", errno.EROFS), ("mkdir", errno.EACCES)]
)
def test_a_disk_that_says_no(run, models, corpus, made, tmp_path, monkeypatch, operation, number):  # noqa: F811
    """By hand, since the user root may write anywhere: what each step of each command gets from the system."""

    def refuse(real, writes):
        def refused(path, *arguments, **kw):
            if "texts.bank" in str(path) and writes(arguments):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **kw)

        return refused

    def attempt(command):
        with monkeypatch.context() as patch:
            if operation == "mkdir":
                patch.setattr("pathlib.Path.mkdir", refuse(Path.mkdir, lambda _: True))
            elif operation == "open":
                patch.setattr(bank_disk, "open", refuse(builtins.open, lambda a: "w" in a[0]), raising=False)
            else:
                patch.setattr("os.replace", refuse(os.replace, lambda _: True))
            return run(*command)

    def untouched(path):
        return {name: data for name, data in tree(path).items() if name != "unfinished.json"}

    for name, command in commands(corpus, models).items():
        if name == "build":
            assert_refused(attempt(command), "texts.bank", os.strerror(number))
            assert not [p for p in tmp_path.iterdir() if p.name != "texts"]
        bank = shutil.copytree(made, tmp_path / "texts.bank")
        assert run("bank", "delete", bank, "b.txt")[0] == 0  # so that there is something to compact
        before = untouched(bank)
        if (name, operation) != ("delete", "mkdir"):  # it makes none
            assert_refused(attempt(command), "texts.bank", os.strerror(number))
            assert untouched(bank) == before
        assert run(*command)[0] == 0
        shutil.rmtree(bank)


FULL_DISK = """
import json, resource, sys, contextlib, io
from memjax.cli import main
limit, *commands = json.loads(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for command in commands:
    err = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main(command)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(json.dumps([code, err.getvalue()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [60, 300, 2_000, 8_000, 11_000])  # too small for one file or another
def test_a_full_disk(run, models, corpus, made, tmp_path, limit):  # noqa: F811
    """No file may grow beyond the limit: banks, the copies of models in them, and trainings."""
    bank = shutil.copytree(made, tmp_path / "texts.bank")
    sizes = ("--steps", "2", "--dim", "16", "--layers", "1", "--context", "16", "--batch", "2", "--tokenizer", "bytes")
    tried = [
        [*map(str, commands(corpus, models)["append"])],
        [*map(str, commands(corpus, models)["build"]), "--bank", "new.bank"],
        ["train", "--data", str(corpus), "--directory", "run", *sizes],
    ]
    before = tree(bank)
    program = [sys.executable, "-c", FULL_DISK, json.dumps([limit, *tried])]
    done = subprocess.run(program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for line, name in zip(done.stdout.decode().splitlines(), ("texts.bank", "new.bank", "run/"), strict=True):
        code, err = json.loads(line)
        *noise, last = err.splitlines()
        assert code == 2 and last.startswith("error: ") and name in last and "File too large" in last, err
        assert not noise or name == "run/"  # orbax's threads
    assert tree(bank) == before and not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "new.bank" / "manifest.json").exists()
    for command in tried:  # and with room it goes on
        assert run(*command)[0] == 0
    assert run(*tried[1][:-1], "undisturbed.bank")[0] == 0
    assert tree(tmp_path / "new.bank") == tree(tmp_path / "undisturbed.bank")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {"model", "step_00000002", "metrics.jsonl", "loss.png", "tokenizer.json"}


def test_two_at_once(run, models, corpus, made, tmp_path):  # noqa: F811
    """Real processes at once: kill_bank.py."""
    for there in (False, True):
        if there:
            shutil.copytree(made, tmp_path / "texts.bank")
        new = None if there else {**read_manifest(made), "segments": [], "deleted": []}
        with Change(tmp_path / "texts.bank", new):
            for name, command in commands(corpus, models).items():
                if there or name == "build":
                    assert_refused(run(*command), "texts.bank: another process is changing this bank")
        assert (tmp_path / "texts.bank").exists() == there
