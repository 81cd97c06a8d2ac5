"""Records: where and with what something was measured, and what came out, as JSON that is never half written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from memjax.errors import DataError

PACKAGES = ("jax", "jaxlib", "optax", "grain", "orbax-checkpoint", "tensorstore", "tokenizers", "numpy")
ROOT = Path(__file__).parents[1]


def environment() -> dict[str, Any]:
    """Hardware, versions and the commit of the code; nothing of the machine but its kind."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
    }


class Record(NamedTuple):
    """A record that has a place and a head, and is written as often as there is more to say."""

    path: Path
    head: dict[str, Any]

    def write(self, body: dict[str, Any]) -> Path:
        """Writes the head and the body, null for what is no finite number, and returns the path."""
        write_json(self.path, {**self.head, **body})
        return self.path


def write_json(path: Path, body: Any) -> None:
    """Write a file whole or not at all, null for what is no finite number; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(_finite(body), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def begin_record(name: str, folder: Path, config: dict[str, Any] | None = None) -> Record:
    """The record <name>-<device>-<date>.json in a folder, which is made if it is missing; call it before measuring.

    A second record of a day replaces the first. With `config`, only if that holds the same "config".

    Raises DataError for a record that is not to be replaced, OSError if the folder can't be written.
    """
    where, date = environment(), datetime.date.today().isoformat()
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    path = folder / f"{name}-{device}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if config is not None and path.exists():
        _refuse_another(path, config)
    return Record(path, {"experiment": name, "date": date, "environment": where})


def write_record(name: str, body: dict[str, Any], folder: Path) -> Path:
    """Begin a record and write all of it, in place of another of this day; returns its path."""
    return begin_record(name, folder).write(body)


def _refuse_another(path: Path, config: dict[str, Any]) -> None:
    """DataError unless the record in the file is of this config."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["config"]
        differs = [key for key, value in json.loads(json.dumps(config)).items() if found.get(key) != value]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: is no record with a config and is not replaced; move it, or write elsewhere"
        ) from None
    if differs:
        raise DataError(
            f"{path}: holds a record of other {', '.join(differs)} and is not replaced; move it, or write elsewhere"
        )


def _finite(x: Any) -> Any:
    """The same, with None for inf and nan, which JSON doesn't have."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1).strip() if found else platform.processor()
    except OSError:
        return platform.processor()


def _commit() -> str | None:
    """The commit of the checkout, "-dirty" if files differ from it; None for an installed copy or without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None
