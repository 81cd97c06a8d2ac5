import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.data import ByteTokenizer, Document, File, Skipped, cut, read_folder, standard_library, train_bpe
from memjax.errors import DataError

BYTES = ByteTokenizer()
BPE = train_bpe(["def f(x):\n    return x\n\n\n"] * 10, vocab_size=300)  # has tokens that span lines: "\n   "


def names(found):
    return [item.path for item in found]


def test_folder_is_read_in_order_with_line_ends_kept(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"b/z.txt": "zé\r\n", "b/a.txt": "a", "c.md": "c\n", "b.txt": "\ufeffmark"}.items():
        (tmp_path / name).write_bytes(text.encode())
    files, skipped = read_folder(tmp_path)
    assert files == [File("b.txt", "mark"), File("b/a.txt", "a"), File("b/z.txt", "zé\r\n"), File("c.md", "c\n")]
    assert skipped == []
    assert names(read_folder(str(tmp_path), extensions=(".md", "z.txt"[1:]))[0]) == [
        "b.txt",
        "b/a.txt",
        "b/z.txt",
        "c.md",
    ]
    assert names(read_folder(tmp_path, extensions=(".md",))[0]) == ["c.md"]


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "binary.bin").write_bytes(b"ab\0c")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "big.txt").write_text("x" * 11)
    (tmp_path / "empty.txt").write_text(" \n")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.txt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    files, skipped = read_folder(tmp_path, max_bytes=10)
    assert names(files) == ["good.txt"]
    reasons = dict(skipped)
    assert reasons.pop("pipe", "not a regular file") == "not a regular file"
    assert reasons == {
        "big.txt": "11 bytes, over max_bytes = 10",
        "binary.bin": "binary: a NUL byte at offset 2",
        "dangling.txt": "No such file or directory",
        "empty.txt": "empty",
        "latin.txt": "not UTF-8: byte 0xe9 at offset 1",
    }


def test_hidden_and_generated_entries_are_passed_over(tmp_path):
    for name in (".git", ".venv", "__pycache__", "node_modules", "sub/.cache"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text("x")
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / "sub" / "y.txt").write_text("y")
    files, skipped = read_folder(tmp_path)
    assert names(files) == ["sub/y.txt"] and skipped == []
    # What is named itself is read, hidden or not.
    assert names(read_folder(tmp_path / ".git")[0]) == ["x.txt"]
    assert read_folder(tmp_path / ".env") == ([File(".env", "SECRET=1")], [])


def test_links_form_no_loops(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    os.symlink(tmp_path, tmp_path / "sub" / "up")
    os.symlink(tmp_path / "a.txt", tmp_path / "sub" / "same.txt")
    os.symlink("me", tmp_path / "me")
    os.symlink(tmp_path, tmp_path / "sub" / ".hidden")
    files, skipped = read_folder(tmp_path)
    assert names(files) == ["a.txt", "sub/same.txt"]
    assert names(skipped) == ["me", "sub/up"]
    assert skipped[1] == Skipped("sub/up", "a link to a folder")
    os.symlink(tmp_path, tmp_path.parent / f"{tmp_path.name}-link")
    assert names(read_folder(tmp_path.parent / f"{tmp_path.name}-link")[0]) == ["a.txt", "sub/same.txt"]


def test_paths_with_odd_names(tmp_path, monkeypatch):
    odd = ["a b.txt", "line\nbreak.txt", "é😀.txt", "~", "-rf", "%s"]
    for name in odd:
        (tmp_path / name).write_text(name)
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("x")
    files, skipped = read_folder(tmp_path)
    assert sorted(names(files)) == sorted(odd)
    assert skipped == [Skipped("\\xff.txt", "its name is not UTF-8")]
    monkeypatch.chdir(tmp_path)
    assert read_folder(".") == (files, skipped)
    assert read_folder(tmp_path / ".." / tmp_path.name) == (files, skipped)


@pytest.mark.parametrize("content", [None, b"\0", b"\xe9", b""])
def test_folder_without_text_is_refused_by_name(content, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    if content is not None:
        (folder / "file.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"corpus: the folder holds no text file"):
        read_folder(folder)
    with pytest.raises(DataError, match=r"with extension \.py or \.md \(0 skipped\)"):
        read_folder(folder, extensions=(".py", ".md"))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"ab\xe9", "not UTF-8: byte 0xe9 at offset 2"), (b"a\0", "binary"), (b"", "empty")]
)
def test_unusable_file_that_was_named_is_refused(content, reason, tmp_path):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"file\.txt: .*{reason}"):
        read_folder(tmp_path / "file.txt")


def test_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        read_folder(tmp_path / "nowhere")
    for extensions in ((), ("py",)):
        with pytest.raises(ValueError, match="extensions must be endings that begin with a dot"):
            read_folder(tmp_path, extensions=extensions)


def test_standard_library_is_sorted_and_the_same_every_time():
    files = standard_library()
    found = names(files)
    modules = [name for name in found if name.endswith(".py")]
    topics = [name for name in found if name.startswith("pydoc_data/topics/")]
    assert found == modules + topics and modules == sorted(modules) and topics == sorted(topics)
    assert len(set(found)) == len(found)
    assert {"argparse.py", "asyncio/tasks.py", "pydoc_data/topics/lambda.txt"} <= set(found)
    assert not any(part in ("test", "tests", "site-packages") for name in found for part in name.split("/"))
    assert not any(name.startswith(("_sysconfigdata", "sitecustomize")) for name in found)
    assert standard_library() == files


lines = st.lists(st.text(st.sampled_from("ab 1é\t😀"), max_size=12), max_size=12)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(texts=st.lists(lines.map("\n".join), min_size=1, max_size=3), length=st.integers(1, 30))
def test_documents_are_the_lines_they_cite(tokenizer, texts, length):
    files = [File(f"{i}.txt", f"{i}" + text) for i, text in enumerate(texts)]
    documents = cut(files, tokenizer, length)
    assert documents.lengths.min() >= 1 and documents.lengths.max() <= length
    rows = {documents.ids[i, :n].tobytes() for i, n in enumerate(documents.lengths)}
    assert len(rows) == len(documents.ids)  # distinct
    for i, n in enumerate(documents.lengths):
        assert (documents.ids[i, n:] == 0).all()
        document = documents.document(i, tokenizer)
        cited = "\n".join(dict(files)[document.path].split("\n")[document.first_line - 1 : document.last_line])
        if document.first_line < document.last_line:
            assert document.text.removesuffix("\n") == cited
            np.testing.assert_array_equal(documents.ids[i, :n], tokenizer.encode(document.text))
        else:  # a line, or a piece of one, where a cut through a character leaves U+FFFD
            assert document.text.strip("\n\ufffd") in cited


@given(text=st.text(st.sampled_from("ab 1\n"), max_size=80), length=st.integers(90, 200))
def test_documents_of_one_file_cover_it(text, length):
    numbered = "".join(f"{i}:{line}\n" for i, line in enumerate(text.split("\n")))  # no two lines are equal
    documents = cut([File("a", numbered)], BYTES, length)
    assert "".join(documents.document(i, BYTES).text for i in range(len(documents.ids))) == numbered
    assert documents.tokens == len(numbered.encode())
    borders = list(zip(documents.first_line[1:], documents.last_line[:-1], strict=True))
    assert documents.first_line[0] == 1 and documents.last_line[-1] == numbered.count("\n")
    assert all(first - last in (0, 1) for first, last in borders)


def test_long_line_is_cut_hard():
    documents = cut([File("a", "1\n234567\n89\n")], BYTES, 4)
    cited = [documents.document(i, BYTES) for i in range(4)]
    assert cited == [
        Document("a", 1, 1, "1\n"),
        Document("a", 2, 2, "2345"),
        Document("a", 2, 2, "67\n"),
        Document("a", 3, 3, "89\n"),
    ]
    assert cited[0].citation == "a:1" and cut([File("a", "1\n2\n")], BYTES, 4).document(0, BYTES).citation == "a:1-2"


def test_lines_that_grow_when_joined_still_fit():
    class Growing(ByteTokenizer):  # one byte more for each newline inside
        def encode(self, text):
            return super().encode(text + "+" * text.removesuffix("\n").count("\n"))

    documents = cut([File("a", "12\n34\n56\n78\n")], Growing(), 12)
    assert documents.lengths.tolist() == [7, 7]
    assert documents.first_line.tolist() == [1, 3] and documents.last_line.tolist() == [2, 4]


def test_duplicates_are_dropped_and_the_first_is_kept():
    documents = cut([File("a", "x = 1\n"), File("b", "y\n"), File("c", "x = 1\n"), File("d", "y")], BYTES, 8)
    assert documents.path_index.tolist() == [0, 1, 3]
    assert documents.paths == ("a", "b", "c", "d")


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(text=lines.map("\n".join), length=st.integers(1, 8))
def test_full_documents_cite_every_line_they_touch(tokenizer, text, length):
    text = "".join(f"{i}:{line}\n" for i, line in enumerate(text.split("\n"))) + "enough to be one document"
    documents = cut([File("a", text)], tokenizer, length, align="tokens")
    assert (documents.lengths == length).all()
    ids = tokenizer.encode(text)
    expected = {}
    for start in range(0, len(ids) - length + 1, length):
        before, through = tokenizer.decode(ids[:start]), tokenizer.decode(ids[: start + length])
        where = (1 + before.count("\n"), 1 + through.removesuffix("\n").count("\n"))
        expected.setdefault(tuple(ids[start : start + length]), where)
    found = zip(documents.ids, documents.first_line, documents.last_line, strict=True)
    assert {tuple(row): (first, last) for row, first, last in found} == expected


def test_nothing_to_cut_is_refused():
    for files, align in (([], "lines"), ([File("a", "")], "lines"), ([File("a", "abc")], "tokens")):
        with pytest.raises(DataError, match=f"{len(files)} files give no document of 4 tokens"):
            cut(files, BYTES, 4, align=align)
    with pytest.raises(ValueError, match="tokens_per_document must be at least 1, got 0"):
        cut([File("a", "a")], BYTES, 0)
