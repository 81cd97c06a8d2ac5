"""`memjax generate`: continue a text, or many in one batch, with a trained model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from tyro.conf import Positional

from memjax.cli.console import Command, printable, size, write_stream
from memjax.errors import CheckpointError, ConfigError

BLOCK = 8  # tokens decoded between two prints
READ = 4096  # tokens of a prompt that are read at once: a longer one takes no more memory


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a text, or many, with a trained model."""

    model: Positional[Path]
    """Folder of a run of `memjax train`, finished or not, of a saved model, or of published weights."""
    prompt: Positional[str] = ""
    """Text to continue; empty: begin a document."""
    prompts: Path | None = None
    """A text file instead: each of its lines is a prompt, and all are continued in one batch."""
    tokens: int = 200
    """Tokens at most; a document may end earlier. 0 with --save-state: read only."""
    state: Path | None = None
    """A saved state to go on from: one for every prompt, or one for each."""
    save_state: Path | None = None
    """Where to save the state behind what was read and written."""
    temperature: float = 0.8
    """0 takes the most likely token each time."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that make up this share."""
    seed: int = 0

    def run(self) -> None:
        out = self.start()
        if self.tokens < (self.save_state is None):
            raise ConfigError(f"--tokens is {self.tokens}, needs at least {int(self.save_state is None)}")
        if self.prompt and self.prompts is not None:
            raise ConfigError(f"--prompts {self.prompts}: there is a prompt on the command line too")
        prompts = [self.prompt] if self.prompts is None else _lines(self.prompts)
        loaded = load(self.model)
        began = time.perf_counter()
        before, prompts = self._before(loaded, prompts)
        count, prefix = continue_all(loaded, before, prompts, self, out)
        out.print(f"{count:,} tokens in {time.perf_counter() - began:.1f} s, compilation included", style="dim")
        if self.save_state is not None:
            from memjax.lm.prefix import save_prefix

            save_prefix(self.save_state, loaded.model, loaded.params, prefix)
            shape = f"{len(prompts)} x {size(loaded.model.state_bytes(1))}"
            out.print(f"saved {self.save_state}, state {shape}", style="dim", soft_wrap=True)

    def _before(self, loaded: Loaded, prompts: list[str]) -> tuple[Any, list[str]]:
        """The saved state with a row for each prompt; without prompts, an empty one for each of its rows."""
        if self.state is None:
            return None, prompts
        from memjax.lm.generate import fork
        from memjax.lm.prefix import load_prefix

        before = load_prefix(self.state, loaded.model, loaded.params)
        rows = len(before.logits)
        if prompts == [""]:
            return before, prompts * rows
        if rows not in (1, len(prompts)):
            raise ConfigError(f"--state {self.state}: has {rows} rows, there are {len(prompts)} prompts")
        return (fork(loaded.model, before, len(prompts)) if rows == 1 else before), prompts


class Loaded(NamedTuple):
    """A model to generate with. begin: the token in front of a document; stop: the one that ends it; None: there is
    none."""

    model: Any
    params: Any
    tokenizer: Any
    begin: int | None
    stop: int | None


def load(path: Path) -> Loaded:
    """A model folder, a finished run, a run's newest checkpoint, or published weights."""
    from memjax.data import load_tokenizer
    from memjax.lm.files import is_model, load_model
    from memjax.lm.weights import is_pretrained, load_pretrained, special_tokens
    from memjax.memory import from_config
    from memjax.train import load_params
    from memjax.train.checkpoint import finished_steps

    for folder in (path, path / "model"):
        if is_model(folder):
            return _of_ours(*load_model(folder)[:3])
    if is_pretrained(path):
        model, params = load_pretrained(path)
        return Loaded(model, params, load_tokenizer(path), *special_tokens(path))
    if not finished_steps(path):
        raise CheckpointError(f"{path}: holds neither a model (config.json) nor a run's checkpoints (step_*)")
    config, params = load_params(path)
    return _of_ours(from_config(config["memory"]), params, load_tokenizer(path))


def continue_text(model: Any, params: Any, tokenizer: Any, prompt: str, options: Generate) -> int:
    """Print what the model writes after the prompt; the number of tokens."""
    from memjax.cli.console import console

    return continue_all(_of_ours(model, params, tokenizer), None, [prompt], options, console())[0]


def continue_all(loaded: Loaded, before: Any, prompts: list[str], options: Generate, out: Console) -> tuple[int, Any]:
    """Print the prompts and what the model writes after them: how many tokens, and the `Prefix` behind all.

    before: what was read already, a `Prefix` with a row for each prompt, or None.
    """
    import jax
    import numpy as np

    from memjax.lm.generate import Sampling, stream, stream_text

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, loaded.stop)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    prefix = _read(loaded, before, prompts)
    pieces: Iterator[tuple[Any, Any]] = iter(())
    if options.tokens:
        key = jax.random.key(options.seed)
        pieces = stream(
            loaded.model, loaded.params, prefix, steps=options.tokens, block=BLOCK, key=key, sampling=sampling
        )
    last, written = prefix, 0

    def kept() -> Iterator[tuple[Any, Any]]:
        nonlocal last, written
        for tokens, last in pieces:
            written += int((np.asarray(tokens) >= 0).sum())
            yield tokens, last

    if len(prompts) == 1:
        out.print(printable(prompts[0]), end="", style="bold", markup=False, soft_wrap=True)
        write_stream(stream_text(kept(), loaded.tokenizer))
    else:
        _write_rows(kept(), loaded.tokenizer, prompts, options.tokens, out)
    return written, last


def _read(loaded: Loaded, before: Any, prompts: list[str]) -> Any:
    """The prefix behind the prompts, which are padded to one length."""
    import numpy as np

    from memjax.lm.generate import read

    rows = loaded.tokenizer.encode_batch(prompts)
    if before is None and loaded.begin is not None:
        rows = [np.concatenate([[loaded.begin], ids]) for ids in rows]
    if before is None and not all(map(len, rows)):
        raise ConfigError("prompt: is empty, and the tokenizer has no '<eos>' to begin with")
    width = max(map(len, rows))
    if width == 0:
        return before
    ids, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], valid[i, : len(row)] = row, True
    block = READ if width > READ and not loaded.model.has_store else None
    state = _empty(loaded.model, len(rows)) if before is None else before
    return read(loaded.model, loaded.params, state, ids, valid=valid, block=block)


def _empty(model: Any, rows: int) -> Any:
    import jax

    return jax.jit(model.init_state, static_argnums=0)(rows)


def _write_rows(pieces: Iterator[Any], tokenizer: Any, prompts: list[str], tokens: int, out: Console) -> None:
    """Print all rows at the end, since they are written side by side."""
    import numpy as np

    from memjax.train.progress import Progress

    written: list[list[int]] = [[] for _ in prompts]
    with Progress(tokens, "writing", unit="token", console=out) as bar:
        for piece, _ in pieces:
            for row, ids in zip(written, np.asarray(piece).tolist(), strict=True):
                row += [i for i in ids if i >= 0]
            bar.update(piece.shape[1])
    for i, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
        out.print(f"[{i + 1}/{len(prompts)}]", style="dim", markup=False)
        out.print(printable(prompt), end="", style="bold", markup=False, soft_wrap=True)
        sys.stdout.write(printable(tokenizer.decode(ids)) + "\n")
        sys.stdout.flush()


def _of_ours(model: Any, params: Any, tokenizer: Any) -> Loaded:
    stop = tokenizer.special.get("<eos>")  # in training a document follows the end of another, so it begins one too
    return Loaded(model, params, tokenizer, stop, stop)


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file}: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise ConfigError(f"--prompts {file}: is empty, needs a prompt on each line")
    return lines
