"""One question to a bank: the same answer in any padding, and excerpts of what it is read from."""

import pytest

from memjax.data import File
from memjax.errors import ConfigError
from memjax.lm.asking import ask, excerpt, open_with_model
from memjax.lm.build import build_bank
from memjax.lm.files import ReadingSettings, load_model, save_model
from tests.lm import tiny

QUESTION = "Which number belongs to the red house?"


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("asking"), tiny.model()
    reading = ReadingSettings(document_tokens=64, passages=2, answer_tokens=6)  # no multiple of a block of 4
    save_model(folder / "model", model, tiny.params(model), tiny.TOKENIZER, reading=reading)
    files = [File("a.txt", "The red house has number 7.\n"), File("b.md", "Nothing to see.\nWalk on.\n")]
    build_bank(load_model(folder / "model"), files, folder / "bank", progress=False)
    return folder / "bank"


def test_padding_changes_no_answer(bank):
    opened = open_with_model(bank)
    tight, wide = ask(*opened, QUESTION), ask(*opened, QUESTION, same_shapes=True)
    assert "".join(tight.answer) == "".join(wide.answer)
    assert [p.document for p in tight.passages] == [p.document for p in wide.passages]
    assert [p.score for p in tight.passages] == pytest.approx([p.score for p in wide.passages], abs=1e-6)
    assert sorted(p.document.citation for p in wide.passages) == ["a.txt:1", "b.md:1-2"]
    assert len(ask(*opened, QUESTION, 1).passages) == 1
    assert len(list(ask(*opened, "x" * 63, same_shapes=True).answer)) <= 3  # two blocks of 3, and the end


def test_what_cannot_be_asked(bank):
    opened = open_with_model(bank)
    for same_shapes in (False, True):
        with pytest.raises(ConfigError, match="question: is empty"):
            ask(*opened, "", same_shapes=same_shapes)
        with pytest.raises(ConfigError, match="question: has 386 tokens, the model's window is 384"):
            ask(*opened, "x" * 384, same_shapes=same_shapes)


def test_an_excerpt_in_pieces():
    text = "x " * 500 + "the Red house\nhas number 7.\n" + "y " * 500
    pieces = excerpt(text, QUESTION, width=80)
    shown = "".join(piece for piece, _ in pieces)
    assert "the Red house has number 7." in shown and len(shown) <= 84
    assert shown.startswith("… ") and shown.endswith(" …")
    assert [piece for piece, marked in pieces if marked] == ["house", "number"]
    assert excerpt("short", QUESTION) == [("short", False)]
    assert excerpt("", QUESTION) == []
