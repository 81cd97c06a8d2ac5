"""What the ops are timed beside: lax.associative_scan, and flash-linear-attention's chunk forms under PyTorch.

The latter run in a process and an environment of their own (`make peers`), see fla_peer.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from memjax.bench.timing import KEEP_MEMORY
from memjax.errors import MemjaxError

SCRIPT = Path(__file__).with_name("fla_peer.py")
PLACES = (Path(".venv-peers/bin/python"), Path(__file__).parents[2] / ".venv-peers/bin/python")
# Threads of OpenMP that wait spin for milliseconds otherwise, beside whoever is timed next, and lose whole time slices
# at their own barriers on a busy machine.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
TOLERANCE = 5e-3  # flash-linear-attention's own, for outputs and gradients


class PeerError(MemjaxError):
    """The peers' process can't be started, or refused what it was asked."""


class PeerGone(PeerError):
    """The peers' process has ended, or says what is no answer: nothing more can be asked of it."""


def associative_scan(x: Any, log_decay: Array, phase: Array | None = None) -> tuple[Any, Any]:
    """pallas_kernels.diagonal_scan from an empty state, as lax.associative_scan does it."""

    def join(first: Any, second: Any) -> Any:
        (a, x), (b, y) = first, second
        return a * b, b * x + y

    if phase is None:
        _, h = lax.associative_scan(join, (jnp.exp(log_decay), x), axis=1)
        return h, h[:, -1]
    _, h = lax.associative_scan(join, (jnp.exp(lax.complex(log_decay, phase)), lax.complex(*x)), axis=1)
    return (h.real, h.imag), (h[:, -1].real, h[:, -1].imag)


def find_python(given: Path | None) -> Path | None:
    """The Python of the peers' environment: the one given, or that of `make peers` here or beside memjax, or None."""
    if given is not None and not given.is_file():
        raise PeerError(
            f"--peers-python {given}: no such file, needs the Python of an environment made by `make peers`"
        )
    found = given or next((place for place in PLACES if place.is_file()), None)
    return found and found.absolute()  # not resolved: it is the link that makes it the Python of its environment


class Fla:
    """The process with flash-linear-attention: `prepare` a case, then `run` it as often as you like.

        with Fla(python) as fla:
            got = fla.prepare("kda", inputs, cotangents)
            seconds = fla.run("both")

    Every method raises PeerError with what the process said. After a PeerGone, `gone` is its message.
    """

    gone: str | None = None

    def __init__(self, python: Path):
        self.python = python

    def __enter__(self) -> Fla:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            try:
                self._process = stack.enter_context(
                    subprocess.Popen(
                        [str(self.python), str(SCRIPT)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._log,
                        text=True,
                        cwd=folder,
                        env=os.environ | THREADS | KEEP_MEMORY,
                    )
                )
            except OSError as error:
                raise PeerError(f"{self.python}: {error.strerror}") from None
            self._folder = Path(folder)
            try:
                self.about = self._answer() | THREADS
            except PeerGone as error:
                raise PeerError(f"{self.python}: {error}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_input()  # with which the script ends
        self._stack.close()

    def prepare(self, peer: str, inputs: Mapping[str, Any], cotangents: Any) -> dict[str, np.ndarray]:
        """Hands over the arrays; returns "o", "state" and "d NAME" for every input, from one run of both directions."""
        path = self._folder / "case.npz"
        o, state = cotangents
        arrays = {f"in {name}": a for name, a in inputs.items()} | {"do": o, "dstate": state}
        narrow = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
        np.savez(path, allow_pickle=False, **narrow)
        answer = self._ask(do="prepare", peer=peer, file=str(path))
        with np.load(answer["file"]) as found:
            return dict(found)

    def run(self, mode: str) -> float:
        """Seconds of one run of the prepared case."""
        return self._ask(do="run", mode=mode)["seconds"]

    def _ask(self, **message: Any) -> dict[str, Any]:
        if self.gone:
            raise PeerGone(self.gone)
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._close_input()
            code = self._process.wait()
            self._log.seek(0)
            said = self._log.read().strip().splitlines() or ["nothing"]
            self.gone = f"the peers' process has ended with code {code}; its last line: {said[-1]}"
            raise PeerGone(self.gone)
        try:
            answer = dict(json.loads(line))
        except (TypeError, ValueError):
            self.gone = f"the peers' process says {line[:80].rstrip()!r}, which is no answer"
            raise PeerGone(self.gone) from None
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _close_input(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # what was written to a process that has ended
            self._process.stdin.close()


def results(outputs: Any, gradients: Mapping[str, Any]) -> dict[str, Any]:
    """One dict of what a run of both directions returned, named as by `Fla.prepare`."""
    o, state = outputs
    return {"o": o, "state": state, **{f"d {name}": g for name, g in gradients.items()}}


def error(x: Any, ref: Any) -> float:
    """rms(x - ref) / rms(ref) over all arrays of two like trees; rms(x) where ref is 0, inf where x is not finite."""
    x, ref = (np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)]) for tree in (x, ref))
    if not np.isfinite(x).all():
        return float("inf")
    scale = np.sqrt(np.mean(ref**2))
    return float(np.sqrt(np.mean((x - ref) ** 2)) / (scale or 1.0))
