"""The small model that comes with memjax: trained on needles and on passages of several kinds of text, then compared.

    python -m experiments.corpora build/corpora
    python -m experiments.packaged_model --text build/corpora/train/* --test build/corpora/test/* --record
    python -m experiments.packaged_model --quick       # the same path in a minute or two, on the standard library alone

A batch has needles in a pool of documents, whose answers are copied (as in `experiments.needle_bank`), and passages: a
few words of a document, some dropped, ask for it among strangers and those that BM25 takes for it. Afterwards each
folder of --test, whose kinds of text training never saw, becomes a bank of 1M tokens; the same questions go to the
model, to BM25, and to both together. With --record the model becomes `memjax/packaged`, which `memjax bank` takes when
no --model is named.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import begun, needle_bank, recorded, settings

PADDED_QUESTION = 32  # tokens of a passage's question
LARGEST = 1 << 26  # bytes of a file: dictionaries are one file each
PIECE = 1 << 15  # characters: long files are sampled in pieces
AMONG = 10  # documents of a ranking that count
NEEDLES = 128  # planted in each test bank
COMPARING = ("test", "test_tokens", "questions", "device", "quick")  # settings that the model does not depend on
TIMED = 21  # questions, one after another; the first compiles


@dataclass(frozen=True)
class Config:
    """What is trained, on what, and what it is compared on. `needle_bank.Config` says what its fields here are."""

    text: tuple[Path, ...] = ()
    """Folders to train on, each a kind of text, beside Python's standard library."""
    test: tuple[Path, ...] = ()
    """Folders of other kinds to compare on."""
    megabytes: float = 4.0
    """Of text of each kind that is trained on."""
    steps: int = 900
    more_steps: int = 150
    """Afterwards, in which reading and answering weigh as much as finding: copying is learned last."""
    dim: int = 384
    layers: int = 3
    routers: int = 2
    """The last of the layers, which route."""
    heads: int = 6
    width: int = 4
    window: int = 512
    document_tokens: int = 64
    pool: int = 16
    vocab: int = 4096
    batch: int = 16
    pool_documents: int = 32
    passages: int = 128
    """Documents of a batch that passages are asked for among."""
    asked: int = 96
    """Passages asked for in a batch."""
    alike: int = 3
    """Documents beside the one a question is made of that have the most of its words."""
    words: tuple[int, int] = (4, 8)
    """Words of the span that a question is made of; from 4 to twice as many in training."""
    keep: float = 0.65
    """Chance of a word to stay."""
    learning_rate: float = 0.002
    adam_learning_rate: float = 0.006
    temperature: float = 0.01
    """Of the contrast between documents."""
    lm_weight: float = 0.2
    """Of reading and answering, relative to finding."""
    branches: float = 0.1
    """What the layers add at first, relative to their usual initial values: see `initial`."""
    test_tokens: int = 1 << 20
    questions: int = 512
    seed: int = 0
    device: str | None = None
    """Platform to run on: cpu, gpu or tpu; by default the best that jax finds."""
    output: Path = Path("build/packaged_model")
    """Folder for checkpoints (a run that was interrupted goes on from them), the model and the record."""
    record: bool = False
    """Put the record into experiments/records and the model into memjax/packaged."""
    quick: bool = False
    """A few steps and small banks: shows that everything runs, not how well."""


QUICK: dict[str, Any] = {
    "steps": 6, "more_steps": 2, "megabytes": 0.2, "dim": 32, "heads": 2, "vocab": 1024, "batch": 8,
    "pool_documents": 16, "passages": 32, "asked": 16, "test_tokens": 1 << 14, "questions": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """kinds: name -> documents cut at lines; words: the same for BM25. The rest is what `needle_bank` trains on."""

    tokenizer: Any
    kinds: dict[str, Any]
    words: dict[str, Any]
    training: np.ndarray
    train_words: list[str]
    held_out: list[str]
    special: dict[str, int]


def kinds_of(config: Config) -> dict[str, list[Any]]:
    """Files by kind of text, each kind cut to its megabytes, drawn from the whole of it."""
    from memjax import data

    found = {"python": data.standard_library()}
    found |= {folder.name: data.read_folder(folder, max_bytes=LARGEST)[0] for folder in config.text}
    if len(found) <= len(config.text):
        raise SystemExit("--text: two folders have one name, or one is called python")
    out = {}
    for kind, files in found.items():
        pieces = [
            data.File(file.path, text, None)
            for file in files
            for text in (file.text[at : at + PIECE] for at in range(0, len(file.text), PIECE))
        ]
        order, size, kept = np.random.default_rng(1).permutation(len(pieces)), 0, []
        for i in order.tolist():
            if size < config.megabytes * 1e6:
                kept.append(pieces[i])
                size += len(pieces[i].text)
        out[kind] = kept
    return out


def read_corpus(config: Config) -> Corpus:
    """The documents to train on, and their tokenizer."""
    from memjax import data
    from memjax.lm import reading
    from memjax.lm.words import WordIndex
    from memjax.tasks import needle

    kinds = kinds_of(config)
    files = [file for kind in kinds.values() for file in kind]
    tokenizer = data.train_bpe([file.text for file in files], vocab_size=config.vocab)
    train, held_out = needle.split_words(needle.common_words(file.text for file in files), 600)
    documents = {kind: data.cut(of, tokenizer, config.document_tokens) for kind, of in kinds.items()}
    return Corpus(
        tokenizer,
        documents,
        {kind: WordIndex(texts(of, tokenizer)) for kind, of in documents.items()},
        data.cut(files, tokenizer, config.document_tokens, align="tokens").ids,
        train,
        held_out,
        reading.special_ids(tokenizer),
    )


def texts(documents: Any, tokenizer: Any) -> list[str]:
    """The text of each document."""
    return [documents.document(i, tokenizer).text for i in range(len(documents.ids))]


def build_model(config: Config) -> Any:
    """As in `needle_bank`, with room for a pool of passages, a convolution before each part of a layer, and questions
    that route by the mean over their tokens."""
    from memjax import Residual, Stack
    from memjax.blocks import FeedForward
    from memjax.in_context.canon import Canon
    from memjax.in_storage.msa import MSA, DocumentAttention
    from memjax.lm import LanguageModel

    d, chunks = config.dim, -(-config.document_tokens // config.pool)
    documents = max(config.passages, config.pool_documents)
    attention: dict[str, Any] = dict(
        dim=d, heads=config.heads, kv_heads=config.heads, head_dim=d // config.heads, window=config.window, template=0,
        query_start=4, theta=1e4, qk_norm_init=3.0**0.5,
    )  # fmt: skip
    below = DocumentAttention(**attention)
    router = MSA(
        **attention, rotary=False, pool=config.pool, top_k=4, capacity=documents * chunks, documents=documents,
        max_chunks=4 * chunks, equal_routers=True, query_reduce="mean",
    )  # fmt: skip
    behind = lambda std, part: Residual(Stack((Canon(d, config.width, std), part)))  # noqa: E731
    mixers = [below] * (config.layers - config.routers) + [router] * config.routers
    body = Stack(tuple(Stack((behind(0.1, mixer), behind(0.3, FeedForward(d, d)))) for mixer in mixers))
    return LanguageModel(body, config.vocab, embed_std=1.0, logit_scale=0.25 * d**-0.5)


def initial(config: Config, model: Any, key: Any) -> Any:
    """Parameters by which a question finds its words before anything is learned.

    Routers are orthogonal, so that tokens stay as unlike as their embeddings. The layers add little, but the first
    feed-forward, which reads each token with those before it, adds what it does usually: pairs of tokens are features.
    """
    import jax

    orthogonal = jax.nn.initializers.orthogonal()

    def leaf(path: Any, a: Any) -> Any:
        at = [part.key for part in path]  # "body", the layer, ..., the name
        if at[-1] in ("w_rq", "w_rk"):
            return orthogonal(jax.random.fold_in(key, int(at[1])), a.shape, a.dtype)
        return a * config.branches if at[-1] == "w_o" or (at[-1] == "w_down" and at[1] != "0") else a

    return jax.tree_util.tree_map_with_path(leaf, jax.jit(model.init)(key))


# ---------------------------------------------------------------------------------------------- training


def training_batch(config: Config, corpus: Corpus) -> Any:
    """rng -> a batch of memjax.train.retrieval with needles and passages."""
    needles = needle_bank.training_batch(config, corpus)  # type: ignore[arg-type]  # it has the fields that are read
    return lambda rng: {**needles(rng), "passages": passages(config, corpus, rng)}


def passages(config: Config, corpus: Corpus, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Documents, every kind of text as often as another, each with those most like its question; and questions."""
    from memjax.lm import reading

    kinds, rows, asked = list(corpus.kinds), [], []
    while len(rows) < config.passages:
        kind = kinds[int(rng.integers(len(kinds)))]
        documents = corpus.kinds[kind]
        text = lambda i: documents.document(i, corpus.tokenizer).text  # noqa: B023, E731
        first = int(rng.integers(len(documents.ids)))
        if (made := question(config, rng, text(first))) is None:
            continue
        like = [i for i, _ in corpus.words[kind].rank(made, 2 * config.alike + 1) if text(i) != text(first)]
        group = [first, *rng.permutation(like)[: config.alike].tolist()][: config.passages - len(rows)]
        questions = [made, *(question(config, rng, text(i)) for i in group[1:])]
        asked += [(len(rows) + n, q) for n, q in enumerate(questions) if q is not None]
        rows += [(documents, i) for i in group]
    if len(asked) < config.asked:  # few documents of enough words: some are asked for twice
        asked += [asked[i] for i in rng.integers(0, len(asked), config.asked - len(asked)).tolist()]
    gold, questions = zip(*(asked[i] for i in rng.permutation(len(asked))[: config.asked].tolist()), strict=True)
    encoded = [reading.question(corpus.special, reading.encode_question(corpus.tokenizer, q)) for q in questions]
    ids, valid = reading.pad_left([q[:PADDED_QUESTION] for q in encoded], PADDED_QUESTION)
    lengths = np.array([documents.lengths[at] for documents, at in rows])
    return {
        "documents": np.stack([documents.ids[at] for documents, at in rows]),
        "document_valid": np.arange(config.document_tokens) < lengths[:, None],
        "gold": np.array(gold, np.int32), "question": ids, "question_valid": valid,
    }  # fmt: skip


def question(config: Config, rng: np.random.Generator, text: str) -> str | None:
    """A cloze question for a text; now and then in lower case, as people type."""
    from memjax.tasks.cloze import cloze

    asked = cloze(rng, text, words=(config.words[0], 2 * config.words[1]), keep=config.keep)
    return asked.lower() if asked is not None and rng.random() < 0.25 else asked


def train(config: Config, corpus: Corpus, model: Any, home: Path) -> Any:
    """The parameters after all steps, from the newest checkpoint of `home` on."""
    import jax

    from memjax import data
    from memjax.train.retrieval import Phase, fit_phases

    key = jax.random.key(config.seed)
    params = initial(config, model, key)
    for part, steps, phase in (
        ("", config.steps, Phase(1.0, config.lm_weight, 1.0, 1.0)),
        ("more", config.more_steps, Phase(1.0, 1.0, 1.0, 0.5)),
    ):
        params = fit_phases(
            model,
            params,
            lambda _, seed=config.seed + bool(part): data.generated(training_batch(config, corpus), seed=seed),
            steps=steps,
            key=key,
            phases=[phase],
            learning_rate=config.learning_rate,
            adam_learning_rate=config.adam_learning_rate,
            temperature=config.temperature,
            directory=home / part,
            save_every=50,
        ).params
    return params


# ---------------------------------------------------------------------------------------------- comparing


def compare(config: Config, corpus: Corpus, loaded: Any, name: str, files: list[Any]) -> dict[str, Any]:
    """Recall of the document a question was made of: by the model, by BM25, by both. And needles in the same bank."""
    from memjax.lm import words
    from memjax.lm.reader import RANKED
    from memjax.tasks.cloze import cloze

    documents = test_documents(config, corpus, files)
    told = texts(documents, corpus.tokenizer)
    rng, asked, gold = np.random.default_rng(5), [], []
    for i in rng.permutation(len(told)).tolist():
        if len(gold) < config.questions and (found := cloze(rng, told[i], words=config.words, keep=config.keep)):
            asked.append(found)
            gold.append(i)
    documents, planted = plant(config, corpus, documents, gold)
    index = words.WordIndex(texts(documents, corpus.tokenizer))
    by_words = [index.rank(q, RANKED) for q in asked]
    began = time.perf_counter()
    bank = bank_of(config, loaded, documents)
    seconds = time.perf_counter() - began
    by_model = model_rankings(loaded, bank, asked)
    rankings = {
        "model": by_model,
        "BM25": by_words,
        "both": [words.fuse(a, b) for a, b in zip(by_model, by_words, strict=True)],
    }
    ranks = {
        who: [next((n for n, (d, _) in enumerate(found) if d == g), -1) for found, g in zip(of, gold, strict=True)]
        for who, of in rankings.items()
    }
    row = {
        "kind": name, "documents": len(told), "tokens": int(documents.lengths.sum()), "questions": len(asked),
        "recall_at_1": {who: float(np.mean([r == 0 for r in of])) for who, of in ranks.items()},
        "recall_at_10": {who: float(np.mean([0 <= r < AMONG for r in of])) for who, of in ranks.items()},
        "ranks": ranks, "examples": asked[:TIMED], "tokens_per_second": int(documents.lengths.sum()) / seconds,
        "needles": ask_needles(loaded, bank, documents, planted),
    }  # fmt: skip
    shown = ", ".join(f"{who} {recall:.3f}" for who, recall in row["recall_at_10"].items())
    print(f"{name}: recall@10 of {len(told):,} documents: {shown}; {row['needles']}", flush=True)
    return row


def plant(config: Config, corpus: Corpus, documents: Any, gold: list[int]) -> tuple[Any, dict[int, Any]]:
    """The documents with needles of unseen words in some that no passage is asked of, and which needle is where."""
    from memjax.tasks import needle

    rng, ids = np.random.default_rng(6), documents.ids.copy()
    room = np.setdiff1d(np.flatnonzero(documents.lengths > 3 * config.document_tokens // 4), gold)
    where = rng.choice(room, min(NEEDLES, len(room)), replace=False).tolist()
    planted = dict(zip(where, needle.needles(rng, corpus.held_out, len(where)), strict=True))
    for i, one in planted.items():
        n = int(documents.lengths[i])
        ids[i, :n] = needle.plant(rng, ids[i, :n], corpus.tokenizer.encode(one.sentence))
    return documents._replace(ids=ids), planted


def ask_needles(loaded: Any, bank: Any, documents: Any, planted: dict[int, Any]) -> dict[str, Any]:
    """How often each router layer has a needle's document among its four best, and how often the answer is right."""
    from memjax.lm import reader
    from memjax.tasks import needle

    found, right, items = [], [], list(planted.items())
    for at in range(0, len(items), 32):
        numbers, asked = zip(*items[at : at + 32], strict=True)
        got = reader.answer(
            loaded.model, loaded.params, bank, loaded.tokenizer, [one.question for one in asked],
            lambda i: documents.ids[i, : documents.lengths[i]], steps=needle_bank.PADDED_ANSWER,
            question_width=PADDED_QUESTION, reading_width=2 * (documents.ids.shape[1] + 1) + PADDED_QUESTION,
        )  # fmt: skip
        found.append((got.routing.documents[:, :, :4] == np.array(numbers)[None, :, None]).any(-1))
        said = [reader.answer_text(loaded.tokenizer, tokens) for tokens in got.tokens]
        right += [needle.is_correct(text, one) for text, one in zip(said, asked, strict=True)]
    recall = np.concatenate(found, 1).mean(1)
    return {"asked": len(items), "recall_at_4": recall.tolist(), "right": float(np.mean(right))}


def test_documents(config: Config, corpus: Corpus, files: list[Any]) -> Any:
    """Documents of whole files, drawn at random, up to the tokens of a test bank; none twice, as in any bank."""
    from memjax import data

    order, chosen, size = np.random.default_rng(3).permutation(len(files)), [], 0
    for i in order.tolist():
        if size < 6 * config.test_tokens:  # characters: more than enough, if a token has fewer of them on average
            chosen.append(files[i])
            size += len(files[i].text)
    documents = data.cut(chosen, corpus.tokenizer, config.document_tokens)
    n = int(np.searchsorted(np.cumsum(documents.lengths), config.test_tokens)) + 1
    return documents._replace(**{field: getattr(documents, field)[:n] for field in ("ids", *needle_bank.TABLE)})


def bank_of(config: Config, loaded: Any, documents: Any) -> Any:
    """The documents as a bank in memory."""
    import jax.numpy as jnp

    from memjax.in_storage.bank import Bank
    from memjax.lm import pooling

    blocks = list(pooling.pool_blocks(loaded.model, loaded.params, documents, config.passages))
    arrays = [jnp.asarray(np.concatenate([getattr(b, name) for b in blocks], 1)) for name in ("rk", "k", "v")]
    lengths = np.concatenate([b.doc_len for b in blocks]).astype(np.int32)
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Bank(*arrays, *map(jnp.asarray, (owner, (np.cumsum(lengths) - lengths).astype(np.int32), lengths)))


def model_rankings(loaded: Any, bank: Any, asked: list[str]) -> list[Any]:
    """The model's ranking of documents for each question."""
    from memjax.lm.reader import RANKED, rank

    batches = [asked[at : at + 64] for at in range(0, len(asked), 64)]
    args = (loaded.model, loaded.params, bank, loaded.tokenizer)
    return [ranking for batch in batches for ranking in rank(*args, batch, RANKED)]


def time_asking(config: Config, corpus: Corpus, files: list[Any], questions: list[str], path: Path) -> dict[str, Any]:
    """Seconds to the first word and to the end of an answer over a bank on disk that `memjax bank build` would make."""
    from memjax.lm.asking import ask, open_with_model
    from memjax.lm.build import build_bank
    from memjax.lm.files import load_model

    documents = test_documents(config, corpus, files)
    taken = {documents.paths[i] for i in documents.path_index}
    made = build_bank(
        load_model(path.parent / "model"), [file for file in files if file.path in taken], path, overwrite=True
    )
    loaded, opened = open_with_model(path)
    first, whole = [], []
    for question in questions:
        began, words = time.perf_counter(), []
        for text in ask(loaded, opened, question, same_shapes=True).answer:
            words += [time.perf_counter() - began] if text.strip() else []
        first += words[:1]
        whole.append(time.perf_counter() - began)
    shutil.rmtree(path)
    row = {"documents": made.documents, "tokens": made.tokens, "bytes": made.bytes, "build_seconds": made.seconds,
           "first_word_seconds": first[1:], "seconds": whole[1:]}  # fmt: skip
    print(
        f"bank ask over {made.tokens:,} tokens on disk: first word after {np.median(row['first_word_seconds']):.2f} s, "
        f"{np.median(row['seconds']):.2f} s in all; built in {made.seconds:.0f} s",
        flush=True,
    )
    return row


def table(rows: list[dict[str, Any]]) -> None:
    """Print recall@10 of each kind of text, and how its needles were found and answered."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title="recall@10 of passages, recall@4 of needles by router layer", title_justify="left", box=None)
    for header in ("text", "documents", "model", "BM25", "both", "needles", "answers"):
        out.add_column(header, justify="left" if header == "text" else "right", no_wrap=True)
    for row in rows:
        passages = [f"{row['recall_at_10'][who]:.3f}" for who in ("model", "BM25", "both")]
        found = " ".join(f"{recall:.2f}" for recall in row["needles"]["recall_at_4"])
        out.add_row(row["kind"], f"{row['documents']:,}", *passages, found, f"{row['needles']['right']:.2f}")
    Console().print(out)


def begin(config: Config, home: Path) -> None:
    """Check that the checkpoints of `home`, if there are any, are of this very run; a quick run begins anew."""
    if config.record and not config.test:
        raise SystemExit("--record: needs --test, folders of texts that are not trained on")
    if config.quick:
        shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    about = settings(config) | {"text": [folder.name for folder in config.text]}
    now = json.loads(json.dumps({name: value for name, value in about.items() if name not in COMPARING}, default=str))
    file = home / "settings.json"
    if file.exists() and (was := json.loads(file.read_text())) != now:
        other = ", ".join(sorted(name for name in now if was.get(name) != now[name]))
        raise SystemExit(f"{home}: holds a run with another {other}; remove it, or name another --output")
    file.write_text(json.dumps(now, indent=1))


def main(config: Config) -> dict[str, Any]:
    config = begun(config, QUICK)
    from memjax import data
    from memjax.lm.files import ReadingSettings, load_model, save_model

    home = config.output / ("quick" if config.quick else "run")
    begin(config, home)
    corpus, model = read_corpus(config), build_model(config)
    sizes = {kind: int(documents.lengths.sum()) for kind, documents in corpus.kinds.items()}
    print(f"{sizes} tokens to train on; a model of {model.param_bytes() // 4:,} parameters", flush=True)
    params = train(config, corpus, model, home)
    reading = ReadingSettings(config.document_tokens, passages=2, answer_tokens=32)
    save_model(home / "model", model, params, corpus.tokenizer, reading=reading, dtype="bfloat16", overwrite=True)
    loaded = load_model(home / "model")  # as rounded
    tests = {folder.name: data.read_folder(folder)[0] for folder in config.test} or {"python": data.standard_library()}
    rows = [compare(config, corpus, loaded, name, files) for name, files in tests.items()]
    table(rows)
    name, files = next(iter(tests.items()))
    asking = time_asking(config, corpus, files, rows[0]["examples"], home / f"{name}.bank")
    logs = [home / part / "phase-0" / "metrics.jsonl" for part in ("", "more")]
    metrics = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    body = {
        "config": {name: value for name, value in settings(config).items() if name not in ("text", "test")},
        "trained_on": sizes, "passages": rows, "asking": asking, "metrics": metrics,
        "model_hash": loaded.hash,
    }  # fmt: skip
    if recorded("packaged_model", body, config) and config.record:
        from memjax.lm.packaged import PACKAGED

        shutil.copytree(home / "model", PACKAGED, dirs_exist_ok=True)
        print(f"wrote {PACKAGED}")
    return body


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
