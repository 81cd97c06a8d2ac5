"""Runs what README.md shows, as pasted: one line a block, and exit code 1 if one fails.

    python -m tests.readme

Every ```python block is a program, run in a fresh interpreter and an empty folder, on the CPU. Of the ```sh blocks
those marked ```sh run are run, one after another in one folder, with the commands of this interpreter's environment
first on the path, and a home that has the texts below.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parents[1] / "README.md"
FIRST_SCREEN, FIRST_PROGRAM = 45, range(15, 21)  # lines: where the first program ends, and how many it may have


TEXTS = {
    "home/notes/garden.md": "# Garden\n\nThe old apple tree gets its ladder and its rope in October.\n",
    "home/notes/house.txt": "The spare key of the archive hangs behind the blue heater in the corridor.\n",
    "home/notes/drafts/speech.txt": "Dear friends of the observatory, thank you for coming tonight.\n",
    "home/letters/aunt.txt": "Your aunt writes that the ferry now leaves at seven from the north pier.\n",
    "one.txt": "The bicycle was sold to the baker for forty coins.\n",
}
"""What the commands of the README read: in the folder they run in, and below its `home`."""


class Block(NamedTuple):
    """A fenced block: its language with what follows, the line it begins at, and its text."""

    kind: str
    line: int
    text: str

    @property
    def runs(self) -> bool:
        return self.kind in ("python", "sh run")


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1].strip(), 2 + text.count("\n", 0, m.start()), m[2]) for m in found]


def run(block: Block, folder: Path) -> tuple[bool, str]:
    """Whether it succeeds in that folder, and its output with the errors in it."""
    command = [sys.executable, "program.py"] if block.kind == "python" else ["bash", "-eu", "program.py"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    home = {"HOME": str(folder / "home")} if block.kind == "sh run" else {}
    (folder / "program.py").write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, "JAX_PLATFORMS": "cpu", **home}, check=False,
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode == 0, done.stdout


def first_program(text: str) -> str | None:
    """What is wrong with the first program of the README; None if nothing is."""
    program = next((b for b in blocks(text) if b.kind == "python"), None)
    if program is None:
        return "it has no ```python block"
    lines = program.text.count("\n")
    if lines not in FIRST_PROGRAM:
        return f"the first program has {lines} lines, needs {FIRST_PROGRAM[0]} to {FIRST_PROGRAM[-1]}"
    if program.line + lines > FIRST_SCREEN:
        return f"the first program ends at line {program.line + lines}, needs to end by line {FIRST_SCREEN}"
    return None


def main(path: Path = README) -> int:
    text = path.read_text(encoding="utf-8")
    failed = 0
    if wrong := first_program(text):
        print(f"✗ {path.name}: {wrong}")
        failed += 1
    with tempfile.TemporaryDirectory(prefix="readme-") as where:
        shared = Path(where, "shared")
        for name, content in TEXTS.items():
            (shared / name).parent.mkdir(parents=True, exist_ok=True)
            (shared / name).write_text(content, encoding="utf-8")
        for block in filter(lambda block: block.runs, blocks(text)):
            folder = shared if block.kind == "sh run" else Path(where, f"line-{block.line}")
            folder.mkdir(exist_ok=True)
            began = time.perf_counter()
            ok, output = run(block, folder)
            failed += not ok
            title = f"{path.name}:{block.line} {block.kind}, {block.text.count(chr(10))} lines"
            last = (output.strip().splitlines() or ["(prints nothing)"])[-1].strip()
            print(f"{'✓' if ok else '✗'} {title}, {time.perf_counter() - began:.1f} s: {last}", flush=True)
            if not ok:
                print(output)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
