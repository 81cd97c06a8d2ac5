# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ask a folder
#
# A bank is a memory outside the window: a model reads each document of a folder once and keeps a few vectors of it on
# disk. A question then finds the documents that matter among all of them. Here we read a folder, ask it, look at what
# each layer of the model chose, compare with a search by words, and change the folder. It runs on a CPU in two minutes.
#
# ## 1. Read a folder
#
# Put your own here. Ours comes with memjax: the source code of optax, of which the model has read nothing in training
# (it was trained on Python's standard library, among others).

# %%
import importlib.util
import shutil
import tempfile
from pathlib import Path

from memjax.data import read_folder
from memjax.lm.build import build_bank
from memjax.lm.files import load_model
from memjax.lm.packaged import PACKAGED

here = Path(tempfile.mkdtemp())
folder = here / "sources"
optax = Path(importlib.util.find_spec("optax").origin).parent
for package in ("_src", "losses", "schedules", "transforms"):
    shutil.copytree(optax / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*_test.py"))
files, skipped = read_folder(folder)
print(f"{len(files)} files, {sum(len(f.text) for f in files):,} characters, {len(skipped)} skipped")

# %% [markdown]
# The model is the small one that comes with memjax. It cuts files at lines into documents of at most 64 tokens.

# %%
model = load_model(PACKAGED)
bank = here / "sources.bank"
made = build_bank(model, files, bank, progress=False)
print(f"{made.documents:,} documents, {made.tokens:,} tokens, {made.bytes / 1e6:.1f} MB, {made.seconds:.1f} s")

# %% [markdown]
# ## 2. Ask
#
# The model is no assistant: it finds the passage that some words are from. So we ask with the words we remember, and
# read what it cites. (`answer` is what it continues the question with. It learned to do that for one kind of sentence.)

# %%
from memjax.lm.asking import ask, open_with_model

loaded, opened = open_with_model(bank)
question = "cosine decay schedule with a linear warm up"
asked = ask(loaded, opened, question, passages=4)
for passage in asked.passages:
    print(f"{passage.score:.3f}  {passage.document.citation}")
    print("\n".join(f"       {line}" for line in passage.document.text.strip().splitlines()[:4]))

# %% [markdown]
# ## 3. What each layer chose
#
# Two layers of the model route, each by scores of its own. Dark: a high score; white: not among the layer's best.

# %%
import matplotlib.pyplot as plt
import numpy as np

found = asked.routing
documents = list(dict.fromkeys(found.documents[:, 0].T.ravel().tolist()))
scores = np.full((len(found.documents), len(documents)), np.nan)
for layer, (chosen, score) in enumerate(zip(found.documents[:, 0], found.scores[:, 0], strict=True)):
    for document, s in zip(chosen.tolist(), score.tolist(), strict=True):
        scores[layer, documents.index(document)] = s

figure, axes = plt.subplots(figsize=(8, 1.8), layout="constrained")
image = axes.imshow(scores, aspect="auto", cmap="Blues", vmin=0)
axes.set_yticks(range(len(scores)), [f"router {i}" for i in range(len(scores))])
names = [f"{opened.documents.path[d]}:{opened.documents.first_line[d]}" for d in documents]
axes.set_xticks(range(len(documents)), names, rotation=30, ha="right", fontsize=7)
figure.colorbar(image, label="score")
plt.show()

# %% [markdown]
# ## 4. Is it any good here?
#
# Every folder can be its own test: take a few words of a document, drop some, and see whether they find the document
# again. A search by words (BM25) gets the same questions, and the two rankings can be put together.

# %%
from memjax.lm import reader
from memjax.lm.asking import word_index
from memjax.lm.words import fuse
from memjax.tasks.cloze import cloze

rng = np.random.default_rng(0)
living = np.flatnonzero(np.asarray(opened.bank.doc_len) > 0)
texts = {int(i): loaded.tokenizer.decode(opened.token_ids(int(i))) for i in living}
gold, questions = [], []
for i in rng.permutation(living).tolist():
    if len(gold) < 128 and (some := cloze(rng, texts[i])):
        gold.append(i)
        questions.append(some)
print(*questions[:3], sep="\n")

by_model = reader.rank(loaded.model, loaded.params, opened.bank, loaded.tokenizer, questions, reader.RANKED)
index = word_index(loaded, opened)
by_words = [index.rank(q, reader.RANKED) for q in questions]
both = [fuse(a, b) for a, b in zip(by_model, by_words, strict=True)]


def recall(rankings, at):
    return np.mean([g in [d for d, _ in ranking[:at]] for g, ranking in zip(gold, rankings, strict=True)])


for name, rankings in (("model", by_model), ("words", by_words), ("both", both)):
    print(f"{name:6}  first {recall(rankings, 1):.2f}   among ten {recall(rankings, 10):.2f}")

# %% [markdown]
# `memjax bank ask --words` and `ask(..., words=index)` choose passages by both.
#
# ## 5. The folder changes
#
# Building again is an update. Only documents whose text the bank has not seen are read, and a file that is gone is
# never found again.

# %%
(folder / "_src" / "clipping.py").unlink(missing_ok=True)
note = folder / "note.txt"
note.write_text("The spare key of the archive is behind the blue heater in the corridor.\n")
made = build_bank(model, read_folder(folder)[0], bank, progress=False)
print(f"new {made.files.new}, removed {made.files.removed}, unchanged {len(made.files.unchanged)}")
print(f"{made.read} document read, {made.seconds:.1f} s")

loaded, opened = open_with_model(bank)
first = ask(loaded, opened, "where is the spare key of the archive").passages[0]
print(first.document.citation, "|", first.document.text.strip())
assert "note.txt" in first.document.citation

# %% [markdown]
# A file can be deleted without touching any other: the vectors of all other documents keep every bit, so their answers
# do too.

# %%
from memjax.in_storage.bank_files import delete_files

before = reader.rank(loaded.model, loaded.params, opened.bank, loaded.tokenizer, questions[:8], 5)
delete_files(bank, ["note.txt"])
loaded, opened = open_with_model(bank)
after = reader.rank(loaded.model, loaded.params, opened.bank, loaded.tokenizer, questions[:8], 5)
again = reader.rank(loaded.model, loaded.params, opened.bank, loaded.tokenizer, ["the spare key of the archive"], 10)
print("the same answers:", before == after)
print("found again:", any("note.txt" in opened.documents.path[d] for d, _ in again[0]))
assert before == after
assert not any("note.txt" in opened.documents.path[d] for d, _ in again[0])

# %% [markdown]
# The same from a terminal: `memjax bank build sources`, `memjax bank ask sources.bank "..."`,
# `memjax bank delete sources.bank note.txt`; `memjax bank serve sources.bank` shows it in a browser.

# %%
shutil.rmtree(here)
