"""A small model reads a corpus once into a bank, then answers questions over a memory far longer than its training.

    python -m experiments.needle_bank                     train, build, ask; a table, a record and a picture
    python -m experiments.needle_bank --quick             the same path in a minute or two, to see that it works
    python -m experiments.needle_bank --seeds 0 1 2       the committed record
    python -m experiments.needle_bank --folder DIR        with the text of a folder of yours in the corpus

The corpus is text that is on every machine with Python, cut into documents of 64 tokens. Needles (sentences of the RULER
kind, words held out from training) are planted in the first 16K tokens; the same questions are asked while the bank
grows around them. The model routes over the whole bank, reads the best two documents, and copies the answer.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

PADDED_QUESTION, PADDED_ANSWER = 28, 8


@dataclass(frozen=True)
class Config:
    """What is trained, built and asked."""

    tokens: str = "4M"
    """Tokens in the largest bank: a number, or one with K or M (of 1024)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; each is a run of its own, all go into one record."""
    folder: tuple[Path, ...] = ()
    """Folders whose text is put in front of the standard library's."""
    steps: int = 700
    """Updates of training."""
    questions: int = 128
    """Needles in each draw."""
    draws: int = 4
    """Draws of needles, each planted anew in the first 16K tokens."""
    dim: int = 96
    layers: int = 4
    heads: int = 4
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
    output: Path | None = None
    """Folder for bank, checkpoints, record and picture; by default the record goes to experiments/records."""
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
        dim=d, heads=config.heads, kv_heads=config.heads, head_dim=d // config.heads, window=256, template=0,
        query_start=4, theta=1e4, qk_norm_init=math.sqrt(3.0),
    )  # fmt: skip
    below = DocumentAttention(**attention)
    router = MSA(
        **attention, rotary=False, pool=config.pool, top_k=4, capacity=documents * chunks, documents=documents,
        max_chunks=4 * chunks, equal_routers=True,
    )  # fmt: skip
    routers = config.layers // 2
    mixers = [below] * (config.layers - routers) + [router] * routers
    body = Stack(tuple(block(Stack((Canon(d), mixer)), 3 * d) for mixer in mixers))
    return LanguageModel(body, config.vocab, embed_std=1.0, logit_scale=d**-0.5)


BLOCK = 256  # documents read at once when a bank is built


@dataclass(frozen=True)
class Corpus:
    tokenizer: Any
    documents: np.ndarray  # int32 [n, document_tokens], every one full and distinct
    train_words: list[str]
    held_out: list[str]
    special: dict[str, int] = field(default_factory=dict)


def read_corpus(config: Config, count: int) -> Corpus:
    """Tokenizer and at least `count` documents: the user's folders, the standard library, then jax's own sources."""
    import jax

    from memjax import data
    from memjax.lm import reading
    from memjax.tasks import needle

    files = [f for folder in config.folder for f in data.read_folder(folder)[0]] + data.standard_library()
    tokenizer = data.train_bpe([f.text for f in files], vocab_size=config.vocab)
    documents = data.cut(files, tokenizer, config.document_tokens, align="tokens").ids
    if len(documents) < count:  # Python's own text ends a little below 4M tokens
        files += data.read_folder(Path(jax.__file__).parent, extensions=(".py",))[0]
        documents = data.cut(files, tokenizer, config.document_tokens, align="tokens").ids
    if len(documents) < count:
        raise SystemExit(
            f"--tokens {config.tokens} needs {count} documents, the corpus has {len(documents)}: name a --folder with more text"
        )
    documents = documents[np.random.default_rng(7).permutation(len(documents))]
    train, held_out = needle.split_words(needle.common_words(f.text for f in files), 600)
    return Corpus(tokenizer, documents, train, held_out, reading.special_ids(tokenizer))


def training_batch(config: Config, corpus: Corpus):
    """rng -> a batch of memjax.train.retrieval: needles in a pool of documents, questions, and what is read to answer."""
    from memjax.lm import reading
    from memjax.tasks import needle

    encode, special = corpus.tokenizer.encode, corpus.special
    width = 2 * (config.document_tokens + 1) + PADDED_QUESTION + 1 + PADDED_ANSWER

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        pool = corpus.documents[rng.integers(0, len(corpus.documents), config.pool_documents)].copy()
        gold = rng.permutation(config.pool_documents)[: config.batch]
        asked = needle.needles(rng, corpus.train_words, config.batch)
        for at, one in zip(gold, asked, strict=True):
            pool[at] = needle.plant(rng, pool[at], encode(one.sentence))
        # a distractor is mostly another question's document: copying must find the key, not just any number
        other = np.where(rng.random(config.batch) < 0.75, np.roll(gold, 1), rng.integers(0, config.pool_documents, config.batch))
        questions = [encode(one.question) for one in asked]
        answers = [np.append(encode(one.value), special["<end>"]) for one in asked]
        texts = []
        for i, q in enumerate(questions):
            pair = [pool[gold[i]], pool[other[i]]]
            texts.append(np.concatenate([reading.reading(special, pair if rng.random() < 0.5 else pair[::-1], q), answers[i]]))
        question, question_valid = reading.pad_left([reading.question(special, q) for q in questions], PADDED_QUESTION)
        text, text_valid = reading.pad_left(texts, width)
        answer = np.arange(width)[None] >= width - np.array([len(a) for a in answers])[:, None]
        return {
            "documents": pool, "document_valid": np.ones(pool.shape, bool), "gold": gold.astype(np.int32),
            "question": question, "question_valid": question_valid,
            "reading": text, "reading_valid": text_valid, "answer": answer,
        }  # fmt: skip

    return make


def train(config: Config, corpus: Corpus, model, seed: int, directory: Path | None):
    import jax

    from memjax import data, to_config
    from memjax.train import JSONLWriter, fit, make_optimizer
    from memjax.train.retrieval import retrieval_loss

    optimizer = make_optimizer(
        model, steps=config.steps, learning_rate=config.learning_rate, adam_learning_rate=config.adam_learning_rate
    )
    key = jax.random.key(seed)
    where = {"directory": directory / "checkpoints", "config": to_config(model), "save_every": 200} if directory else {}
    return fit(
        retrieval_loss(model),
        model.init(key),
        data.generated(training_batch(config, corpus), seed=seed),
        optimizer=optimizer,
        steps=config.steps,
        key=key,
        log_every=25,
        writers=[JSONLWriter(directory / "metrics.jsonl")] if directory else [],
        **where,
    ).params


def pool(model, params, documents: np.ndarray):
    """k, v, rk [n, M, g, d] of documents, block by block, and their lengths in chunks; numpy, bfloat16."""
    from memjax.lm import reader

    blocks = []
    for at in range(0, len(documents), BLOCK):
        rows = documents[at : at + BLOCK]
        valid = np.arange(BLOCK)[:, None] < np.full((1, rows.shape[1]), len(rows))
        rows = np.concatenate([rows, np.zeros((BLOCK - len(rows), rows.shape[1]), np.int32)])
        pooled = reader.pool_documents(model, params, rows, valid)
        used = int(pooled.count[0, 0])
        blocks.append([np.asarray(a)[:, :used] for a in pooled[:3]] + [np.asarray(pooled.doc_len)[:len(documents) - at]])
        yield blocks[-1], min(at + BLOCK, len(documents)) - at


def main(config: Config) -> dict[str, Any]:
    from experiments import record

    if config.quick:
        config = replace(config, **QUICK)
    body: dict[str, Any] = {"config": json.loads(json.dumps(asdict(config), default=str)), "runs": []}
    return body


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
