"""Programs behind the figures: each writes a record that says what ran, on what, and what came out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


def settings(config: Any) -> dict[str, Any]:
    """The fields of a configuration that a record keeps: it speaks of the run, not of one machine's folders."""
    return {name: value for name, value in asdict(config).items() if name not in ("folder", "output", "record")}
