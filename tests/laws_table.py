"""memjax/catalog_laws.json, from which `memjax list` says how many laws a memory obeys, and the runs it comes from.

pytest tests/test_laws.py             # adds its verdicts to build/laws.json (tests/conftest.py)
python -m tests.laws_table --write    # puts them into the package; memories without any stay as they are
python -m tests.laws_table --check    # says where the two differ, and ends with 1 if they do
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from memjax import laws
from memjax.catalog import CATALOG

ROOT = Path(__file__).parents[1]
COMMITTED, FOUND = ROOT / "memjax" / "catalog_laws.json", ROOT / "build" / "laws.json"
VERDICTS = ("held", "declared off", "not applicable")  # and "broken", which is never put into the package

ByLaw = Mapping[str, Mapping[str, str]]  # name -> law -> verdict
Table = Mapping[str, Mapping[str, list[str]]]  # name -> verdict -> laws


def verdict(result: laws.Result, declared: bool) -> str:
    """What a table says of a law."""
    if result.ok is None:
        return "not applicable"
    return "broken" if result.ok is False else "declared off" if declared else "held"


def keep(verdicts: Iterable[tuple[str, str, str]], file: Path = FOUND) -> None:
    """Add verdicts, each (name, law, verdict), to those of earlier runs."""
    found: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, law, what in verdicts:
        found.setdefault(name, {})[law] = what
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")  # two runs at once: one of them counts, neither is cut
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def differences(committed: Table, found: ByLaw) -> list[str]:
    """A line for each memory or law on which the two differ, or which no run has judged."""
    lines = [f"{name}: is in {COMMITTED.name}, and not in the catalog" for name in committed if name not in CATALOG]
    for name in CATALOG:
        ours = {law: what for what, names in committed.get(name, {}).items() for law in names}
        if name not in found:
            lines.append(f"{name}: was not run")
        elif not ours:
            lines.append(f"{name}: is not in {COMMITTED.name}")
        else:
            said = [(law, ours.get(law, "missing"), found[name].get(law, "not judged")) for law in laws.NAMES]
            lines += [f"{name}: {law} is {a!r} in {COMMITTED.name}, {b!r} in the run" for law, a, b in said if a != b]
    return lines


def merged(committed: Table, found: ByLaw) -> dict[str, Mapping[str, list[str]]]:
    """The memories of the catalog, as in the runs where these have judged all laws and found none broken."""
    table = dict(committed)
    for name, row in found.items():
        if all(row.get(law) in VERDICTS for law in laws.NAMES):
            table[name] = {what: [law for law in laws.NAMES if row[law] == what] for what in VERDICTS}
    return {name: table[name] for name in CATALOG if name in table}


def text_of(table: Table) -> str:
    """The table as JSON, a line for each memory."""
    rows = (f" {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="put the verdicts of the runs into the package")
    what.add_argument("--check", action="store_true", help="say where they differ from those in the package")
    options = parser.parse_args(arguments)
    if not FOUND.is_file():
        print(f"{FOUND.relative_to(ROOT)}: missing, made by `pytest tests/test_laws.py`")
        return 1
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    committed = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.is_file() else {}
    if options.write:
        committed = merged(committed, found)
        COMMITTED.write_text(text_of(committed), encoding="utf-8")
    lines = differences(committed, found)
    print("\n".join(lines) or f"{len(CATALOG)} memories: {COMMITTED.name} says what the runs found")
    if lines and options.check:
        print("`pytest tests/test_laws.py && python -m tests.laws_table --write` makes it new")
    return int(bool(lines) and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
