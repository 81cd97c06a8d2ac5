"""The training loop: one jitted step, metrics, checkpoints, exact resume.

Nothing here waits for the device between log lines: a step is dispatched, and while it runs the next batch is fetched
and put on the device. Metrics stay device arrays until the step after theirs is under way.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memjax.errors import ConfigError, DataError, MemjaxError
from memjax.train import checkpoint
from memjax.train.losses import Loss
from memjax.train.metrics import MultiWriter, Writer
from memjax.train.optimizer import lenient
from memjax.train.progress import Progress


class DivergedError(MemjaxError, FloatingPointError):
    """A loss or gradient became NaN or infinite."""


class FitResult(NamedTuple):
    """step: updates done altogether. history: one dict a log line of this session, with "step"."""

    params: Any
    opt_state: Any
    step: int
    history: list[dict[str, float | int]]


def fit(
    loss: Loss,
    params: Any,
    data: Iterable[dict[str, Any]],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Array,
    directory: str | os.PathLike[str] | None = None,
    config: dict[str, Any] | None = None,
    save_every: int | None = None,
    keep: int = 2,
    log_every: int = 10,
    writers: Sequence[Writer] = (),
    progress: bool = True,
    tokens_per_step: int | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> FitResult:
    """Train until `steps` updates are done; from the newest checkpoint of `directory`, where there is one.

    Args:
      loss: (params, batch, key) -> (scalar, dict of scalar metrics); see `memjax.train.losses.lm_loss`.
      params: a pytree of arrays; copied, so that the caller's stay usable. Shardings are kept.
      data: gives batches, dicts of arrays [b, ...]. With `directory` its iterator needs `get_state` and `set_state`
        (a grain dataset has them), so that a resumed run goes on with the batch after the last one trained on.
      optimizer: `make_optimizer`, or anything of optax.
      steps: updates altogether, those before a resume included.
      key: step i (from 0) gets `fold_in(key, i)`, in whichever session it runs. A resumed run takes the stored key.
      directory: of checkpoints, one at the end at least; None keeps nothing.
      config: stored in each checkpoint; resuming with another one raises. Needed with `directory`.
      save_every: updates between checkpoints; None: only at the end.
      keep: how many checkpoints stay, the newest.
      log_every: updates between log lines, beside the first and the last update.
      writers: get each log line: "loss", the metrics of `loss`, "grad_norm", and "tokens_per_second" where
        `tokens_per_step` (over all devices) is given.
      progress: show a bar, or plain lines where the output is no terminal.
      batch_sharding: where a batch goes; each process gives its own rows of it. None: the default device.

    On Ctrl-C the step under way is finished, a checkpoint written, and KeyboardInterrupt raised; a second Ctrl-C stops
    at once. An interrupted and resumed run equals an undisturbed one bit for bit.

    Raises:
      DivergedError: "loss" or "grad_norm" is not finite, seen at the next log line or checkpoint, which is not written.
      DataError: the data ended early, or cannot be resumed although `directory` is given.
      ConfigError: a number that makes no sense, or `directory` without `config`.
      CheckpointError: the newest checkpoint is damaged or of another config.
    """
    for name, value in (
        ("steps", steps),
        ("save_every", 1 if save_every is None else save_every),
        ("keep", keep),
        ("log_every", log_every),
    ):
        if value < 1:
            raise ConfigError(f"fit: {name} is {value}, needs at least 1")
    batches = iter(data)
    if directory is not None and config is None:
        raise ConfigError("fit: config is None, needed with directory: a checkpoint says what it is a checkpoint of")
    if directory is not None and not (hasattr(batches, "get_state") and hasattr(batches, "set_state")):
        raise DataError(f"fit: data gives a {type(batches).__name__}, needs get_state and set_state to be resumed")

    opt_state = optimizer.init(params)
    done = 0
    if directory is not None and checkpoint.finished_steps(directory):
        done, params, opt_state, key, _ = checkpoint.restore(
            directory, params=params, opt_state=opt_state, config=config, data_iterator=batches
        )
        checkpoint.delete_old(directory, keep)  # as the session would have done that was killed before
    else:
        params = jax.tree.map(jnp.copy, params)  # the step donates its arguments

    update = jax.jit(partial(_update, loss, lenient(optimizer)), donate_argnums=(0, 1))
    log = _Log(MultiWriter(writers), tokens_per_step, directory)
    bar = Progress(steps, "train", unit="step", done=done, enabled=progress)
    with bar, _deferred_interrupt() as interrupted:
        for step in range(done + 1, steps + 1):
            batch = _place(_next(batches, step, steps), batch_sharding)
            params, opt_state, metrics = update(params, opt_state, batch, key, np.int32(step - 1))
            log.write_waiting()
            if step == 1 or step % log_every == 0 or step == steps:
                log.waiting = (step, metrics)
            stop = interrupted()
            saving = step == steps or stop or (save_every is not None and step % save_every == 0)
            if saving:
                log.write_waiting()
            bar.update(1, **log.latest)
            if saving and directory is not None and config is not None:
                log.fetch(step, metrics)  # raises before a diverged state is kept
                checkpoint.save(
                    directory,
                    step,
                    params=params,
                    opt_state=opt_state,
                    key=key,
                    config=config,
                    data_iterator=batches,
                )
                checkpoint.delete_old(directory, keep)
                log.restart_clock(step)
            if stop:
                break
        if interrupted():
            raise KeyboardInterrupt
    return FitResult(params, opt_state, max(done, steps), log.history)


def _update(loss: Loss, optimizer, params, opt_state, batch, key, index):
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), grads = grad(params, batch, jax.random.fold_in(key, index))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}
    return optax.apply_updates(params, updates), opt_state, metrics


def _next(batches: Iterator, step: int, steps: int) -> dict[str, Any]:
    try:
        return next(batches)
    except StopIteration:
        raise DataError(f"fit: data ended after {step - 1} batches, needs {steps}; repeat it or ask for less") from None


def _place(batch: dict[str, Any], sharding: jax.sharding.Sharding | None) -> dict[str, Any]:
    if sharding is None:
        return jax.tree.map(jnp.asarray, batch)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


class _Log:
    """Brings metrics to the host one step late, when the device already has its next work."""

    def __init__(self, writer: Writer, tokens_per_step: int | None, directory: str | os.PathLike[str] | None):
        self.writer, self.tokens_per_step, self.directory = writer, tokens_per_step, directory
        self.waiting: tuple[int, dict[str, Array]] | None = None
        self.history: list[dict[str, float | int]] = []
        self.latest: dict[str, float] = {}
        self._clock: tuple[int, float] | None = None

    def write_waiting(self) -> None:
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = self.fetch(step, metrics)
        now = time.perf_counter()
        if self.tokens_per_step is not None and self._clock is not None:  # the first line's time is mostly compilation
            then, at = self._clock
            values["tokens_per_second"] = (step - then) * self.tokens_per_step / max(now - at, 1e-9)
        self.restart_clock(step)
        self.history.append({"step": step, **values})
        self.latest = {name: values[name] for name in ("loss", "tokens_per_second") if name in values}
        self.writer.write(step, values)

    def restart_clock(self, step: int) -> None:
        """Measure speed from here: writing a checkpoint is not training."""
        self._clock = (step, time.perf_counter())

    def fetch(self, step: int, metrics: dict[str, Array]) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values = {"loss": values.pop("loss"), **values}  # jit sorts by name
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            message = f"fit: not finite at step {step}: {shown}"
            if self.directory is not None and (steps := checkpoint.finished_steps(self.directory)):
                message += f"; the newest checkpoint is {Path(self.directory) / f'step_{steps[-1]:08d}'}"
            raise DivergedError(message)
        return values


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, not raised: in the middle of a step the donated arrays are gone. The second one is raised."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield lambda: False
        return
    noted = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        noted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
