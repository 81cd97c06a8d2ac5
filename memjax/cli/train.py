"""`memjax train`: a language model of any memory of the catalog, on text."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memjax.cli.console import Command, json_object, report_skipped, size
from memjax.cli.generate import Generate, continue_text
from memjax.cli.listing import entry
from memjax.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a language model on text; the same command again goes on where it stopped."""

    data: Path
    """A folder whose texts are read (source code, web pages, notebooks and PDFs too), or one file."""
    mixer: str = "gla"
    """The memory in each layer, a name of `memjax list`."""
    config: str | None = None
    """JSON, or a file of it: fields of the mixer ('{"heads": 2}'); with "class", a mixer or a whole model."""
    directory: Path | None = None
    """Where checkpoints, metrics, loss.png and the model go; default: runs/MIXER."""
    tokenizer: str = "bpe"
    """"bpe" (trained on the data), "bytes", or a tokenizer.json."""
    vocab: int = 1024
    """Tokens of the BPE that is trained."""
    steps: int = 300
    """Updates altogether, those of earlier sessions included."""
    dim: int = 128
    layers: int = 4
    context: int = 256
    """Tokens of a training window."""
    batch: int = 8
    """Windows of an update."""
    learning_rate: float = 0.01
    """Of Muon, for matrices."""
    adam_learning_rate: float = 0.005
    """Of Adam, for embeddings, vectors and gates."""
    save_every: int = 100
    """Updates between checkpoints."""
    seed: int = 0

    def run(self) -> None:
        import jax

        from memjax import data, plots
        from memjax.lm.files import save_model
        from memjax.memory import to_config
        from memjax.train import JSONLWriter, fit, lm_loss, make_optimizer
        from memjax.train.checkpoint import finished_steps

        out = self.start()
        for name in ("steps", "dim", "layers", "context", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, needs at least 1")
        files, skipped = data.read_folder(self.data)
        report_skipped(out, skipped)
        tokenizer = self._tokenizer(files)
        ids = _one_row(files, tokenizer)
        if len(ids) <= self.context:
            raise DataError(f"{self.data}: has {len(ids)} tokens, needs more than --context {self.context}")
        model = self._model(tokenizer.vocab_size)
        directory = self.directory or Path("runs") / self.mixer
        out.print(f"data   {len(files):,} files, {len(ids):,} tokens, vocabulary {tokenizer.vocab_size:,}")
        shape = f"{model.param_bytes() // 4:,} parameters, state {size(model.state_bytes(1))} a row"
        out.print(f"model  {self._title()}, {shape}")
        steps = finished_steps(directory)
        out.print(f"run    {directory}" + (f", resumed at step {steps[-1]:,}" if steps else ""), soft_wrap=True)

        _remove_left_overs(directory)
        if not steps:
            directory.mkdir(parents=True, exist_ok=True)
            tokenizer.save(directory / "tokenizer.json")
        optimizer = make_optimizer(
            model, steps=self.steps, learning_rate=self.learning_rate, adam_learning_rate=self.adam_learning_rate
        )
        key = jax.random.key(self.seed)
        settings = {"context": self.context, "batch": self.batch, "seed": self.seed}
        try:
            params = fit(
                lm_loss(model),
                jax.jit(model.init)(key),
                data.token_windows(ids, self.context, batch=self.batch, seed=self.seed),
                optimizer=optimizer,
                steps=self.steps,
                key=key,
                directory=directory,
                config={"corpus": _digest(ids), "settings": settings, "memory": to_config(model)},
                save_every=self.save_every,
                writers=[JSONLWriter(directory / "metrics.jsonl")],
                tokens_per_step=self.batch * self.context,
            ).params
        except KeyboardInterrupt:
            kept = finished_steps(directory)
            hint = f"step {kept[-1]:,} is saved, the same command goes on from there" if kept else "nothing was saved"
            raise KeyboardInterrupt(hint) from None
        save_model(directory / "model", model, params, tokenizer, overwrite=True)
        plots.plot_loss(directory / "metrics.jsonl", directory / "loss.png")
        out.print(f"saved  {directory / 'model'}, {directory / 'loss.png'}", soft_wrap=True)
        out.print("sample", style="bold")
        continue_text(model, params, tokenizer, "", Generate(model=directory, tokens=64))
        out.print(f'more: memjax generate {directory} "..."', style="dim", soft_wrap=True)

    def _tokenizer(self, files) -> Any:
        from memjax import data

        if self.tokenizer == "bytes":
            return data.ByteTokenizer()
        if self.tokenizer != "bpe":
            return data.load_tokenizer(self.tokenizer)
        try:
            return data.train_bpe((file.text for file in files), self.vocab)
        except ValueError as error:
            raise ConfigError(f"--vocab: {error}") from None

    def _title(self) -> str:
        return "of --config" if '"class"' in (self.config or "") else f"{self.mixer} x {self.layers}, dim {self.dim}"

    def _model(self, vocab: int) -> Any:
        """The whole model of --config, or `layers` blocks of the mixer."""
        from memjax.combinators import Repeat
        from memjax.lm import LanguageModel, block
        from memjax.memory import from_config

        fields = _read_json(self.config)
        if "class" in fields:
            mixer = from_config(fields)
        else:
            known = entry(self.mixer)
            mixer = from_config({"class": known.path, **self._fields(known.cls, vocab), **fields})
        if mixer.takes_ids:
            if mixer.reads_ids < vocab:
                raise ConfigError(f"--config: vocab is {mixer.reads_ids}, the tokenizer has {vocab} tokens")
            return mixer
        if mixer.reads_ids and mixer.reads_ids < vocab:
            raise ConfigError(f"--config: vocab of the mixer is {mixer.reads_ids}, the tokenizer has {vocab} tokens")
        return LanguageModel(Repeat(block(mixer, 4 * mixer.dim), self.layers), vocab)

    def _fields(self, cls: type, vocab: int) -> dict[str, Any]:
        """Fields for a small model: heads as wide together as the model, a window as long as what is trained on."""
        names = inspect.signature(cls).parameters
        heads = max(1, self.dim // 64)
        usual = {"dim": self.dim, "vocab": vocab, "window": self.context}
        if "head_dim" in names:
            usual |= {"heads": heads, "kv_heads": heads, "head_dim": self.dim // heads}
        return {name: value for name, value in usual.items() if name in names}


def _read_json(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    source = "--config"
    try:
        if not text.lstrip().startswith("{"):
            source = f"--config {text}"
            text = Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}, needs JSON or a file of it") from None
    except ValueError as error:
        raise ConfigError(f"{source}: not JSON: {error}") from None
    return json_object(source, text)


def _remove_left_overs(directory: Path) -> None:
    """What a killed run has not given its name; checkpoints see to their own."""
    for pattern in ("model.partial-*", "model.old-*", ".tokenizer.json.*.part"):
        for left_over in directory.glob(pattern):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()


def _one_row(files, tokenizer) -> np.ndarray:
    """All files one after the other, each ended by <eos> where the tokenizer has one."""
    end = [tokenizer.special["<eos>"]] if "<eos>" in tokenizer.special else []
    parts = [part for ids in tokenizer.encode_batch([f.text for f in files]) for part in (ids, end)]
    return np.concatenate(parts).astype(np.int32)


def _digest(ids: np.ndarray) -> dict[str, Any]:
    """What a resumed run compares: another corpus, or another tokenizer, has another hash."""
    return {"tokens": len(ids), "sha256": hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()[:16]}
