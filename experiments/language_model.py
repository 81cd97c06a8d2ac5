"""Language models of memories on real text: bits per byte within the length of training and up to 16 times beyond it.

    python -m experiments.language_model                # the Python standard library, some minutes a memory
    python -m experiments.language_model --memories gated_delta_net --folder ~/texts

A twentieth of the files is held out. After training at `context` tokens, held-out text is read in one stream of 16
times as many, the state carried along, and the loss is averaged over the tokens of each stretch: (0, 1x], (1x, 2x],
(2x, 4x], ... A run that was stopped goes on where it was, and ends with the same numbers to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import begun, recorded, settings

MULTIPLES = (1, 2, 4, 8, 16)
STREAMS = 16  # held-out streams, read side by side


@dataclass(frozen=True)
class Config:
    """What is trained, and on what."""

    memories: tuple[str, ...] = ("gated_delta_net", "mamba2", "gla", "sliding_window_attention")
    """Names of `memjax list`."""
    folder: tuple[Path, ...] = ()
    """Folders whose text is used; none: the Python standard library."""
    seeds: tuple[int, ...] = (0,)
    steps: int = 600
    """Updates of training."""
    dim: int = 128
    layers: int = 4
    heads: int = 2
    head_dim: int = 64
    context: int = 256
    """Tokens of a training window."""
    batch: int = 16
    """Windows of an update."""
    vocab: int = 1024
    """Tokens of the BPE that is trained on the training text."""
    learning_rate: float = 0.01
    """Of Muon, for matrices."""
    adam_learning_rate: float = 0.005
    """Of Adam, for the rest."""
    save_every: int = 50
    device: str | None = None
    """Platform to run on: cpu, gpu or tpu; by default the best that jax finds."""
    output: Path = Path("build/language_model")
    """Folder for checkpoints and results."""
    record: bool = False
    """Put the record into experiments/records instead of the output folder."""
    quick: bool = False
    """One small memory and a few steps: shows that everything runs, not how well."""


QUICK: dict[str, Any] = {
    "memories": ("gla",), "steps": 20, "dim": 32, "layers": 2, "head_dim": 16, "context": 32, "batch": 4, "vocab": 512,
    "save_every": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """training: ids in one row. held_out [STREAMS, n + 1]. bytes_per_token: of the held-out text."""

    tokenizer: Any
    training: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float


def read_corpus(config: Config) -> Corpus:
    """Text, split by a hash of the path, and a tokenizer trained on the training part."""
    from memjax import data

    files = [f for folder in config.folder for f in data.read_folder(folder)[0]] or data.standard_library()
    held = [int(hashlib.sha256(f.path.encode()).hexdigest(), 16) % 20 == 0 for f in files]
    tokenizer = data.train_bpe([f.text for f, h in zip(files, held, strict=True) if not h], vocab_size=config.vocab)
    end = [tokenizer.special["<eos>"]] if "<eos>" in tokenizer.special else []

    def row(which: bool) -> tuple[np.ndarray, float]:
        texts = [f.text for f, h in zip(files, held, strict=True) if h == which]
        ids = np.concatenate([[*part, *end] for part in tokenizer.encode_batch(texts)] or [[]]).astype(np.int32)
        return ids, sum(len(t.encode()) + len(end) for t in texts) / max(1, len(ids))

    (training, _), (rest, bytes_per_token) = row(False), row(True)
    length = MULTIPLES[-1] * config.context + 1
    streams = min(STREAMS, len(rest) // length)
    if not streams:
        raise SystemExit(f"the held-out text has {len(rest)} tokens, --context {config.context} needs {length}")
    return Corpus(tokenizer, training, rest[: streams * length].reshape(streams, length), bytes_per_token)


def train(config: Config, corpus: Corpus, model: Any, seed: int, home: Path) -> Any:
    """The parameters after all steps, from the newest checkpoint of `home` on."""
    import jax

    from memjax import data
    from memjax.memory import to_config
    from memjax.train import JSONLWriter, fit, lm_loss, make_optimizer

    key = jax.random.key(seed)
    digest = hashlib.sha256(corpus.training.tobytes()).hexdigest()[:16]
    return fit(
        lm_loss(model),
        jax.jit(model.init)(key),
        data.token_windows(corpus.training, config.context, batch=config.batch, seed=seed),
        optimizer=make_optimizer(
            model, steps=config.steps, learning_rate=config.learning_rate, adam_learning_rate=config.adam_learning_rate
        ),
        steps=config.steps,
        key=key,
        directory=home,
        config={"corpus": digest, "memory": to_config(model), "batch": config.batch, "seed": seed},
        save_every=config.save_every,
        writers=[JSONLWriter(home / "metrics.jsonl")],
        tokens_per_step=config.batch * config.context,
    ).params


def stretches(config: Config, corpus: Corpus, model: Any, params: Any, carried: bool = True) -> list[float]:
    """Bits per byte of the held-out streams over each stretch of MULTIPLES, read `context` tokens at a time.

    carried: the state goes from piece to piece; False forgets it, which is what a longer memory has to beat.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def read(params, state, ids):
        logits, state = model.apply(params, state, ids[:, :-1])
        chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen), state

    empty = model.init_state(len(corpus.held_out))
    state, nats = empty, []
    for piece in range(MULTIPLES[-1]):
        at = piece * config.context
        ids = jnp.asarray(corpus.held_out[:, at : at + config.context + 1])
        loss, state = read(params, state if carried else empty, ids)
        nats.append(float(loss))
    begins = (0, *MULTIPLES[:-1])
    return [
        statistics.fmean(nats[a:b]) / math.log(2) / corpus.bytes_per_token
        for a, b in zip(begins, MULTIPLES, strict=True)
    ]


def run(config: Config, corpus: Corpus, name: str, seed: int) -> dict[str, Any]:
    """One memory with one seed: what is in its folder already, or what training and reading give."""
    from experiments.memories import language_model

    home = config.output / ("quick" if config.quick else "") / f"{name}-{seed}"
    sizes = {field: getattr(config, field) for field in ("dim", "layers", "heads", "head_dim")}
    model = language_model(name, vocab=corpus.tokenizer.vocab_size, window=config.context, **sizes)
    params = train(config, corpus, model, seed, home)
    return {
        "memory": name,
        "seed": seed,
        "parameters": model.param_bytes() // 4,
        "state_bytes": model.state_bytes(1),
        "bits_per_byte": stretches(config, corpus, model, params),
        "forgetting": stretches(config, corpus, model, params, carried=False),
        "metrics": [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()],
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Print bits per byte of each memory over each stretch, mean over the seeds."""
    from rich.console import Console
    from rich.table import Table

    from memjax.cli.console import size

    out = Table(title="bits per byte beyond the length of training", title_justify="left", box=None)
    out.add_column("memory", overflow="fold")
    for header in ("state", *(f"to {m}x" for m in MULTIPLES), "forgetting"):
        out.add_column(header, justify="right", no_wrap=True)
    for name in dict.fromkeys(row["memory"] for row in rows):
        same = [row for row in rows if row["memory"] == name]
        means = [f"{statistics.fmean(v):.3f}" for v in zip(*(row["bits_per_byte"] for row in same), strict=True)]
        forgetting = statistics.fmean(row["forgetting"][-1] for row in same)
        out.add_row(name, size(same[0]["state_bytes"]), *means, f"{forgetting:.3f}")
    Console().print(out)


def main(config: Config) -> dict[str, Any]:
    config = begun(config, QUICK)
    corpus = read_corpus(config)
    print(f"{len(corpus.training):,} tokens to train on, {corpus.held_out.size:,} held out", flush=True)
    rows = [run(config, corpus, name, seed) for name in config.memories for seed in config.seeds]
    table(rows)
    body = {"config": settings(config), "multiples": MULTIPLES, "runs": rows}
    recorded("language_model", body, config)
    return body


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
