"""What a folder holds besides good text: every file is read or listed with a reason, and nothing is raised or hangs."""

import inspect
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.data import File, Skipped, read_folder, standard_library
from memjax.data.encodings import decode
from memjax.data.markup import html_text, notebook_text
from memjax.errors import DataError

GERMAN = """Die Speicher einer Sprache sind ihre Wörter, und wer sie zählt, muss zuerst wissen, was ein Wort ist.
Für die Übersetzung älterer Texte genügt das nicht: Größen, Maße und Münzen ändern ihre Bedeutung über die Jahre.
Schließlich heißt Gedächtnis nicht, alles zu behalten, sondern das Richtige wiederzufinden.
"""
RUSSIAN = "Память хранит то, что было прочитано раньше, и отвечает на вопросы о прочитанном.\n"
JAPANESE = "記憶は前に読んだものを保持し、読んだものについての質問に答えます。\n"


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
    reasons = {one.path: one.reason for one in skipped}
    assert reasons.pop("pipe", "not a regular file") == "not a regular file"
    assert reasons == {
        "big.txt": "too large: 11 bytes, over max_bytes = 10",
        "binary.bin": "binary: a NUL byte at offset 2",
        "dangling.txt": "No such file or directory",
        "empty.txt": "empty",
        "latin.txt": "encoding unknown: byte 0xe9 at offset 1 is not UTF-8, none is declared and none is certain",
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
    ("content", "reason"), [(b"ab\xe9", "byte 0xe9 at offset 2 is not UTF-8"), (b"a\0", "binary"), (b"", "empty")]
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


def test_folder_and_file_that_cannot_be_opened_are_listed(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "closed").mkdir()
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "gone.txt").write_text("x")
    scandir, listdir, opened = os.scandir, os.listdir, Path.open

    def refuse(function, *refused):
        def refusing(path=".", *args, **kw):
            if str(path).endswith(refused):
                raise FileNotFoundError(2, "") if str(path).endswith("gone.txt") else PermissionError(13, "")
            return function(path, *args, **kw)

        return refusing

    monkeypatch.setattr(os, "scandir", refuse(scandir, "closed"))  # root may open everything
    monkeypatch.setattr(os, "listdir", refuse(listdir, "closed"))
    monkeypatch.setattr(Path, "open", refuse(opened, "secret.txt", "gone.txt"))
    files, skipped = read_folder(tmp_path)
    assert files == [File("good.txt", "good")]
    assert skipped == [
        Skipped("closed", "Permission denied", unread=True),
        Skipped("gone.txt", "No such file or directory"),
        Skipped("secret.txt", "Permission denied", unread=True),
    ]
    with pytest.raises(DataError, match=r"closed: the folder holds no text file \(1 skipped, such as \.: Permission"):
        read_folder(tmp_path / "closed")


def test_file_that_grows_while_it_is_read_stays_bounded(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("x" * 100)
    (tmp_path / "good.txt").write_text("good")
    stat = Path.stat

    def small(path, **kw):
        found = stat(path, **kw)
        return os.stat_result([*found[:6], 5, *found[7:10]]) if path.name == "log.txt" else found

    monkeypatch.setattr(Path, "stat", small)
    _, skipped = read_folder(tmp_path, max_bytes=10)
    assert skipped == [Skipped("log.txt", "too large: 11 bytes, over max_bytes = 10")]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").write_text("a")
    os.symlink("../secret.txt", folder / "out.txt")
    os.symlink("../folder/a.txt", folder / "same.txt")
    files, skipped = read_folder(folder)
    assert names(files) == ["a.txt", "same.txt"]
    assert skipped == [Skipped("out.txt", "a link out of the folder")]
    assert read_folder(folder / "out.txt")[0] == [File("out.txt", "secret")]  # it was named


def test_folders_may_lie_deeper_than_the_stack(tmp_path):
    deep = tmp_path.joinpath(*"a" * 300, "deep.txt")
    deep.parent.mkdir(parents=True)
    deep.write_text("deep")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        files, _ = read_folder(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert files == [File("a/" * 300 + "deep.txt", "deep")]


def test_path_that_is_no_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_folder("a\0b")
    with pytest.raises(DataError, match=r"file/below: Not a directory"):
        read_folder(tmp_path / "file" / "below")


# ---------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be"])
def test_byte_order_mark(encoding):
    mark = "\ufeff" if encoding.endswith(("-le", "-be")) else ""
    assert decode((mark + GERMAN + JAPANESE + "😀\r\n").encode(encoding)) == GERMAN + JAPANESE + "😀\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfea",  # half a character
        b"\xff\xfe\x00\xd8a\x00",  # half a pair
        b"\xff\xfea\0\0\0b\0",  # a NUL
        b"\xff\xfe\x8f\xe0\x12\xe1",  # private characters
        b"\xef\xbb\xbf\xff",
        "a".encode("utf-16-le"),  # by its NUL
    ],
)
def test_bytes_that_only_look_like_unicode(data):
    with pytest.raises(DataError, match="^binary: "):
        decode(data)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("# -*- coding: latin-1 -*-\nname = 'é'\n", "latin-1"),
        ("#!/usr/bin/ruby\n# encoding: koi8-r\nputs 'память'\n", "koi8-r"),
        ('<?xml version="1.0" encoding="iso-8859-2"?>\n<p>żółw</p>\n', "iso-8859-2"),
        ("<meta charset=cp850>\n<p>né\n", "cp850"),
        ('<META http-equiv="Content-Type" content="text/html; charset=Shift_JIS"><p>' + JAPANESE, "cp932"),
        ('"Content-Type: text/plain; charset=mac-roman\\n"\nmsgstr "é"\n', "mac-roman"),
        ("/* vim: set fileencoding=cp437 : */ é\n", "cp437"),
        ("charset=latin-1: “quoted”, as browsers read it\n", "cp1252"),
    ],
)
def test_declared_encoding(text, encoding):
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize(
    "name", ["utf-16", "utf-8", "cp037", "unicode_escape", "base64", "rot13", "undefined", "idna", "nothing", "x" * 99]
)
def test_declared_encoding_that_cannot_be_is_no_guide(name):
    with pytest.raises(DataError, match="^encoding unknown: byte 0xe9 at offset "):
        decode(f"# coding: {name}\n# n".encode() + b"\xe9\n")


def test_utf8_is_believed_before_a_declaration():
    assert decode(f"# coding: latin-1\n{GERMAN}".encode()) == f"# coding: latin-1\n{GERMAN}"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (JAPANESE * 2, "cp932"),
        (JAPANESE * 2, "euc_jp"),
        (JAPANESE, "iso2022_jp"),
    ],
)
def test_encoding_that_is_certain(text, encoding):
    assert decode(text.encode(encoding)) == text


def test_encoding_that_is_not_certain_is_skipped():
    for data in (b"n\xe9", b"x = 1\n" * 99 + b"# Jos\xe9\n", GERMAN.encode("cp850"), RUSSIAN.encode() + b"\xff"):
        with pytest.raises(DataError, match="^encoding unknown: byte 0x.. at offset .* is not UTF-8, none is declared"):
            decode(data)


def test_control_sequences_of_terminals_are_text():
    assert decode("\x1b[1mé\x1b[0m \x1b$".encode()) == "\x1b[1mé\x1b[0m \x1b$"
    assert decode(b"\x1b$ and nothing of ISO-2022") == "\x1b$ and nothing of ISO-2022"


# ---------------------------------------------------------------------------------------------- HTML

PAGE = """<!DOCTYPE html>
<html><head><title>Caf&eacute; &amp;
  bar</title><style>p > a { color: red }</style>
<script>if (a < b) document.write("<p>no</p>");</script></head>
<body>
<!-- <p>no</p> --><h1>Two&nbsp;words</h1><p>a <b>bold</b>
   word<br>below</p><ul><li>one<li>two</ul>
<table><tr><td> 1 </td><td>2</td></tr></table>
<pre>
def f():
    return 1 &lt; 2
</pre><noscript>no</noscript><svg><title>no</title></svg>
<p title="a > b" data-x='"'>1 < 2 && 3 > 2</p>
</body></html>
"""


def test_html_is_read_as_it_is_seen(tmp_path):
    (tmp_path / "page.HTM").write_text(PAGE)
    (tmp_path / "saved").write_text(PAGE)
    (tmp_path / "page.php").write_text(PAGE)  # a source file
    (tmp_path / "plain.html").write_text("no  tags\n")
    (tmp_path / "app.html").write_text("<html><script>run()</script></html>")
    files, skipped = read_folder(tmp_path)
    seen = {
        "Café &": 2,
        "bar": 3,
        "Two words": 6,
        "a bold": 6,
        "word": 7,
        "below": 7,
        "one": 7,
        "two": 7,
        "1\t2": 8,
        "def f():": 10,
        "    return 1 < 2": 11,
        "1 < 2 && 3 > 2": 13,
    }
    text, lines = "".join(f"{line}\n" for line in seen), tuple(seen.values())
    assert files == [
        File("page.HTM", text, lines),
        File("page.php", PAGE),
        File("plain.html", "no  tags\n"),
        File("saved", text, lines),
    ]
    assert skipped == [Skipped("app.html", "empty: no text to be seen")]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a<", "a<\n"),
        ("a<b", "a\n"),
        ("a<p", "a\n"),
        ("a<!--b", "a\n"),
        ("a<!-->b", "ab\n"),
        ("a<!---->b--!>c", "ab--!>c\n"),
        ("a<![CDATA[b]]>c", "ac\n"),
        ("a</>b</3>c<?d?>e", "abce\n"),
        ("<p a='>b", ""),
        ("<p a=b'>c'", "c'\n"),
        ("<p don't>b</p><p don't>c", "b\nc\n"),
        ("<script>a", ""),
        ("<script src=a />b", "b\n"),
        ("<title>a<p>b</title>c</title><title>d</title>", "a<p>b\nc\n"),
        ("</pre></td></script>a", "a\n"),
        ("<pre>a&#10;b&#13;c&#0;d", "a b c�d\n"),
        ("&#xD800;&bogus;&lt", "�&bogus;<\n"),
        ("<div>" * 3000 + "deep", "deep\n"),
    ],
)
def test_malformed_html(source, text):
    assert html_text(source).text == text


markup = st.sampled_from(
    "< > </ <! <!-- --> - / = ' \" & &#0; &amp; \n \r \x0b a é p pre td title script svg".split(" ")
)


@given(st.lists(markup | st.just("\n"), max_size=60).map("".join))
def test_html_lines_are_lines_of_the_source(source):
    text, lines = html_text(source)
    assert len(lines) == text.count("\n") == len(text.split("\n")) - 1
    assert list(lines) == sorted(lines)
    assert all(1 <= line <= source.count("\n") + 1 for line in lines)


@pytest.mark.parametrize(
    "unit", ["<a ", "<a\n", "<a/", "<a b='", "<!--", "</", "<?", "<![", "<div>", "<title>", "&", "\n"]
)
def test_hostile_html_takes_linear_time(unit):
    html_text(unit * (300_000 // len(unit)))  # hours, where every unit is a scan to the end


# ---------------------------------------------------------------------------------------------- notebooks


def notebook(*sources, **kw):
    cells = [{"cell_type": "code", "outputs": [{"text": "dropped\n"}], "source": source} for source in sources]
    return json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}, indent=1, **kw)


def test_notebook_is_read_as_its_cells_sources(tmp_path):
    source = notebook(["# Title\n", "some *text*\n", "\n"], ["x = 1\n", "y = 'é'"], [], "print(x)\nprint(y)")
    (tmp_path / "a.ipynb").write_text(source)
    files, _ = read_folder(tmp_path)
    wanted = ["# Title", "some *text*", "", "", "", "x = 1", "y = 'é'", "", "print(x)", "print(y)"]
    assert files[0].text == "".join(f"{line}\n" for line in wanted)
    rows = source.split("\n")
    for line, number in zip(wanted, files[0].lines, strict=True):
        assert line.replace("é", "\\u00e9") in rows[number - 1]


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "{}", '{"cells": 1}', '{"cells": [1]}', '{"cells": [{}]}', "[" * 100_000, "not JSON"]
    + ['{"cells": [{"source": [1]}]}', '{"cells": [{"source": {"a": "b"}}]}', '{"cells": [{"source": null}]}'],
)
def test_what_is_no_notebook_is_plain_text(text, tmp_path):
    (tmp_path / "a.ipynb").write_text(text)
    assert notebook_text(text) is None
    assert read_folder(tmp_path)[0] == [File("a.ipynb", text)]


def test_notebook_with_characters_that_are_no_text(tmp_path):
    (tmp_path / "a.ipynb").write_text(notebook("a\0b\ud800c"))
    assert read_folder(tmp_path)[0][0].text == "a\ufffdb\ufffdc\n"
    (tmp_path / "a.ipynb").write_text(notebook([]))
    with pytest.raises(DataError, match="empty: no text to be seen"):
        read_folder(tmp_path / "a.ipynb")


# ---------------------------------------------------------------------------------------------- PDF


def pdf(*pages, root=b""):
    """A PDF with a page for each stream of drawing commands."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        root or b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(pages), kids),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, commands in enumerate(pages):
        about = b"/Parent 2 0 R /MediaBox [0 0 99 99] /Resources << /Font << /F 3 0 R >> >> /Contents %d 0 R" % (
            5 + 2 * i
        )
        objects += [b"<< /Type /Page %s >>" % about]
        objects += [b"<< /Length %d >>\nstream\n%s\nendstream" % (len(commands), commands)]
    data, offsets = b"%PDF-1.4\n", []
    for i, one in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (i, one)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    trailer = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    return data + head + table + trailer


def page(*lines):
    return b"BT /F 9 Tf 9 90 Td " + b" ".join(b"(%s) Tj 0 -9 Td" % line for line in lines) + b" ET"


def test_pdf_is_read_by_pages(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "a.PDF").write_bytes(pdf(page(b"Hello", b"world"), b"", page(b"third page")))
    files, skipped = read_folder(tmp_path)
    assert files == [File("a.PDF", "Hello\nworld\n\nthird page\n", (1, 1, 1, 3))] and skipped == []


def test_pdf_that_cannot_be_read_says_why(tmp_path, capfd):
    pypdf = pytest.importorskip("pypdf")
    good = pdf(page(b"Hello"))
    writer, encrypted = pypdf.PdfWriter(clone_from=io.BytesIO(good)), io.BytesIO()
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(encrypted)
    for name, data in {
        "broken.pdf": good[:300],
        "cyclic.pdf": pdf(page(b"Hello"), root=b"<< /Type /Pages /Count 1 /Kids [2 0 R] >>"),
        "empty.pdf": b"",
        "encrypted.pdf": encrypted.getvalue(),
        "picture.pdf": pdf(b"9 9 m 20 20 l S"),
        "none.pdf": b"text",
        "unnamed": good,
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    files, skipped = read_folder(tmp_path)
    assert names(files) == ["good.txt"]
    reasons = {one.path: one.reason for one in skipped}
    for name in ("broken", "cyclic", "empty", "none"):
        assert reasons.pop(f"{name}.pdf").startswith("PDF: broken, ")
    assert reasons == {
        "encrypted.pdf": "PDF: encrypted",
        "picture.pdf": "PDF: holds no text, perhaps pictures of pages",
        "unnamed": "PDF: needs a name that ends in .pdf",
    }
    assert capfd.readouterr() == ("", "")  # pypdf's own warnings


def test_pdf_that_unpacks_to_too_much_is_skipped(tmp_path):
    pytest.importorskip("pypdf")
    kids = b"<< /Type /Pages /Count 500 /Kids [%s] >>" % (b"4 0 R " * 500)
    (tmp_path / "bomb.pdf").write_bytes(pdf(page(b"Hello" * 40), root=kids))
    with pytest.raises(DataError, match="PDF: too large, it unpacks to more than 40000 characters by page "):
        read_folder(tmp_path / "bomb.pdf", max_bytes=10_000)
    assert len(read_folder(tmp_path / "bomb.pdf")[0][0].text) == 500 * 202 - 1


def test_pdf_without_the_extra_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "a.pdf").write_bytes(pdf(page(b"Hello")))
    with pytest.raises(DataError, match=r"a\.pdf: can't be used as text: PDF: .*pip install 'memjax\[pdf\]'"):
        read_folder(tmp_path / "a.pdf")


# ---------------------------------------------------------------------------------------------- anything

starts = st.sampled_from([b"", b"%PDF-1.4\n", b"<!doctype html>", b"\xff\xfe", b"\x1b$B", b"# coding: cp1252\n", b"{"])
content = (
    st.binary(max_size=80)
    | st.text(max_size=40).map(str.encode)
    | st.text(st.characters(), max_size=9).map(json.dumps).map(str.encode)
)
endings = st.sampled_from(["", ".txt", ".py", ".html", ".pdf", ".ipynb"])


@given(starts, content, endings)
def test_any_bytes_are_a_text_or_skipped(tmp_path_factory, start, content, ending):
    folder = tmp_path_factory.mktemp("any")
    (folder / "good.txt").write_text("good")
    (folder / f"any{ending}").write_bytes(start + content)
    files, skipped = read_folder(folder)
    assert len(files) + len(skipped) == 2
    for file in files:
        assert "\0" not in file.text and file.text.strip()
        file.text.encode()
        assert file.lines is None or len(file.lines) == file.text.count("\n")
    for one in skipped:
        assert one.path == f"any{ending}" and one.reason
