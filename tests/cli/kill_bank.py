"""kill -9 of commands at random instants, spread over all that they do to the disk.

    python -m tests.cli.kill_bank --instants 50            each of train and bank build, append, delete, compact
    python -m tests.cli.kill_bank --instants 50 --record   and keep what came out in experiments/records

Then the same command is run again, killed or not by the next instant, until it ends. It must go on from where it was,
and leave what an undisturbed run leaves: the bytes of the bank or of the model, the checkpoints to the bit, the
metrics, and the answer to a question; nothing lost, nothing twice, no file beside them. At last two processes build
one bank at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.cli.forked import Forked, command, prepare

QUESTION = "Which number belongs to house 17?"
BANK, RUN = "texts.bank", "run"
MANY = 20  # instants, of which one at least has to lie where something is half done
RACES = 10
COMMANDS = ("build", "append", "delete", "compact", "train")


class Case(NamedTuple):
    """A command, what it changes, and how that is looked at."""

    name: str
    arguments: tuple[Any, ...]
    start: Path | None = None  # a bank that is there before
    target: str = BANK

    def fresh(self, path: Path) -> Path:
        path.mkdir()
        if self.start:
            shutil.copytree(self.start, path / self.target)
        return path

    def run(self, folder: Path) -> Forked:
        return command(folder, *self.arguments)

    def end(self, folder: Path) -> Any:
        """What is left: must be the same however often the command was killed."""
        assert [p.name for p in folder.iterdir()] == [self.target], f"{self.name}: something else is in {folder}"
        return trained(folder / RUN) if self.target == RUN else tree(folder / BANK)

    def answer(self, folder: Path) -> str:
        if self.target == RUN:
            return command(folder, "generate", RUN, "House", "--tokens", 8, "--temperature", 0).done().splitlines()[1]
        out = command(folder, "bank", "ask", BANK, QUESTION, "--passages", 3).done()
        return out[out.index("answer") : out.rindex("\n\n")]  # but for the times

    def decided(self, folder: Path, want: dict[str, bytes]) -> bool:
        """Whether the last checkpoint, or the new manifest, has its name."""
        if self.target == RUN:
            return (folder / RUN / f"step_{STEPS:08d}").exists()
        file = folder / BANK / "manifest.json"
        return file.exists() and file.read_bytes() == want["manifest.json"]

    def progress(self, folder: Path, decided: bool) -> int:
        """Documents or steps that the next run has to find done."""
        if self.target == RUN:
            return max((int(p.name[5:]) for p in (folder / RUN).glob("step_????????")), default=0)
        note = folder / BANK / "unfinished.json"
        return 0 if decided or not note.exists() else sum(s["documents"] for s in read_json(note)["segments"])


STEPS = 6
TRAIN = (
    *("--vocab", 300, "--steps", STEPS, "--save-every", 2, "--dim", 16, "--layers", 1),
    *("--context", 16, "--batch", 2, "--directory", RUN),
)
FOUND = re.compile(r"([\d,]+) documents? of an interrupted run|resumed at step ([\d,]+)")


def found_done(printed: str) -> int:
    """Documents or steps that a command says it has found done."""
    match = FOUND.search(printed)
    return int((match[1] or match[2]).replace(",", "")) if match else 0


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def read_json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def trained(run: Path) -> dict[str, Any]:
    """A finished run without times: orbax's files hold some, so of checkpoints the arrays are compared."""

    def arrays(_: Callable) -> None:
        for name, value in sorted(checkpoint_arrays(run)):
            print(name, value)

    steps = sorted(p for p in run.glob("step_*"))
    stated = [{k: v for k, v in read_json(p / "checkpoint.json").items() if k not in ("files", "crc32")} for p in steps]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "names": sorted(p.name for p in run.iterdir()),
        "model": tree(run / "model"),
        "tokenizer": (run / "tokenizer.json").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if "second" not in k} for line in lines],
        "checkpoints": stated,
        "arrays": Forked(run, arrays).done(),
    }


def checkpoint_arrays(run: Path) -> Iterator[tuple[str, str]]:
    """Name and sha256 of every array of every checkpoint."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    for step in run.glob("step_*"):
        for part in ("params", "opt_state"):
            for path, a in jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(str(step.absolute()))[part]):
                name = f"{step.name}/{part}{jax.tree_util.keystr(path)}"
                yield name, hashlib.sha256(np.asarray(a).tobytes()).hexdigest()


def kill(work: Path, case: Case, instants: int, rng: random.Random) -> dict[str, Any]:
    """Kill a command so many times, and say where; AssertionError where the end is another."""
    for name in ("compiled", "want"):  # the first fills the cache of compiled programs
        want = case.fresh(work / f"{case.name}-{name}")
        undisturbed = case.run(want)
        undisturbed.until_marked()
        began = time.perf_counter()
        undisturbed.done()
        seconds = time.perf_counter() - began
    measured, wanted, answer = seconds, case.end(want), case.answer(want)
    final = tree(want / case.target)
    struck, late, again = {"before": 0, "while": 0, "after": 0}, 0, 0
    parts = [(i + rng.random()) / instants for i in range(instants)]
    rng.shuffle(parts)
    while parts:
        here = case.fresh(work / f"{case.name}-{len(parts)}-{late}")
        done, runs = 0, 0
        while parts:
            there, run, runs = tree(here / case.target), case.run(here), runs + 1
            run.until_marked()
            time.sleep(parts[-1] * seconds)
            if not run.kill():  # faster than the undisturbed one: this instant comes once more, earlier
                late, seconds, done = late + 1, 0.9 * seconds, case.progress(here, decided=True)
                break
            parts.pop()
            decided = case.decided(here, final)
            struck["after" if decided else "before" if tree(here / case.target) == there else "while"] += 1
            now = case.progress(here, decided)
            assert now >= done or decided, f"{case.name}: {now} of {done} are left in {here}"
            done = now
            if rng.random() < 0.5:  # or it is killed once more on its way
                break
        again += runs > 1
        assert found_done(case.run(here).done()) == done, f"{case.name}: did not go on behind {done}, see {here}"
        assert case.end(here) == wanted, f"{case.name}: ended otherwise with {len(parts)} instants left, see {here}"
        if not len(parts) % 10:
            assert case.answer(here) == answer, f"{case.name}: another answer, see {here}"
        shutil.rmtree(here)
    if instants >= MANY and case.name != "delete":  # which writes one file
        assert struck["while"], f"{case.name}: of {instants} instants none lies between its first and its last write"
    return {"killed": instants, **struck, "more_than_once": again, "ended_first": late, "seconds": round(measured, 3)}


def race(work: Path, case: Case, wanted: Any, times: int) -> dict[str, int]:
    """Two processes with one command at once: one of them makes it, the other finds it made or is refused."""
    refused = 0
    for i in range(times):
        here = case.fresh(work / f"race-{i}")
        for status, text in [run.end() for run in (case.run(here), case.run(here))]:
            if status:
                refused += 1
                assert status == 2 and text.splitlines()[-1].startswith("error: texts.bank: "), text
        assert case.end(here) == wanted, f"two at once left another bank in {here}"
        shutil.rmtree(here)
    return {"times": times, "refused": refused}


def write_corpus(folder: Path, names: range) -> None:
    folder.mkdir()
    for i in names:
        lines = [f"House {i}, room {j}, has the number {i * 1000 + j}." for j in range(12)]
        (folder / f"{i}.txt").write_text("All of these texts have this line in common.\n" + "\n".join(lines) + "\n")


def write_model(path: Path) -> Forked:
    def write(_: Callable) -> None:
        from memjax.lm.files import save_model
        from tests.lm import tiny

        model = tiny.model()
        save_model(path, model, tiny.params(model), tiny.TOKENIZER, reading=tiny.READING)

    return Forked(path.parent, write)


def main(instants: int, seed: int = 0, record: bool = False, commands: Sequence[str] = COMMANDS) -> None:
    """Commands, each killed `instants` times."""
    rng, results = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work / "compiled")
        from memjax.in_storage import bank_change

        bank_change.SEGMENT = 48  # so that a small bank has many segments
        write_model(work / "model").done()
        write_corpus(work / "texts", range(12))
        write_corpus(work / "more", range(12, 20))
        build = Case("build", ("bank", "build", work / "texts", "--model", work / "model"))
        start = build.fresh(work / "start")
        build.run(start).done()
        cases = (
            build,
            Case("append", ("bank", "append", BANK, work / "more"), start / BANK),
            Case("delete", ("bank", "delete", BANK, "1*.txt"), start / BANK),
            Case("compact", ("bank", "compact", BANK), start / BANK),
            Case("train", ("train", "--data", work / "texts", *TRAIN), target=RUN),
        )
        for case in (case for case in cases if case.name in commands):
            began = time.perf_counter()
            found = results[case.name] = kill(work, case, instants, rng)
            where = ", ".join(f"{found[name]} {name}" for name in ("before", "while", "after"))
            took = f"{time.perf_counter() - began:.0f} s"
            print(
                f"{case.name}: killed {instants} times ({where} it wrote), ended as if never killed; {took}", flush=True
            )
        if "build" in commands:
            results["two builds at once"] = race(work, build, build.end(start), min(RACES, instants))
            print(f"two builds at once: {results['two builds at once']}", flush=True)
    if record:
        from memjax.record import write_record

        body = {"config": {"instants": instants, "seed": seed}, "commands": results}
        print(f"wrote {write_record('kill_bank', body, Path(__file__).parents[2] / 'experiments' / 'records')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    main(**vars(parser.parse_args()))
