"""Records: where and with what something was measured, and what came out, as JSON that is never half written."""

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


def write_record(name: str, body: dict[str, Any], folder: Path) -> Path:
    """Write <name>-<device>-<date>.json into the folder, which is made if it is missing, and return its path.

    A second record of a day replaces the first.
    """
    where, date = environment(), datetime.date.today().isoformat()
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    path = folder / f"{name}-{device}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"experiment": name, "date": date, "environment": where, **body}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1).strip() if found else platform.processor()
    except OSError:
        return platform.processor()


def _commit() -> str | None:
    """The commit of the checkout, "-dirty" if files differ from it; None for an installed copy."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None
