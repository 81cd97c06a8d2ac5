"""Records: where and with what an experiment ran, and what came out, as JSON that is never half written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "records"
PACKAGES = ("jax", "jaxlib", "optax", "grain", "orbax-checkpoint", "tensorstore", "tokenizers", "numpy")


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


def write(experiment: str, body: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write <experiment>-<device>-<date>.json (a second one of a day replaces the first), and return its path."""
    where, date = environment(), datetime.date.today().isoformat()
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    path = folder / f"{experiment}-{device}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"experiment": experiment, "date": date, "environment": where, **body}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
    return path


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1).strip() if found else platform.processor()
    except OSError:
        return platform.processor()


def _commit() -> str | None:
    root = Path(__file__).parent
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None
