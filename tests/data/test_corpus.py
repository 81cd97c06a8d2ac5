import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.data import ByteTokenizer, Document, File, cut, train_bpe
from memjax.errors import DataError

BYTES = ByteTokenizer()
BPE = train_bpe(["def f(x):\n    return x\n\n\n"] * 10, vocab_size=300)  # has tokens that span lines: "\n   "


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
        text = next(file.text for file in files if file.path == document.path)
        cited = "\n".join(text.split("\n")[document.first_line - 1 : document.last_line])
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


@pytest.mark.parametrize("align", ["lines", "tokens"])
def test_lines_of_an_extracted_text_are_those_of_its_source(align):
    text = "ab\ncd\nef\ngh\n"
    for path, cited in (("a.html", ["a.html:2-7", "a.html:9"]), ("a.PDF", ["a.PDF, pages 2-7", "a.PDF, page 9"])):
        documents = cut([File("x", "x\nyyyy\n"), File(path, text, (2, 7, 9, 9))], BYTES, 6, align=align)
        found = [documents.document(i, BYTES) for i in range(len(documents.ids))]
        assert [d.citation for d in found if d.path == path] == cited
        assert "".join(d.text for d in found if d.path == path) == text


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
