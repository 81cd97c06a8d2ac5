"""The second day of a bank, as a user types it: a folder changes, the bank follows."""

import errno
import os
from pathlib import Path

import pytest

from memjax.in_storage.bank_files import open_bank
from memjax.lm import pooling
from tests.cli.test_cli import QUESTION, assert_refused, corpus, models, run  # noqa: F401
from tests.in_storage.test_bank_files import tree
from tests.lm import tiny


@pytest.fixture
def built(run, models, corpus, tmp_path):  # noqa: F811
    assert run("bank", "build", corpus, "--model", models / "m0")[0] == 0
    return tmp_path / "texts.bank"


def living(bank):
    opened = open_bank(bank)
    return sorted({opened.documents.path[i] for i in opened.living()})


def test_build_again_is_an_update(run, built, corpus, monkeypatch):  # noqa: F811
    before = tree(built)
    with monkeypatch.context() as patch:
        patch.setattr(pooling, "pool_documents", None)  # nothing is read, nothing compiled
        code, out, _ = run("bank", "build", corpus)
    assert code == 0 and "nothing to do: 3 files unchanged" in out and tree(built) == before

    (corpus / "a.txt").write_text("The red house has number 1234567.\nIt was painted blue.\n")
    (corpus / "b.md").unlink()
    (corpus / "new.txt").write_text("A fourth text.\n")
    code, out, err = run("bank", "build", corpus)
    assert (code, err) == (0, "")
    assert "files: 1 new, 1 changed, 1 removed, 1 unchanged; 2 documents read" in out
    assert "changed a.txt" in out and "removed b.md" in out
    assert living(built) == ["a.txt", "new.txt", "sub/c.txt"]
    code, out, _ = run("bank", "ask", built, QUESTION, "--passages", 3)
    assert code == 0 and "painted blue" in out and "stands alone" not in out and "b.md" not in out
    out = run("bank", "info", built)[1]
    assert "3 of 3 files (2 deleted)" in out and "segments: 2" in out


def test_append_delete_compact_verify(run, built, corpus, tmp_path):  # noqa: F811
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "d.txt").write_text("Something else.\n")
    (extra / "b.md").write_text("Nothing to see.\nWalk on.\n")
    one = tmp_path / "one.txt"
    one.write_text("A single file.\n")
    code, out, err = run("bank", "append", built, extra, one)
    assert (code, err) == (0, "") and "files: 2 new, 1 unchanged; 2 documents read" in out
    assert "nothing to do: 3 files unchanged" in run("bank", "append", built, extra, one)[1]
    assert "nothing to do: 3 files unchanged" in run("bank", "build", corpus)[1]  # which leaves what was appended
    one.write_text("A single file, rewritten.\n")
    assert "files: 1 changed; 1 document read" in run("bank", "append", built, one)[1]

    code, out, _ = run("bank", "delete", built, "sub", "d.*")
    assert code == 0 and "deleted 2 documents of 2 files" in out
    assert "nothing to do, all of it is deleted" in run("bank", "delete", built, "sub", "d.*")[1]
    asked = lambda: run("bank", "ask", built, QUESTION, "--passages", 9)[1].split("read from\n")[1].rsplit("\n", 2)[0]  # noqa: E731
    before = asked()
    assert "one.txt" in before and "sub/c.txt" not in before and "d.txt" not in before
    code, out, _ = run("bank", "compact", built)
    assert code == 0 and "3 documents kept, 3 dropped, 3 segments became one" in out
    assert asked() == before
    assert "nothing to do, one segment" in run("bank", "compact", built)[1]

    code, out, _ = run("bank", "verify", built)
    assert code == 0 and "texts.bank: whole, 3 documents" in out
    file = next(built.glob("segment-*/k/c/0/0/0/0"))
    file.write_bytes(file.read_bytes()[:-1])
    code, out, _ = run("bank", "verify", built)
    assert code == 1 and "k/c/0/0/0/0: " in out and "1 problem found" in out


def test_delete_by_number(run, built):  # noqa: F811
    code, out, _ = run("bank", "delete", built, "--document", 1)
    assert code == 0 and "deleted 1 document" in out and living(built) == ["a.txt", "sub/c.txt"]
    assert_refused(run("bank", "delete", built, "--document", 3), "no document 3; the bank has 3")


def test_refused(run, models, built, corpus, tmp_path):  # noqa: F811
    assert_refused(run("bank", "delete", built), "names nothing to delete")
    assert_refused(run("bank", "delete", built, "z.txt"), "none of its 3 files is 'z.txt'")
    assert_refused(run("bank", "delete", built, "a.txt", "--document", 1), "either paths or numbers")
    assert_refused(run("bank", "append", built, tmp_path / "nowhere"), "there is no such file or folder")
    assert_refused(run("bank", "append", built, corpus, corpus / "a.txt"), "two have the path 'a.txt'")
    assert_refused(run("bank", "append", tmp_path / "none.bank", corpus), "none.bank", "manifest.json")
    assert_refused(run("bank", "append", built, corpus, "--model", models / "m1"), "was built with model")
    assert_refused(run("bank", "build", corpus, "--model", models / "m1"), "was built with model", "overwrite")
    assert_refused(run("bank", "build", corpus, "--bank", corpus, "--model", models / "m0"), "exists and is no bank")
    assert run("bank", "verify", tmp_path / "none.bank")[0] == 1


def test_overwrite_with_another_model_brings_its_copy(run, models, built, corpus):  # noqa: F811
    assert run("bank", "build", corpus, "--model", models / "m1", "--overwrite")[0] == 0
    assert sorted(p.name for p in built.iterdir()) == ["manifest.json", "model", "segment-00000001"]
    assert run("bank", "ask", built, QUESTION)[0] == 0


def test_overwrite_of_a_bank_of_another_version_needs_no_model_named(run, built, corpus):  # noqa: F811
    manifest = built / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    assert_refused(run("bank", "build", corpus), "manifest.json: field 'version' is 1, needs 2")
    assert run("bank", "build", corpus, "--overwrite")[0] == 0
    assert run("bank", "verify", built)[0] == 0


def test_banks_are_no_texts_wherever_they_lie(run, built, corpus, tmp_path):  # noqa: F811
    inside = corpus / "sub" / "old.bank"
    built.rename(inside)
    assert run("bank", "build", corpus)[0] == 0
    assert living(built) == ["a.txt", "b.md", "sub/c.txt"]
    (corpus / "d.txt").write_text("One more.\n")
    assert run("bank", "append", built, corpus)[0] == 0
    assert living(built) == ["a.txt", "b.md", "d.txt", "sub/c.txt"]
    (tmp_path / "only").mkdir()
    inside.rename(tmp_path / "only" / "a.bank")
    before = tree(built)
    refused = run("bank", "build", tmp_path / "only", "--bank", built)
    assert_refused(refused, "only: the folder holds no text file but in a bank")
    assert tree(built) == before


def test_a_file_that_can_not_be_read_today_stays(run, built, corpus, monkeypatch):  # noqa: F811
    opened = Path.open

    def closed(self, *args, **options):
        if self == corpus / "b.md":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", closed)
    code, out, _ = run("bank", "build", corpus)
    assert code == 0 and "skipped 1 file" in out and "nothing to do" in out
    assert living(built) == ["a.txt", "b.md", "sub/c.txt"]


def test_names_in_brackets_are_printed_as_they_are(run, models, corpus):  # noqa: F811
    folder = corpus.rename(corpus.parent / "[draft] x[/y]".replace("/", "|"))
    code, out, _ = run("bank", "build", folder, "--model", models / "m0", "--bank", "[bold] b.bank")
    assert code == 0 and "characters from " in out and str(folder) in out and "ask [bold] b.bank" in out
    assert "[bold] b.bank" in run("bank", "verify", "[bold] b.bank")[1]


def test_nothing_left_to_ask(run, built):  # noqa: F811
    assert run("bank", "delete", built, "*")[0] == 0
    for command in ("ask", "serve"):
        refused = run("bank", command, built, *([QUESTION] if command == "ask" else ["--port", 0]))
        assert_refused(refused, "every document is deleted, so there is nothing to ask")


def test_an_interrupted_build_goes_on(run, models, corpus, monkeypatch, tmp_path):  # noqa: F811
    from memjax.in_storage import bank_change

    monkeypatch.setattr(bank_change, "SEGMENT", 16)
    text = "".join(f"line {i} of a text that is long enough for a document\n" for i in range(16))
    (corpus / "long.txt").write_text(text)
    pool, calls = pooling.pool_documents, iter([False, False, False, True])

    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return pool(*args)

    build = ("bank", "build", corpus, "--model", models / "m0")
    with monkeypatch.context() as patch:
        patch.setattr(pooling, "pool_documents", interrupted)
        code, _, err = run(*build)
    assert code == 130
    assert "interrupted; no bank was written; the same command goes on behind 8 documents that were read" in err
    assert_refused(run("bank", "ask", "texts.bank", QUESTION), "texts.bank: unfinished; the command that began it")
    code, out, _ = run(*build)
    assert code == 0 and "11 documents read, 8 documents of an interrupted run" in out
    assert run(*build, "--bank", "again.bank")[0] == 0
    assert tree(tmp_path / "texts.bank") == tree(tmp_path / "again.bank")
    assert tiny.READING.document_tokens == open_bank("texts.bank").manifest["document_tokens"]
