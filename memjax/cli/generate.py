"""`memjax generate`: continue a text with a trained model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from memjax.cli.console import Command, printable, write_stream
from memjax.errors import CheckpointError, ConfigError

BLOCK = 8  # tokens decoded between two prints


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a text with a trained model."""

    model: Positional[Path]
    """Folder of a run of `memjax train`, finished or not, or of a saved model."""
    prompt: Positional[str] = ""
    """Text to continue; empty: begin a document."""
    tokens: int = 200
    """Tokens at most; a document may end earlier."""
    temperature: float = 0.8
    """0 takes the most likely token each time."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that make up this share."""
    seed: int = 0

    def run(self) -> None:
        out = self.start()
        if self.tokens < 1:
            raise ConfigError(f"--tokens is {self.tokens}, needs at least 1")
        model, params, tokenizer = load(self.model)
        out.print(printable(self.prompt), end="", style="bold", markup=False, soft_wrap=True)
        began = time.perf_counter()
        count = continue_text(model, params, tokenizer, self.prompt, self)
        out.print(f"{count} tokens in {time.perf_counter() - began:.1f} s, compilation included", style="dim")


def continue_text(model: Any, params: Any, tokenizer: Any, prompt: str, options: Generate) -> int:
    """Print what the model writes after the prompt; the number of tokens."""
    import jax
    import numpy as np

    from memjax.lm.generate import Sampling, stream

    stop = tokenizer.special.get("<eos>")
    ids = tokenizer.encode(prompt)
    if stop is not None:  # in training a document follows the end of another
        ids = np.concatenate([[stop], ids]).astype(np.int32)
    if not len(ids):
        raise ConfigError("prompt: is empty, and the tokenizer has no '<eos>' to begin with")
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, stop)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    pieces = stream(
        model,
        params,
        jax.jit(model.init_state, static_argnums=0)(1),
        jax.numpy.asarray(ids[None]),
        steps=options.tokens,
        block=BLOCK,
        key=jax.random.key(options.seed),
        sampling=sampling,
    )
    return write_stream(pieces, tokenizer)


def load(path: Path) -> tuple[Any, Any, Any]:
    """Model, parameters and tokenizer of a model folder, of a finished run, or of a run's newest checkpoint."""
    from memjax.data import load_tokenizer
    from memjax.lm.files import is_model, load_model
    from memjax.memory import from_config
    from memjax.train import load_params
    from memjax.train.checkpoint import finished_steps

    for folder in (path, path / "model"):
        if is_model(folder):
            return load_model(folder)[:3]
    if not finished_steps(path):
        raise CheckpointError(f"{path}: holds neither a model (config.json) nor a run's checkpoints (step_*)")
    config, params = load_params(path)
    return from_config(config["memory"]), params, load_tokenizer(path)
