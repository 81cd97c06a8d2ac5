"""kill -9 of real commands at random instants: `python -m tests.cli.kill_bank --instants 50` (about 10 s an instant).

Each of `bank build`, `append`, `delete` and `compact` is killed at an instant between taking the lock and the end of an
undisturbed run. Then the same command is run again, killed or not by the next instant, until it ends: the
bytes of the bank and the answer to a question must be those of the undisturbed run, nothing lost and nothing twice.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
from memjax.in_storage import bank_change
bank_change.SEGMENT = 48  # so that a small bank has many segments
begin = bank_change.Change._begin
bank_change.Change._begin = lambda *a: (print("locked", file=sys.stderr, flush=True), begin(*a))[1]
from memjax.cli import main
sys.exit(main(sys.argv[1:]))
"""
QUESTION = "Which number belongs to house 17?"


class Run:
    """One command in a process of its own."""

    def __init__(self, folder: Path, *arguments: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seen: list[str] = []

    def until_locked(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.seen.append(line)
            if line == "locked\n":
                return
        raise RuntimeError(f"never locked: {''.join(self.seen)}")

    def end(self) -> str:
        out, err = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(f"exit status {self.process.returncode}: {''.join(self.seen)}{err}{out}")
        return out


def write_corpus(folder: Path, names: range) -> None:
    folder.mkdir()
    for i in names:
        lines = [f"House {i}, room {j}, has the number {i * 1000 + j}." for j in range(12)]
        (folder / f"{i}.txt").write_text("All of these texts have this line in common.\n" + "\n".join(lines) + "\n")


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a bank with its bytes."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def answer(folder: Path) -> str:
    """What is printed of a question, but for the times."""
    out = Run(folder, "bank", "ask", "texts.bank", QUESTION, "--passages", "3").end()
    return out[out.index("answer") : out.rindex("\n\n")]


def kill(work: Path, name: str, command: tuple[str, ...], start: Path | None, instants: int, rng: random.Random) -> int:
    """How often the command was through before it could be killed; AssertionError where the end is another."""

    def fresh(folder: str) -> Path:
        path = work / folder
        path.mkdir()
        if start:
            shutil.copytree(start, path / "texts.bank")
        return path

    want = fresh(f"{name}-want")
    for _ in range(2):  # the first fills the cache of compiled programs
        shutil.rmtree(want)
        undisturbed = Run(fresh(f"{name}-want"), *command)
        undisturbed.until_locked()
        began = time.perf_counter()
        undisturbed.end()
        seconds = time.perf_counter() - began
    bank, said = tree(want / "texts.bank"), answer(want)
    late = left = 0
    while left < instants:
        here = fresh(f"{name}-{left}-{late}")
        while left < instants:
            run = Run(here, *command)
            run.until_locked()
            time.sleep(rng.uniform(0, seconds))
            run.process.kill()
            status = run.process.wait()
            run.process.communicate()
            if status == 0:  # it was faster than the undisturbed one: no instant of this process
                late, seconds = late + 1, 0.9 * seconds
                break
            left += 1
            if rng.random() < 0.5:  # or it is killed once more on its way
                break
        Run(here, *command).end()
        assert tree(here / "texts.bank") == bank, f"{name}: other bytes after instant {left}, see {here}"
        assert [p.name for p in here.iterdir()] == ["texts.bank"], f"{name}: something was left in {here}"
        if left % 10 == 0 or left == instants:
            assert answer(here) == said, f"{name}: another answer after instant {left}"
        shutil.rmtree(here)
    return late


def main(instants: int, seed: int = 0) -> None:
    """All commands, each killed `instants` times."""
    from memjax.lm.files import save_model
    from tests.lm import tiny

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny.model()
        save_model(work / "model", model, tiny.params(model), tiny.TOKENIZER, reading=tiny.READING)
        write_corpus(work / "texts", range(24))
        write_corpus(work / "more", range(24, 40))
        build = ("bank", "build", str(work / "texts"), "--model", str(work / "model"))
        start = work / "start"
        start.mkdir()
        Run(start, *build).end()
        for name, command, begin in (
            ("build", build, None),
            ("append", ("bank", "append", "texts.bank", str(work / "more")), start / "texts.bank"),
            ("delete", ("bank", "delete", "texts.bank", "1?.txt"), start / "texts.bank"),
            ("compact", ("bank", "compact", "texts.bank"), start / "texts.bank"),
        ):
            began = time.perf_counter()
            late = kill(work, name, command, begin, instants, rng)
            seconds = time.perf_counter() - began
            print(
                f"{name}: killed {instants} times ({late} more were through before), equal bytes; {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
