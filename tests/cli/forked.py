"""Commands of memjax in processes of their own, forked from one that has imported everything: a start costs nothing.

A fork copies one thread, so the process that forks must have no other: it imports jax, and never computes with it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    *("memjax.cli", "memjax.data", "memjax.lm.build", "memjax.lm.generate", "memjax.lm.weights.tensorfile"),
    *("memjax.plots", "memjax.train", "memjax.record", "orbax.checkpoint", "safetensors.numpy"),
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.ticker", "tests.lm.tiny"),
)


def prepare(compiled: Path) -> None:
    """Import all that commands need; before anything else imports jax. compiled: keeps programs from run to run."""
    assert "jax" not in sys.modules
    os.environ |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "200", "OPENBLAS_NUM_THREADS": "1"}
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for name in IMPORTED:
        importlib.import_module(name)
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a thread would be lost in every fork"


class Forked:
    """A function in a process of its own, from the moment that this is made."""

    def __init__(self, folder: Path, function: Callable[[Callable[[], None]], int | None]):
        """function: is called in `folder` with `mark`, which tells `until_marked`; gives the exit status."""
        self.output = tempfile.TemporaryFile()
        self._marks, mark = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            os.chdir(folder)
            _leave(function, lambda: os.write(mark, b"."))
        os.close(mark)

    def until_marked(self) -> None:
        """Wait for the first mark."""
        if not os.read(self._marks, 1):
            raise RuntimeError(f"ended without a mark: {self.end()}")

    def kill(self) -> bool:
        """kill -9; False where it had ended well before."""
        os.kill(self.pid, signal.SIGKILL)
        status, text = self.end()
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"exit status {status}: {text}")
        return status != 0

    def end(self) -> tuple[int, str]:
        """Wait for the end: the exit status, and what was printed."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._marks)
        self.output.seek(0)
        return status, self.output.read().decode()

    def done(self) -> str:
        """What was printed by the end; RuntimeError for a bad one."""
        status, text = self.end()
        if status:
            raise RuntimeError(f"exit status {status}: {text}")
        return text


def command(folder: Path, *arguments: Any) -> Forked:
    """memjax ARGUMENTS, which marks that it begins to change something: a bank is locked, a run is looked for."""

    def run(mark: Callable[[], None]) -> int:
        from memjax.cli import main
        from memjax.in_storage.bank_change import Change
        from memjax.train import checkpoint

        def marked(function: Callable) -> Callable:
            return lambda *a: (mark(), function(*a))[1]

        Change._begin = marked(Change._begin)
        checkpoint.finished_steps = marked(checkpoint.finished_steps)
        return main([str(a) for a in arguments])

    return Forked(folder, run)


def _leave(function: Callable[[Callable[[], None]], int | None], mark: Callable[[], Any]) -> NoReturn:
    """The life of a child: nothing that its parent has registered for its own exit."""
    status = 70
    try:
        status = function(mark) or 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
