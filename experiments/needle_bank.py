"""A small model reads a corpus once into a bank, then answers questions over a memory far longer than its training.

    python -m experiments.needle_bank                           train, build, ask; a table, a record and a picture
    python -m experiments.needle_bank --quick                   the same path in a minute or two, to see that it works
    python -m experiments.needle_bank --seeds 0 1 2 --record    the committed record
    python -m experiments.needle_bank --folder DIR              with the text of a folder of yours in the corpus

The corpus is text that is on every machine with Python, cut into documents of 64 tokens. Needles (sentences of the
RULER kind, words held out from training) are planted in the first 16K tokens; the same questions are asked while the
bank grows around them. The model routes over the whole bank, reads the best two documents, and copies the answer.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import begun, recorded, settings
from experiments.markdown import tokens

PADDED_QUESTION, PADDED_ANSWER = 28, 9  # tokens
PREFIX = 16 << 10  # tokens of the smallest memory; needles stand in it
BLOCK = 64  # documents read at once when a bank is built
ASKED = 64  # questions of a batch


@dataclass(frozen=True)
class Config:
    """What is trained, built and asked."""

    tokens: str = "4M"
    """Tokens in the largest bank: a number, or one with K or M (of 1024)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; each is a run of its own, all go into one record."""
    folder: tuple[Path, ...] = ()
    """Folders whose text is put in front of the standard library's."""
    steps: int = 650
    """Updates of training."""
    questions: int = 128
    """Needles in each draw."""
    draws: int = 4
    """Draws of needles, each planted anew in the first 16K tokens."""
    dim: int = 96
    layers: int = 4
    heads: int = 4
    width: int = 4
    """Tokens that the convolution in front of each attention sees: the key's end and the number behind it."""
    document_tokens: int = 64
    pool: int = 16
    vocab: int = 2048
    batch: int = 32
    """Questions of a batch in training."""
    pool_documents: int = 64
    """Documents that serve all questions of a batch in training."""
    learning_rate: float = 0.01
    adam_learning_rate: float = 0.005
    device: str | None = None
    """Platform to run on: cpu, gpu or tpu; by default the best that jax finds."""
    output: Path = Path("build/demo")
    """Folder for checkpoints (a run that was interrupted goes on from them), model, bank, record and picture."""
    record: bool = False
    """Put the record into experiments/records, from which the README's figures are drawn, instead of the output."""
    quick: bool = False
    """A few steps and a small bank: shows that everything runs, not how well."""


QUICK = {"steps": 30, "tokens": "64K", "questions": 32, "draws": 1, "batch": 8, "pool_documents": 16}


def build_model(config: Config):
    """Two layers with rotary positions, two router layers without; a convolution in front of each attention."""
    from memjax import Stack
    from memjax.in_context.canon import Canon
    from memjax.in_storage.msa import MSA, DocumentAttention
    from memjax.lm import LanguageModel, block

    d, chunks = config.dim, config.document_tokens // config.pool
    documents = max(config.pool_documents, BLOCK)
    attention: dict[str, Any] = dict(
        dim=d, heads=config.heads, kv_heads=config.heads, head_dim=d // config.heads, window=208, template=0,
        query_start=4, theta=1e4, qk_norm_init=math.sqrt(3.0),
    )  # fmt: skip
    below = DocumentAttention(**attention)
    router = MSA(
        **attention, rotary=False, pool=config.pool, top_k=4, capacity=documents * chunks, documents=documents,
        max_chunks=4 * chunks, equal_routers=True,
    )  # fmt: skip
    routers = config.layers // 2
    mixers = [below] * (config.layers - routers) + [router] * routers
    body = Stack(tuple(block(Stack((Canon(d, config.width), mixer)), 3 * d) for mixer in mixers))
    return LanguageModel(body, config.vocab, embed_std=1.0, logit_scale=d**-0.5)


@dataclass(frozen=True)
class Corpus:
    tokenizer: Any
    documents: Any  # memjax.data.TokenizedDocuments, every one full and distinct, in random order
    train_words: list[str]
    held_out: list[str]
    special: dict[str, int]
    training: np.ndarray  # ids the model is trained on: not those of the bank, where the corpus has enough

    def first(self, count: int, planted: np.ndarray | None = None):
        """The first documents, the very first of them in the place of `planted` [n, document_tokens]."""
        ids = self.documents.ids[:count].copy()
        if planted is not None:
            ids[: len(planted)] = planted
        return self.documents._replace(ids=ids, **{name: getattr(self.documents, name)[:count] for name in TABLE})


TABLE = ("lengths", "path_index", "first_line", "last_line")


def read_corpus(config: Config, count: int) -> Corpus:
    """Tokenizer and at least `count` documents: the user's folders, the standard library, then jax's own sources."""
    import jax

    from memjax import data
    from memjax.lm import reading
    from memjax.tasks import needle

    files = data.standard_library()
    for folder in reversed(config.folder):
        found, skipped = data.read_folder(folder, max_bytes=1 << 26)  # dictionaries are one file each
        files = [*found, *files]
        if skipped:
            print(f"{folder}: {len(skipped)} files are no text, such as {skipped[0].path}: {skipped[0].reason}")
    tokenizer = data.train_bpe([f.text for f in files], vocab_size=config.vocab)
    documents = data.cut(files, tokenizer, config.document_tokens, align="tokens")
    if len(documents.ids) < count:  # Python's own text ends a little below 4M tokens
        files += data.read_folder(Path(jax.__file__).parent, extensions=(".py",))[0]
        documents = data.cut(files, tokenizer, config.document_tokens, align="tokens")
    if (has := len(documents.ids)) < count:
        raise SystemExit(f"--tokens {config.tokens} needs {count} documents, the corpus has {has}: name a --folder")
    order = np.random.default_rng(7).permutation(has)
    documents = documents._replace(**{name: getattr(documents, name)[order] for name in ("ids", *TABLE)})
    rest = documents.ids[count:]
    train, held_out = needle.split_words(needle.common_words(f.text for f in files), 600)
    return Corpus(
        tokenizer,
        documents,
        train,
        held_out,
        reading.special_ids(tokenizer),
        rest if len(rest) >= 4096 else documents.ids,
    )


def twins(rng: np.random.Generator, asked: list) -> list:
    """Needles in pairs that share one word of their keys: the first or the second."""
    out = list(asked)
    for i in range(1, len(asked), 2):
        mine, theirs = asked[i].key.split(), asked[i - 1].key.split()
        keep = int(rng.integers(2))
        mine[keep] = theirs[keep]
        out[i] = asked[i]._replace(key=" ".join(mine))
    return out


def training_batch(config: Config, corpus: Corpus):
    """rng -> a batch of memjax.train.retrieval: needles in a pool of documents, questions, what is read to answer."""
    from memjax.lm import reading
    from memjax.tasks import needle

    encode, special = corpus.tokenizer.encode, corpus.special
    width = 2 * (config.document_tokens + 1) + PADDED_QUESTION + PADDED_ANSWER

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        pool = corpus.training[rng.integers(0, len(corpus.training), config.pool_documents)]
        gold = rng.permutation(config.pool_documents)[: config.batch]
        asked = twins(rng, needle.needles(rng, corpus.train_words, config.batch))
        for at, one in zip(gold, asked, strict=True):
            pool[at] = needle.plant(rng, pool[at], encode(one.sentence))
        # Beside the right document stands its twin's, so that copying must match the whole key, or the same once more,
        # since what is read twice teaches copying fastest, or any other.
        kind = rng.random(config.batch)
        any_other = rng.integers(0, config.pool_documents, config.batch)
        twin = gold[np.arange(config.batch) ^ 1]
        other = np.where(kind < 0.5, twin, np.where(kind < 0.85, gold, any_other))
        questions = [reading.encode_question(corpus.tokenizer, one.question) for one in asked]
        answers = [np.append(encode(one.answer), special["<end>"]) for one in asked]
        texts = []
        for i, q in enumerate(questions):
            pair = [pool[gold[i]], pool[other[i]]]
            texts.append(
                np.concatenate([reading.reading(special, pair if rng.random() < 0.5 else pair[::-1], q), answers[i]])
            )
        question, question_valid = reading.pad_left([reading.question(special, q) for q in questions], PADDED_QUESTION)
        text, text_valid = reading.pad_left(texts, width)
        answer = np.arange(width)[None] >= width - np.array([len(a) for a in answers])[:, None]
        return {
            "documents": pool, "document_valid": np.ones(pool.shape, bool), "gold": gold.astype(np.int32),
            "question": question, "question_valid": question_valid,
            "reading": text, "reading_valid": text_valid, "answer": answer,
        }  # fmt: skip

    return make


def train(config: Config, corpus: Corpus, model, seed: int, home: Path):
    import jax

    from memjax import data
    from memjax.train.retrieval import TOGETHER, fit_phases

    key = jax.random.key(seed)
    return fit_phases(
        model,
        model.init(key),
        lambda phase: data.generated(training_batch(config, corpus), seed=seed),
        steps=config.steps,
        key=key,
        phases=TOGETHER,
        learning_rate=config.learning_rate,
        adam_learning_rate=config.adam_learning_rate,
        directory=home,
        save_every=200,
    ).params


def build(config: Config, corpus: Corpus, model, params, model_hash: str, planted, path: Path) -> dict[str, Any]:
    """Write the bank of the first documents to `path`, needles planted; its size and the tokens read per second."""
    from memjax import to_config
    from memjax.in_storage.bank_files import BankWriter
    from memjax.lm import pooling
    from memjax.train import Progress

    count = parse_tokens(config.tokens) // config.document_tokens
    router = pooling.router_layers(model)
    kept = {
        "layers": len(router), "kv_heads": router[0].kv_heads, "head_dim": router[0].head_dim, "vocab": config.vocab,
        "model_hash": model_hash, "model_config": to_config(model), "tokenizer_hash": corpus.tokenizer.hash,
    }  # fmt: skip
    documents = corpus.first(count, planted)
    next(pooling.pool_blocks(model, params, corpus.first(1), BLOCK))  # compile
    began = time.perf_counter()
    with (
        BankWriter(path, overwrite=True, **kept) as writer,
        Progress(count * config.document_tokens, "bank", unit="token") as bar,
    ):
        for block in pooling.pool_blocks(model, params, documents, BLOCK):
            writer.append(block)
            bar.update(len(block.doc_len) * config.document_tokens)
    seconds = time.perf_counter() - began
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    tokens = count * config.document_tokens
    return {
        "documents": count,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "tokens_per_second": tokens / seconds,
    }


def questions(config: Config, corpus: Corpus) -> list[tuple[np.ndarray, list, np.ndarray]]:
    """For each draw: the first 16K tokens with needles planted, the needles, and the document of each."""
    from memjax.tasks import needle

    prefix = corpus.first(PREFIX // config.document_tokens).ids
    out = []
    for draw in range(config.draws):
        rng = np.random.default_rng([draw, 1])
        documents, asked = prefix.copy(), needle.needles(rng, corpus.held_out, config.questions)
        gold = rng.permutation(len(prefix))[: config.questions]
        for at, one in zip(gold, asked, strict=True):
            documents[at] = needle.plant(rng, documents[at], corpus.tokenizer.encode(one.sentence))
        out.append((documents, asked, gold))
    return out


def ask(config: Config, corpus: Corpus, model, params, planted, path: Path) -> list[dict[str, Any]]:
    """Put the same questions to every prefix of the bank."""
    import jax
    import jax.numpy as jnp

    from memjax.in_storage.bank_files import open_bank
    from memjax.lm import pooling, reader
    from memjax.tasks import needle

    whole, rows = open_bank(path, location="device").bank, []
    chunks = config.document_tokens // config.pool
    for size in sizes(config):
        n = size // config.document_tokens
        cut = {name: getattr(whole, name)[:, : n * chunks] for name in ("rk", "k", "v")}
        bank = whole._replace(
            **cut, chunk_doc=whole.chunk_doc[: n * chunks], doc_start=whole.doc_start[:n], doc_len=whole.doc_len[:n]
        )
        found, right, seconds = [], [], []
        for documents, asked, gold in planted:
            texts = corpus.first(n, documents)
            blocks = list(pooling.pool_blocks(model, params, corpus.first(len(documents), documents), BLOCK))
            new = {name: np.concatenate([getattr(b, name) for b in blocks], 1) for name in ("rk", "k", "v")}
            bank = bank._replace(
                **{name: getattr(bank, name).at[:, : a.shape[1]].set(jnp.asarray(a)) for name, a in new.items()}
            )
            for at in range(0, len(asked), ASKED):
                batch = asked[at : at + ASKED]
                for timed in (False, True) if not seconds else (True,):  # the first batch of a size compiles
                    began = time.perf_counter()
                    got = reader.answer(
                        model, params, bank, corpus.tokenizer, [one.question for one in batch],
                        texts.ids.__getitem__, steps=PADDED_ANSWER, question_width=PADDED_QUESTION,
                        reading_width=2 * (config.document_tokens + 1) + PADDED_QUESTION,
                    )  # fmt: skip
                    if timed:
                        seconds.append((time.perf_counter() - began) / len(batch))
                chosen = got.routing.documents[:, :, :4] == gold[at : at + ASKED][None, :, None]
                found.append(chosen.any(-1))
                said = [reader.answer_text(corpus.tokenizer, tokens) for tokens in got.tokens]
                right += [needle.is_correct(text, one) for text, one in zip(said, batch, strict=True)]
        recall = np.concatenate(found, 1)
        rows.append({
            "tokens": size, "documents": n, "recall_at_4": recall.mean(1).tolist(), "accuracy": float(np.mean(right)),
            "seconds_per_question": statistics.median(seconds), "seconds": seconds,
            "found": recall.astype(int).tolist(), "right": np.asarray(right, int).tolist(),
        })  # fmt: skip
        line = rows[-1]
        recalls = " ".join(f"{r:.3f}" for r in line["recall_at_4"])
        print(
            f"  {tokens(size):>5} tokens: recall@4 {recalls}, answers {line['accuracy']:.3f}, "
            f"{1e3 * line['seconds_per_question']:.1f} ms a question",
            flush=True,
        )
        jax.clear_caches()  # each size compiles its own search
    return rows


def relative_drop(rows: list[dict[str, Any]], seed: int = 0) -> None:
    """Add to each row its drop in accuracy from the first one, relative, with a paired 95 % bootstrap interval."""
    rng, base = np.random.default_rng(seed), np.asarray(rows[0]["right"], float)
    for row in rows:
        now = np.asarray(row["right"], float)
        resampled = rng.integers(0, len(base), (4000, len(base)))
        b, n = base[resampled].mean(1), now[resampled].mean(1)
        low, high = np.quantile(1 - n / np.maximum(b, 1e-9), [0.025, 0.975])
        known = base.mean() > 0  # nothing right at the start: no drop to speak of
        row["drop"] = float(1 - now.mean() / base.mean()) if known else None
        row["drop_interval"] = [float(low), float(high)] if known else None


def table(body: dict[str, Any]) -> None:
    """Print what a record says: one row a size, mean over the seeds (spread in brackets)."""
    from rich.console import Console
    from rich.table import Table

    runs = body["runs"]
    seeds = f"{len(runs)} training seed{'s' * (len(runs) > 1)}"
    out = Table(title=f"needles in a growing memory, {seeds}", title_justify="left")
    for name in ("tokens", "documents", "recall@4", "answers", "drop % (95 %)", "ms each"):
        out.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(runs[0]["sizes"]):
        same = [run["sizes"][i] for run in runs]
        recall = np.array([r["recall_at_4"] for r in same]).mean(0)
        drops = [r["drop"] for r in same if r["drop"] is not None]
        low, high = ([r["drop_interval"][j] for r in same if r["drop_interval"]] for j in (0, 1))
        out.add_row(
            tokens(row["tokens"]),
            f"{row['documents']:,}",
            " ".join(f"{r:.3f}" for r in recall),
            f"{np.mean([r['accuracy'] for r in same]):.3f}",
            f"{100 * np.mean(drops):+.1f} ({100 * min(low):+.1f} to {100 * max(high):+.1f})" if drops else "",
            f"{1e3 * statistics.median(r['seconds_per_question'] for r in same):.1f}",
        )
    rate = statistics.median(run["bank"]["tokens_per_second"] for run in runs)
    seconds = statistics.median(run["train_seconds"] for run in runs)
    console = Console()
    console.print(out)
    console.print(
        "recall@4: for each router layer; drop: relative to the first row, paired over questions; ms: a question\n"
        f"trained {seconds:.0f} s with {body['trained_on']:,} tokens of memory; "
        f"bank: {runs[0]['bank']['bytes_per_token']:.1f} bytes a token, built at {rate:,.0f} tokens/s"
    )


def sizes(config: Config) -> list[int]:
    """16K, then four times as much until the whole."""
    whole, out = parse_tokens(config.tokens), [PREFIX]
    while out[-1] * 4 < whole:
        out.append(out[-1] * 4)
    return [*out, whole] if whole > out[-1] else out


def parse_tokens(text: str) -> int:
    """ "4M" -> 4194304."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdigit() or int(digits) * unit < PREFIX:
        raise SystemExit(f"--tokens is {text!r}, needs a number of at least 16K, such as 65536, 64K or 4M")
    return int(digits) * unit


def main(config: Config) -> dict[str, Any]:
    config = begun(config, QUICK)
    for wrong, need in (
        (config.document_tokens % config.pool, "--document-tokens a multiple of --pool"),
        (config.batch % 2, "an even --batch"),
        (config.batch > config.pool_documents, "--batch at most --pool-documents"),
        (config.dim % config.heads, "--dim a multiple of --heads"),
    ):
        if wrong:
            raise SystemExit(f"needle_bank: needs {need}")
    import jax

    from memjax import plots
    from memjax.lm.files import ReadingSettings, save_model

    device = jax.devices()[0]
    print(f"{device.platform} x {jax.device_count()} ({device.device_kind}), jax {jax.__version__}", flush=True)
    count = parse_tokens(config.tokens) // config.document_tokens
    print(f"reading the corpus for {count:,} documents of {config.document_tokens} tokens", flush=True)
    corpus, model = read_corpus(config, count), build_model(config)
    planted = questions(config, corpus)
    print(f"{len(corpus.documents.ids):,} documents; a model of {model.param_bytes() // 4:,} parameters", flush=True)
    body: dict[str, Any] = {
        "config": settings(config),
        "trained_on": config.pool_documents * config.document_tokens,
        "runs": [],
    }
    for seed in config.seeds:
        home = config.output / ("quick" if config.quick else f"seed-{seed}")
        began = time.perf_counter()
        params = train(config, corpus, model, seed, home)
        seconds = time.perf_counter() - began
        reading = ReadingSettings(config.document_tokens, passages=2, answer_tokens=PADDED_ANSWER)
        model_hash = save_model(home / "model", model, params, corpus.tokenizer, reading=reading, overwrite=True)
        bank = build(config, corpus, model, params, model_hash, planted[0][0], home / "bank")
        rows = ask(config, corpus, model, params, planted, home / "bank")
        relative_drop(rows)
        metrics = [json.loads(line) for line in (home / "phase-0" / "metrics.jsonl").read_text().splitlines()]
        body["runs"].append({"seed": seed, "train_seconds": seconds, "bank": bank, "sizes": rows, "metrics": metrics})
        for phase in home.glob("phase-*"):  # done: the next run trains again
            shutil.rmtree(phase)
    table(body)
    if path := recorded("needle_bank", body, config):
        plots.plot_needle_bank(path, path.with_suffix(".png"))
        print(f"ask it: memjax bank ask {home / 'bank'} --model {home / 'model'} '{planted[0][1][0].question}'")
    return body


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
