"""`verify` reads everything and lists all that is wrong, each with its file."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from memjax.in_storage import bank_change
from memjax.in_storage.bank_files import append_documents, delete_documents, verify
from tests.in_storage.test_bank_change import stop_in_the_middle
from tests.in_storage.test_bank_files import block, rewrite, shard, write


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("bank") / "b")
    append_documents(path, [block([9], 8, "last.txt")])
    delete_documents(path, [1])
    return path


@pytest.fixture
def bank(made, tmp_path):
    return shutil.copytree(made, tmp_path / "b")


def flip(file, at=3):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    return file


def test_a_whole_bank(made):
    read = []
    found = verify(made, read.append)
    assert (found.problems, found.leftovers, found.documents) == ([], [], 7)
    vectors = 2 * 31 * 2 * 8 * 2 * 3
    assert found.bytes == sum(read) == vectors + 2 * sum(4 * n - 1 for n in (3, 1, 7, 2, 5, 4, 9))


@pytest.mark.parametrize("name", ["rk", "k", "v", "ids"])
@pytest.mark.parametrize("at", [3, -3])
def test_a_flipped_bit(bank, name, at):
    file = flip(shard(bank, name), at)
    problems = verify(bank).problems
    assert problems == [f"{file}: checksum mismatch, the file is damaged"]


def test_everything_that_is_wrong_is_listed(bank):
    lost = shard(bank, "k")
    lost.unlink()
    short = shard(bank, "v")
    short.write_bytes(short.read_bytes()[:-1])
    flipped = flip(shard(bank, "ids"))
    problems = verify(bank).problems
    for file, words in ((lost, "missing"), (short, f"{short.stat().st_size} bytes, needs"), (flipped, "checksum")):
        assert [p for p in problems if p.startswith(f"{file}: ") and words in p], problems
    assert len(problems) == 3 and all("\n" not in p for p in problems)


def test_metadata_that_only_other_readers_need(bank):
    file = bank / "segment-00000000" / "v" / "zarr.json"
    text = file.read_text()
    assert text.count('"fill_value":0') == 1
    file.write_text(text.replace('"fill_value":0', '"fill_value":1'))
    assert verify(bank).problems == [f"{file}: damaged, does not describe this array"]
    file.write_text("{" + text[1:-1] + "{")
    assert verify(bank).problems == [f"{file}: damaged, does not describe this array"]


def test_a_damaged_table_hides_no_other_segment(bank):
    flip(bank / "segment-00000000" / "table.json")
    file = flip(next((bank / "segment-00000001" / "rk" / "c").rglob("0/0/0/0")))
    first, second = verify(bank).problems
    assert "segment-00000000/table.json: its checksum" in first and second.startswith(f"{file}: checksum mismatch")


def test_ids_and_numbers_that_the_checksums_of_chunks_do_not_cover(bank):
    file = bank / "segment-00000001" / "table.json"
    table = json.loads(file.read_bytes())
    table["sha256"] = ["0" * 64]
    file.write_text(json.dumps(table))
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    rewrite(bank, lambda m: m["segments"][1].update(table_sha256=sha))
    (problem,) = verify(bank).problems
    assert problem == f"{bank / 'segment-00000001'}: field 'sha256' of its document 0 does not match its token ids"


def test_no_bank(tmp_path, bank):
    (problem,) = verify(tmp_path / "nothing").problems
    assert problem.endswith("manifest.json: No such file or directory")
    flip(bank / "manifest.json", 40)
    assert len(verify(bank).problems) == 1


def test_leftovers_are_no_problem(bank, tmp_path, monkeypatch):
    (bank / "segment-00000002").mkdir()
    (bank / "manifest.json.partial-77").write_text("{")
    (bank / "notes.txt").write_text("mine")
    found = verify(bank)
    assert not found.problems and len(found.leftovers) == 2 and all("killed" in n for n in found.leftovers)
    append_documents(bank, [block([1], 9, "x.txt")])
    assert not verify(bank).leftovers and (bank / "notes.txt").exists()
    monkeypatch.setattr(bank_change, "SEGMENT", 8)
    stop_in_the_middle(tmp_path / "c")
    assert "unfinished" in verify(tmp_path / "c").problems[0]


def test_numbers_that_are_none(tmp_path, monkeypatch):
    """NaN is refused at writing; verify does not rely on it."""
    from memjax.in_storage import bank_segment

    monkeypatch.setattr(bank_segment, "check_block", lambda *_: None)
    bad = block([3])
    path = write(tmp_path / "b", [bad._replace(v=np.full_like(bad.v, np.nan))])
    assert [p.split(": ")[1] for p in verify(path).problems] == [
        "holds NaN or infinity in layer 0",
        "holds NaN or infinity in layer 1",
    ]
