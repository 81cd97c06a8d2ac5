"""Appending, deleting, sharing and compacting: what is done to some documents changes no bit of the answers of others,
and what is deleted is never found again."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.errors import BankError
from memjax.in_storage import bank as banks
from memjax.in_storage import bank_edit
from memjax.in_storage.bank_files import (
    Change,
    Source,
    append_documents,
    compact,
    delete_documents,
    delete_files,
    open_bank,
)
from tests.in_storage.test_bank_files import BLOCKS, LAYERS, D, H, block, tree, use_all, write


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def found(opened, location="host"):
    """All that a search says: for every document its ids' hash, its citation and the bits of its scores and vectors.

    Asked are all documents at once, so that none can hide behind another.
    """
    bank, table = opened.bank, opened.documents
    if location != "disk":
        bank = banks.reserve(bank, 64, 32)  # one shape, compiled once
    rng = np.random.default_rng(5)
    queries, routes = jnp.asarray(rng.standard_normal((2, 3, H, D)), jnp.float32), jnp.ones((2, 3), bool)
    out = {}
    for layer in range(LAYERS):
        scores, documents = banks.route(bank, layer, queries, routes, top_k=32)
        for row in range(2):
            for score, document in zip(np.asarray(scores)[row], np.asarray(documents)[row], strict=True):
                if document >= 0:
                    out.setdefault(int(document), []).append((layer, row, score.tobytes()))
    answers = {}
    for document, scores in out.items():
        k, v, mask, _ = banks.read(bank, 0, np.array([[document]]), 16)
        assert mask.sum() == bank.doc_len[document]
        name = (table.sha256[document], table.path[document], int(table.first_line[document]))
        answers[name] = (scores, np.asarray(k).tobytes(), np.asarray(v).tobytes(), opened.token_ids(document).tolist())
    assert len(answers) == len(out)
    return answers


MORE = [block([6], 3, "c.txt"), block([2, 2], 4, "sub/d.txt")]


@pytest.mark.parametrize("location", [pytest.param("disk", marks=pytest.mark.slow), "host", "device"])
def test_append_then_delete_leaves_every_bit_of_the_others(tmp_path, location):
    path = write(tmp_path / "b")
    alone = found(open_bank(path, location=location), location)
    append_documents(path, MORE)
    both = found(open_bank(path, location=location), location)
    assert len(both) == 9 and {n: both[n] for n in alone} == alone
    assert delete_files(path, ["c.txt", "sub/*"]) == (2, 3)
    assert found(open_bank(path, location=location), location) == alone
    compact(path)
    opened = open_bank(path, location=location)
    assert found(opened, location) == alone and len(opened.documents.path) == 6
    append_documents(path, MORE)
    assert found(open_bank(path, location=location), location) == both


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(["append", "delete", "compact", "share"]), st.integers(0, 30)), max_size=6))
def test_any_history_gives_the_answers_of_what_lives(tmp_path_factory, history):
    """Against a list of documents: whatever was done, what lives is found with the bits it has in a bank of its own."""
    path = write(tmp_path_factory.mktemp("history") / "b", BLOCKS[:2])
    lives = {(b, i): None for b in (0, 1) for i in range(len(BLOCKS[b].doc_len))}
    every, number = [*BLOCKS[:2]], 2
    rows = list(lives)
    for what, n in history:
        if what == "append":
            every.append(block([1 + n % 5], 100 + number, f"{number}.txt"))
            append_documents(path, [every[-1]])
            rows.append((number, 0))
            number += 1
        elif what == "delete" and len([r for r in rows if r]) > 1:
            document = [i for i, r in enumerate(rows) if r][n % len([r for r in rows if r])]
            assert delete_documents(path, [document]) == 1
            rows[document] = None
        elif what == "compact":
            opened = open_bank(path)
            at_once = {opened.documents.sha256[i] for i in opened.living()}
            compact(path)
            opened = open_bank(path)
            assert set(opened.documents.sha256) == at_once and not opened.manifest["deleted"]
            rows = [name_of(every, opened, i) for i in range(len(opened.documents.sha256))]
        elif what == "share":
            b, i = next(r for r in rows if r)
            with Change(path) as change:
                change.resume("")
                sha = bank_edit.open_bank(path).documents.sha256[rows.index((b, i))]
                change.refer(Source(f"copy{len(rows)}.txt"), 1, 1, sha)
                change.finish()
            rows.append((b, i))
    opened = open_bank(path)
    got = {sha: rest for (sha, _, _), rest in found(open_bank(path, location="host")).items()}
    contents = {r for r in rows if r}
    assert len(got) == len(contents)
    for b, i in contents:
        one = every[b]
        here = slice(sum(one.doc_len[:i]), sum(one.doc_len[: i + 1]))
        bank = banks.append(banks.empty(LAYERS, H, D), *(getattr(one, a)[:, here] for a in ("k", "v", "rk")),
                            np.array(one.doc_len[i : i + 1]))  # fmt: skip
        scores, k, v, ids = next(rest for rest in got.values() if rest[3] == np.asarray(one.ids[i]).tolist())
        read = banks.read(bank, 0, np.array([[0]]), 16)
        assert (k, v) == (np.asarray(read[0]).tobytes(), np.asarray(read[1]).tobytes())


def name_of(every, opened, row):
    ids = opened.token_ids(row).tolist()
    return next((b, i) for b, one in enumerate(every) for i, a in enumerate(one.ids) if np.asarray(a).tolist() == ids)


# ---------------------------------------------------------------------------------------------- texts that are shared


@pytest.mark.parametrize("location", [pytest.param("disk", marks=pytest.mark.slow), "host", "device"])
def test_a_text_of_two_files_is_found_once_and_as_long_as_one_has_it(tmp_path, location):
    path = write(tmp_path / "b")
    before = found(open_bank(path, location=location), location)
    sha = open_bank(path).documents.sha256[2]  # all of b.txt
    with Change(path) as change:
        change.resume("")
        for name in ("e.txt", "f.txt"):
            change.refer(Source(name, "9" * 64), 11, 17, sha)
        change.finish()
    assert sorted(p.name for p in path.glob("segment-*/*")) == ["ids", "k", "rk", "table.json", "table.json", "v"]
    opened = open_bank(path, location=location)
    assert found(opened, location) == before  # the first place is the one that is cited
    assert opened.token_ids(7).tolist() == opened.token_ids(2).tolist()
    assert opened.files()[Source("f.txt", "9" * 64)] == [7]

    delete_files(path, ["b.txt"])
    moved = found(open_bank(path, location=location), location)
    assert moved[sha, "e.txt", 11] == before[sha, "b.txt", 1]
    assert {n: a for n, a in moved.items() if n[0] != sha} == {n: a for n, a in before.items() if n[0] != sha}
    compact(path)
    opened = open_bank(path, location=location)
    assert found(opened, location) == moved
    assert opened.documents.path[-2:] == ["e.txt", "f.txt"] and opened.files()[Source("f.txt", "9" * 64)] == [6]
    delete_files(path, ["e.txt"])
    assert {n[1] for n in found(open_bank(path, location=location), location) if n[0] == sha} == {"f.txt"}
    delete_files(path, ["f.txt"])
    assert sha not in {n[0] for n in found(open_bank(path, location=location), location)}
    compact(path)
    assert sha not in open_bank(path).documents.sha256


def test_a_shared_text_that_nobody_has_is_refused(tmp_path):
    path = write(tmp_path / "b")
    with Change(path) as change:
        change.resume("")
        change.refer(Source("e.txt"), 1, 1, "0" * 64)
        change.finish()
    with pytest.raises(BankError, match="field 'sha256' of document 6, which has no chunks, is that of no other"):
        open_bank(path)
    path = write(tmp_path / "c")
    with pytest.raises(BankError, match="needs a path below"), Change(path) as change:
        change.refer(Source("../e.txt"), 1, 1, open_bank(path).documents.sha256[0])


# ---------------------------------------------------------------------------------------------- deleting


def test_delete_files(tmp_path):
    path = write(tmp_path / "b")
    append_documents(path, MORE)
    for patterns, gone in ((["notes"], (1, 5)), (["notes/"], (0, 0)), (["*/d.*", "b.txt"], (2, 3)), (["b*"], (0, 0))):
        assert delete_files(path, patterns) == gone
    assert [s.path for s in open_bank(path).files()] == ["c.txt"]
    before = tree(path)
    with pytest.raises(BankError, match="none of its 4 files is 'e.txt'"):
        delete_files(path, ["c.txt", "e.txt"])
    assert tree(path) == before


# ---------------------------------------------------------------------------------------------- compacting


def test_compact_keeps_what_is_known_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_edit, "COPIED", 4)
    path = write(tmp_path / "b")
    append_documents(path, MORE, sources={"c.txt": Source("c.txt", "a" * 64, True)})
    delete_documents(path, [0, 2])
    before = open_bank(path)
    size = sum(map(len, tree(path).values()))
    done = compact(path)
    assert (done.documents, done.dropped, done.segments) == (7, 2, 2)
    after = use_all(path)
    assert {s: len(rows) for s, rows in after.files().items()} == {s: len(r) for s, r in before.files().items()}
    assert Source("c.txt", "a" * 64, True) in after.files()
    assert [p.name for p in path.iterdir() if p.is_dir()] == ["segment-00000002"]
    assert sum(map(len, tree(path).values())) < size
    again = tree(path)
    assert compact(path).dropped == 0 and tree(path) == again


def test_compact_to_nothing_and_of_a_damaged_bank(tmp_path):
    path = write(tmp_path / "b")
    delete_documents(path, range(6))
    assert found(open_bank(path, location="host")) == {}
    before = tree(path)
    with pytest.raises(BankError, match="every document is deleted; append some, or remove the bank"):
        compact(path)
    assert tree(path) == before
    other = write(tmp_path / "c")
    append_documents(other, MORE)
    file = next((other / "segment-00000000" / "v" / "c").rglob("0/0/0/0"))
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    before = tree(other)
    with pytest.raises(BankError, match="checksum mismatch"):
        compact(other)
    assert tree(other) == before


def test_a_reader_during_a_compaction(tmp_path):
    """What was read stays; what lies on disk is missing, and says so; opened again it is there."""
    path = write(tmp_path / "b")
    append_documents(path, MORE)
    disk, host = open_bank(path), open_bank(path, location="host")
    want = found(host)
    shutil.copytree(path, tmp_path / "copy")
    delete_documents(path, [1])
    assert found(disk, "disk") == want
    disk = open_bank(tmp_path / "copy")
    compact(tmp_path / "copy")
    for use in (lambda: disk.bank.k[:], lambda: disk.token_ids(0), lambda: found(disk, "disk")):
        with pytest.raises(BankError, match="missing: lost, or the bank was compacted since it was opened") as error:
            use()
        assert "\n" not in str(error.value)
    assert found(open_bank(tmp_path / "copy", location="host")) == want
    queries = jnp.ones((1, 1, H, D))
    assert banks.route(host.bank, 0, queries, jnp.ones((1, 1), bool), top_k=1)[1][0, 0] >= 0


def test_path_tricks_in_the_note_of_an_unfinished_change(tmp_path):
    """A note is checked like a manifest: what it names is a segment of this bank or nothing."""
    from memjax.in_storage.bank_manifest import base_of, read_manifest, read_note, seal, write_note

    path = write(tmp_path / "b")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    entry = read_manifest(path)["segments"][0]
    base = base_of(read_manifest(path))
    write_note(path, base, "plan", 1, [])
    note = json.loads((path / "unfinished.json").read_bytes())
    for name in ("../home", "/home", "segment-00000001/../../home"):
        sealed = seal({**note, "segments": [{**entry, "name": name}]})
        (path / "unfinished.json").write_text(json.dumps(sealed))
        assert read_note(path, base) is None
        append_documents(path, [block([1], len(name))])
        assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
        base = base_of(read_manifest(path))


@pytest.mark.parametrize("name", ["first_line", "last_line"])
def test_lines_are_counts(tmp_path, name):
    path = write(tmp_path / "b")
    before = tree(path)
    one = block([2, 2], 4, "sub/d.txt")
    with pytest.raises(BankError, match=f"block: {name} is -1, needs counts"):
        append_documents(path, [one._replace(**{name: [1, -1]})])
    assert tree(path) == before
