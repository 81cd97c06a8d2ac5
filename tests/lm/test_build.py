"""A bank of files holds what the model makes of each document alone, and where it came from; or there is none."""

import numpy as np
import pytest

from memjax.data import File
from memjax.errors import ConfigError, DataError
from memjax.in_storage.bank_files import open_bank
from memjax.lm import LanguageModel, bank_model, build, reader
from memjax.lm.build import build_bank
from memjax.lm.files import LoadedModel, load_model, save_model
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
        alone = reader.pool_documents(loaded.model, loaded.params, ids, np.arange(ids.shape[1])[None] < len(tokens))
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

    pool = reader.pool_documents
    for overwrite in (False, True):
        calls = iter([False, True])
        monkeypatch.setattr(reader, "pool_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_bank(loaded, FILES, tmp_path / "b", overwrite=overwrite, progress=False)
        monkeypatch.undo()
        if not overwrite:
            assert list(tmp_path.iterdir()) == []
            build_bank(loaded, FILES[:1], tmp_path / "b", progress=False)
    assert len(open_bank(tmp_path / "b").documents.path) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_chunks_that_found_no_room_are_an_error(loaded, tmp_path, monkeypatch):
    pool = reader.pool_documents

    def full(*args):
        pooled = pool(*args)
        return pooled._replace(count=pooled.count.at[0, 2].set(7))

    monkeypatch.setattr(reader, "pool_documents", full)
    with pytest.raises(ValueError, match="7 chunks of 4 documents find no room"):
        build_bank(loaded, FILES, tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_models_that_read_no_bank(loaded, tmp_path):
    with pytest.raises(ConfigError, match="has no reading settings"):
        build_bank(loaded._replace(reading=None), FILES, tmp_path / "b")
    with pytest.raises(ConfigError, match="has no MSA layer"):
        model = LanguageModel(tiny.model().body.blocks[0].blocks[1], tiny.TOKENIZER.vocab_size)
        build_bank(LoadedModel(model, {}, tiny.TOKENIZER, tiny.READING, ""), FILES, tmp_path / "b")
    with pytest.raises(ConfigError, match="capacity is 2, needs 4 chunks for a document of 64 tokens"):
        build_bank(loaded._replace(model=tiny.model(capacity=2)), FILES, tmp_path / "b")


def test_files_without_text(loaded, tmp_path):
    with pytest.raises(DataError, match="no document"):
        build_bank(loaded, [], tmp_path / "b")
