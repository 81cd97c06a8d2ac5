"""The model that comes with the package is the recorded one, small, and finds passages in text it has never seen."""

import itertools

from experiments import readme_tables
from memjax.data import File
from memjax.in_storage.bank_files import open_bank
from memjax.lm import reader
from memjax.lm.asking import ask, open_with_model
from memjax.lm.build import build_bank
from memjax.lm.files import load_model
from memjax.lm.packaged import PACKAGED

TEXTS = {
    "ferry.txt": "From May on the ferry to the islands leaves the north pier at seven, and comes back after dark.",
    "bread.md": "Let the dough rest overnight in a cold kitchen; the crust will thank you for the patience.",
    "queue.c": "static int queue_push(struct queue *q, void *item) { return ring_insert(&q->ring, item); }",
    "lens.tex": "A telescope of short focal length gathers light from faint nebulae at the cost of sharpness.",
    "clock.txt": "The watchmaker oiled the escapement twice a year and never trusted the striking mechanism.",
    "law.txt": "The tenant shall give notice in writing not later than three months before the term expires.",
}


def test_it_is_the_recorded_one():
    record = readme_tables.newest("packaged_model")
    assert record is not None and load_model(PACKAGED).hash == record["model_hash"]
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) < 12e6


def test_words_of_a_passage_find_it(tmp_path):
    loaded = load_model(PACKAGED)
    build_bank(loaded, [File(name, text) for name, text in TEXTS.items()], tmp_path / "b", progress=False)
    opened = open_bank(tmp_path / "b")
    asked = {
        "ferry.txt": "islands leaves north pier",
        "bread.md": "dough rest overnight kitchen",
        "queue.c": "queue_push(struct queue *item)",
        "lens.tex": "telescope gathers light faint",
        "clock.txt": "watchmaker never trusted striking",
        "law.txt": "tenant notice three months",
    }
    found = reader.rank(loaded.model, loaded.params, opened.bank, loaded.tokenizer, list(asked.values()), 1)
    assert [opened.documents.path[ranking[0][0]] for ranking in found] == list(asked)


def test_a_needle_among_look_alikes_is_found_and_copied(tmp_path):
    who, where, when = (
        ("baker", "sailor", "doctor", "teacher", "painter", "farmer"),
        ("harbour", "station", "market", "library", "orchard", "mill"),
        ("spring", "summer", "autumn", "winter", "March", "October"),
    )
    texts = [f"In {c} the {a} went to the {b} and came home late, tired and content.\n" for a, b, c in
             itertools.product(who, where, when)]  # fmt: skip
    texts[100] += "The special magic number for quiet river is 4829315.\n"
    files = [File(f"{i}.txt", text) for i, text in enumerate(texts)]
    build_bank(load_model(PACKAGED), files, tmp_path / "b", progress=False)
    loaded, opened = open_with_model(tmp_path / "b")
    asked = ask(loaded, opened, "The special magic number for quiet river is")
    assert asked.passages[0].document.path == "100.txt" and "".join(asked.answer).strip() == "4829315"
    questions = ["sailor went orchard October", "farmer library spring came", "doctor mill winter late"]
    found = reader.rank(loaded.model, loaded.params, opened.bank, loaded.tokenizer, questions, 1)
    first = [texts[int(opened.documents.path[ranking[0][0]].removesuffix(".txt"))].split() for ranking in found]
    assert [{"sailor", "orchard", "October"} <= {*first[0]}, {"farmer", "library", "spring"} <= {*first[1]},
            {"doctor", "mill", "winter"} <= {*first[2]}] == [True] * 3  # fmt: skip
