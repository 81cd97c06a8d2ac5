"""Files of unpacked packages become folders of text."""

import gzip

import pytest

from experiments import corpora


def test_files_are_unpacked_and_links_left_out(tmp_path):
    pages = tmp_path / "root" / "usr" / "man" / "man3"
    pages.mkdir(parents=True)
    (pages / "queue.3.gz").write_bytes(gzip.compress(b"a page"))
    (pages / "LIST_ENTRY.3.gz").symlink_to("queue.3.gz")
    (pages / "plain.txt").write_bytes(b"no page")
    corpora.copy(tmp_path / "root", "usr/man/man*/*.gz", tmp_path / "out")
    assert {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")} == {
        "man3/queue.3": b"a page"
    }


def test_a_dictionary_with_a_stray_byte_is_text_all_the_same(tmp_path):
    (tmp_path / "root" / "dictd").mkdir(parents=True)
    (tmp_path / "root" / "dictd" / "x.dict.dz").write_bytes(gzip.compress("caf\u00e9 ".encode() + b"\x92s"))
    corpora.copy(tmp_path / "root", "dictd/*.dict.dz", tmp_path / "out")
    assert (tmp_path / "out" / "x.dict").read_text("utf-8") == "caf\u00e9 \ufffds"


def test_a_corpus_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "train" / "kjv").mkdir(parents=True)
    (tmp_path / "train" / "kjv" / "mine.txt").write_text("kept")
    assert corpora.make("kjv", tmp_path) == 1


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="there is no 'bible', only python_docs, kjv"):
        corpora.main(corpora.Config(names=("bible",)))
