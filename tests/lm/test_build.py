"""A bank of files holds what the model makes of each document alone, and where it came from; or there is none."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.data import File
from memjax.errors import BankError, ConfigError, DataError
from memjax.in_storage import bank_change
from memjax.in_storage.bank_files import compact, delete_files, open_bank
from memjax.lm import LanguageModel, bank_model, build, pooling, reader
from memjax.lm.build import append_files, build_bank
from memjax.lm.files import LoadedModel, ReadingSettings, load_model, save_model
from tests.in_storage.test_bank_files import tree
from tests.lm import tiny

FILES = [
    File(f"notes/{i}.txt", "".join(f"line {j} of note {i}, and no more to say of it\n" for j in range(5)))
    for i in range(4)
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("model") / "m", tiny.model()
    save_model(path, model, tiny.params(model), tiny.TOKENIZER, reading=tiny.READING)
    return load_model(path)


@pytest.fixture(scope="module")
def bank(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "b"
    return build_bank(loaded, FILES, path, progress=False), open_bank(path, location="host")


def test_the_table_says_where_documents_came_from(bank):
    summary, opened = bank
    text = tiny.TOKENIZER.decode(opened.token_ids(0))
    assert text == "line 0 of note 0, and no more to say of it\n"
    assert (opened.documents.path[5], opened.documents.first_line[5]) == ("notes/1.txt", 1)
    assert (summary.documents, summary.tokens) == (20, sum(len(f.text) for f in FILES))
    assert summary.chunks == 60  # 43 bytes a line, 16 a chunk


def test_blocks_give_what_each_document_gives_alone(loaded, bank):
    """20 documents in blocks of 4 (16 chunks of room, 4 a document): rows, blocks and padding don't show."""
    _, opened = bank
    assert build.reading_shape(loaded)[2] == 4
    for document in (0, 3, 4, 19):
        ids = np.zeros((1, tiny.READING.document_tokens), np.int32)
        tokens = opened.token_ids(document)
        ids[0, : len(tokens)] = tokens
        alone = pooling.pool_documents(loaded.model, loaded.params, ids, np.arange(ids.shape[1])[None] < len(tokens))
        here = slice(3 * document, 3 * document + 3)
        for name in ("k", "v", "rk"):
            got, want = getattr(opened.bank, name)[:, here], getattr(alone, name)[:, :3]
            np.testing.assert_allclose(got.astype(np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.02)


def test_the_bank_is_the_models_and_carries_it(loaded, bank):
    summary, opened = bank
    assert summary.has_model
    assert open_bank(summary.path, model_hash=loaded.hash, tokenizer_hash=loaded.tokenizer.hash)
    assert load_model(summary.path / "model").hash == loaded.hash == opened.manifest["model"]["hash"]


def test_a_large_model_is_not_copied(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_model, "COPIED_MODEL", 1)
    assert not build_bank(loaded, FILES[:1], tmp_path / "b", progress=False).has_model
    assert not (tmp_path / "b" / "model").exists()


def test_progress_shows_documents_tokens_and_bytes(loaded, tmp_path, capsys):
    build_bank(loaded, FILES, tmp_path / "b")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "20/20" in last and "tokens 860" in last and "tokens/s" in last and "bytes" in last


def test_an_interruption_leaves_no_bank_or_the_old_one(loaded, tmp_path, monkeypatch):
    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return pool(*args)

    pool = pooling.pool_documents
    for overwrite in (False, True):
        calls = iter([False, True])
        monkeypatch.setattr(pooling, "pool_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_bank(loaded, FILES, tmp_path / "b", overwrite=overwrite, progress=False)
        monkeypatch.undo()
        if not overwrite:
            assert list(tmp_path.iterdir()) == []
            build_bank(loaded, FILES[:1], tmp_path / "b", progress=False)
    assert len(open_bank(tmp_path / "b").documents.path) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_chunks_that_found_no_room_are_an_error(loaded, tmp_path, monkeypatch):
    pool = pooling.pool_documents

    def full(*args):
        pooled = pool(*args)
        return pooled._replace(count=pooled.count.at[0, 2].set(7))

    monkeypatch.setattr(pooling, "pool_documents", full)
    with pytest.raises(ValueError, match="7 chunks of 4 documents find no room"):
        build_bank(loaded, FILES, tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_models_that_read_no_bank(loaded, tmp_path):
    with pytest.raises(ConfigError, match="has no reading settings"):
        build_bank(loaded._replace(reading=None), FILES, tmp_path / "b")
    with pytest.raises(ConfigError, match="has no MSA layer"):
        model = LanguageModel(tiny.model().body.blocks[0].blocks[1], tiny.TOKENIZER.vocab_size)
        build_bank(LoadedModel(model, {}, tiny.TOKENIZER, tiny.READING, "", "float32"), FILES, tmp_path / "b")
    with pytest.raises(ConfigError, match="capacity is 2, needs 4 chunks for a document of 64 tokens"):
        build_bank(loaded._replace(model=tiny.model(capacity=2)), FILES, tmp_path / "b")


def test_files_without_text(loaded, tmp_path):
    with pytest.raises(DataError, match="no document"):
        build_bank(loaded, [], tmp_path / "b")


# ---------------------------------------------------------------------------------------------- bringing up to date


def note(i, lines=5):
    return File(f"notes/{i}.txt", "".join(f"line {j} of note {i}, and no more to say of it\n" for j in range(lines)))


def texts(path):
    """What the bank says of every living document."""
    opened = open_bank(path, location="host")
    found = np.asarray(opened.bank.doc_len) > 0
    return sorted(
        (opened.documents.path[i], int(opened.documents.first_line[i]), tiny.TOKENIZER.decode(opened.token_ids(i)))
        for i in np.flatnonzero(found).tolist()
    )


def test_only_what_changed_is_read(loaded, tmp_path, monkeypatch):
    path, seen = tmp_path / "b", []
    build_bank(loaded, FILES, path, progress=False)
    pool = pooling.pool_documents

    def counted(model, params, ids, valid):
        seen.append(int(valid.any(1).sum()))
        return pool(model, params, ids, valid)

    monkeypatch.setattr(pooling, "pool_documents", counted)
    same = build_bank(loaded, FILES, path, progress=False)
    assert (seen, same.read, same.documents) == ([], 0, 20) and len(same.files.unchanged) == 4
    changed = File("notes/1.txt", FILES[1].text.replace("line 4 of note 1,", "line 4 was rewritten"))
    files = [FILES[0], changed, FILES[3], note(9, 2)]
    made = build_bank(loaded, files, path, progress=False)
    assert vars(made.files) == {
        "new": ["notes/9.txt"], "changed": ["notes/1.txt"], "removed": ["notes/2.txt"],
        "unchanged": ["notes/0.txt", "notes/3.txt"],
    }  # fmt: skip
    assert sum(seen) == made.read == 3  # four of the lines of the changed file stand in the bank
    build_bank(loaded, files, tmp_path / "anew", progress=False)
    assert texts(path) == texts(tmp_path / "anew") and made.documents == 17
    back = build_bank(loaded, FILES, path, progress=False)
    assert back.read == 0 and texts(path) == texts(build_bank(loaded, FILES, tmp_path / "c", progress=False).path)


def test_a_text_of_two_files_outlives_either(loaded, tmp_path):
    """`cut` would drop it from the second file, and it would be lost with the first."""
    head = "the licence of all files of this folder is long\n"
    files = [File(f"{name}.py", f"{head}this is the code of file {name}, all of it\n") for name in "abc"]
    path = tmp_path / "b"
    made = build_bank(loaded, files, path, progress=False)
    assert (made.read, made.documents) == (4, 6)
    assert [t[:2] for t in texts(path) if t[2] == head] == [("a.py", 1)]
    for left in (files[1:], files[2:]):
        made = build_bank(loaded, left, path, progress=False)
        assert made.read == 0
        assert [t[:2] for t in texts(path) if t[2] == head] == [(left[0].path, 1)]
    build_bank(loaded, [File("d.py", "nothing of it\n")], path, progress=False)
    assert [t[2] for t in texts(path)] == ["nothing of it\n"]


def test_files_that_are_copies_of_others_need_no_model(loaded, tmp_path, monkeypatch):
    path = tmp_path / "b"
    build_bank(loaded, FILES, path, progress=False)
    monkeypatch.setattr(pooling, "pool_documents", None)
    copies = [File(f"copy/{f.path}", f.text) for f in FILES]
    made = append_files(loaded, copies, path, progress=False)
    assert (made.read, made.documents, len(texts(path))) == (0, 40, 20)
    made = build_bank(loaded, FILES[:1], path, progress=False)  # the copies were appended, so they stay
    assert made.files.removed == [f.path for f in FILES[1:]] and len(texts(path)) == 20


def test_append_then_delete_leaves_the_bytes_of_every_answer(loaded, tmp_path):
    path = tmp_path / "b"
    build_bank(loaded, FILES, path, progress=False)

    def answers():
        opened = open_bank(path, location="host")
        question = jnp.asarray([tiny.TOKENIZER.encode("line 3 of note 2")], jnp.int32)
        state, routing = reader.ask(loaded.model, loaded.params, opened.bank, question, jnp.ones(question.shape, bool))
        named = [opened.documents.sha256[i] for i in routing.documents.ravel()]
        leaves = jax.tree.leaves(state)
        return named, routing.scores.tobytes(), [np.asarray(a).tobytes() for a in leaves if a.dtype != np.int32]

    before = answers()
    append_files(loaded, [note(7), note(8)], path, progress=False)
    delete_files(path, ["notes/7.txt", "notes/8.txt"])
    assert answers() == before
    compact(path)
    assert answers() == before


def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_change, "SEGMENT", 24)  # two blocks of four documents of three chunks
    pool, more = pooling.pool_documents, [note(i) for i in range(4, 8)]
    build_bank(loaded, FILES, tmp_path / "want", progress=False)
    seen = []
    for died in (1, 2, 3, 4):
        calls = iter([False] * died + [True])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pooling, "pool_documents", lambda *a, calls=calls: stop() if next(calls) else pool(*a))
            build_bank(loaded, FILES, tmp_path / f"{died}", progress=False)
        made = build_bank(loaded, FILES, tmp_path / f"{died}", progress=False)
        seen.append((made.resumed, made.read))
        assert tree(tmp_path / f"{died}") == tree(tmp_path / "want")
    assert seen == [(0, 20), (0, 20), (8, 12), (8, 12)]
    for kind in (append_files, build_bank):
        calls = iter([False] * 3 + [True])
        path = shutil.copytree(tmp_path / "want", tmp_path / kind.__name__)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pooling, "pool_documents", lambda *a, calls=calls: stop() if next(calls) else pool(*a))
            kind(loaded, more, path, progress=False)
        assert texts(path) == texts(tmp_path / "want")  # as it was, to whoever asks meanwhile
        assert kind(loaded, more, path, progress=False).resumed == 8
        want = shutil.copytree(tmp_path / "want", tmp_path / f"{kind.__name__}-want")
        kind(loaded, more, want, progress=False)
        assert tree(path) == tree(want)
    other = build_bank(loaded, FILES[1:], tmp_path / "1", progress=False)
    assert other.read == 0 and other.files.removed == ["notes/0.txt"]


def stop():
    raise KeyboardInterrupt


def test_what_can_not_be_brought_up_to_date(loaded, tmp_path):
    path = tmp_path / "b"
    build_bank(loaded, FILES, path, progress=False)
    before = tree(path)
    wider = loaded._replace(reading=ReadingSettings(document_tokens=32, passages=2, answer_tokens=4))
    with pytest.raises(BankError, match="was cut into documents of 64 tokens, the model's reading settings say 32"):
        build_bank(wider, FILES, path, progress=False)
    with pytest.raises(BankError, match="was built with model"):
        append_files(loaded._replace(hash="0" * 64), [note(9)], path, progress=False)
    with pytest.raises(DataError, match="two have the path 'notes/0.txt'"):
        build_bank(loaded, [*FILES, FILES[0]], path, progress=False)
    with pytest.raises(BankError, match="no such|No such"):
        append_files(loaded, FILES, tmp_path / "none", progress=False)
    assert tree(path) == before and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_build_with_another_model_that_dies_before_its_end(loaded, tmp_path, monkeypatch):
    """There is always a bank with the model that built it."""
    other = load_model(save_other(tmp_path))
    path = tmp_path / "b"
    build_bank(loaded, FILES, path, progress=False)
    for name in ("finish", "settle"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if name == "finish":
                patch.setattr(bank_change.Change, "finish", lambda self: stop())
            else:
                patch.setattr(build, "settle_model", lambda *_: stop())
            build_bank(other, FILES, path, overwrite=True, progress=False)
        opened = open_bank(path)
        built = opened.manifest["model"]["hash"]
        assert built == (loaded if name == "finish" else other).hash
        assert load_model(bank_model.copied_model(path, built)).hash == built
    build_bank(other, FILES, path, progress=False)
    assert sorted(p.name for p in path.iterdir() if p.is_dir() and "seg" not in p.name) == ["model"]
    assert load_model(path / "model").hash == other.hash


def test_overwrite_brings_a_copy_that_is_whole_and_reads_as_the_bank_was_cut(loaded, tmp_path):
    path = tmp_path / "b"
    build_bank(loaded, FILES, path, progress=False)
    params = path / "model" / "params.safetensors"
    good = params.read_bytes()
    params.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    shorter = loaded._replace(reading=replace(loaded.reading, document_tokens=32))
    build_bank(shorter, FILES, path, overwrite=True, progress=False)
    assert params.read_bytes() == good and load_model(path / "model").reading.document_tokens == 32
    assert build_bank(load_model(path / "model"), FILES, path, progress=False).files.unchanged


def test_what_could_not_be_read_stays(loaded, tmp_path):
    path = tmp_path / "b"
    files = [*FILES, File("closed/a.txt", "behind a door\n"), File("closed.txt", "not behind a door\n")]
    build_bank(loaded, files, path, progress=False)
    made = build_bank(loaded, FILES[1:], path, unread=["closed", "notes/0.txt/x"], progress=False)
    assert made.files.removed == ["closed.txt", "notes/0.txt"]
    opened = open_bank(path)
    assert {opened.documents.path[i] for i in opened.living()} == {"closed/a.txt", *(f.path for f in FILES[1:])}
    made = build_bank(loaded, FILES[1:], path, progress=False)
    assert made.files.removed == ["closed/a.txt"]


def save_other(folder):
    model = tiny.model()
    save_model(folder / "other", model, tiny.params(model, 1), tiny.TOKENIZER, reading=tiny.READING)
    return folder / "other"
