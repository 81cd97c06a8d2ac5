"""A run for the tests of the loop, as its own program too: `python -m tests.train.runs DIRECTORY KILL_AT`."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.train import JSONLWriter, fit

STEPS, BATCH = 12, 32
CONFIG = {"run": "regression", "width": 6}
OPTIMIZER = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))


class Rows:
    """Rows of a fixed table in a fixed order, with a position; `before(i)` is called before batch i is given."""

    def __init__(self, before=lambda i: None):
        self.before, self.at = before, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.before(self.at)
        rows = np.random.default_rng(self.at).normal(size=(BATCH, 6)).astype(np.float32)
        self.at += 1
        return {"x": rows}

    def get_state(self):
        return {"next_index": self.at}

    def set_state(self, state):
        self.at = state["next_index"]


def loss(params, batch, key):
    """A regression with noise from the key, so that a wrong key shows."""
    x = batch["x"] * (1 + 0.1 * jax.random.uniform(key))
    error = x @ params["w"] + params["b"][None] - jnp.flip(batch["x"], axis=1)
    return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}


def params():
    draw = np.random.default_rng(0).normal
    return {"w": jnp.asarray(0.1 * draw(size=(6, 6)), jnp.float32), "b": jnp.zeros(6)}


def run(directory=None, *, data=None, **changes):
    options = dict(
        optimizer=OPTIMIZER,
        steps=STEPS,
        key=jax.random.key(7),
        directory=directory,
        config=CONFIG,
        save_every=5,
        log_every=2,
        writers=() if directory is None else (JSONLWriter(directory / "metrics.jsonl"),),
        progress=False,
        tokens_per_step=BATCH,
    )
    return fit(loss, params(), Rows() if data is None else data, **{**options, **changes})


if __name__ == "__main__":
    from pathlib import Path

    def before(i):
        if i == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(sys.argv[1]), data=Rows(before))
