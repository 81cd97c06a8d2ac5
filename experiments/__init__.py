"""Programs behind the figures: each writes a record that says what ran, on what, and what came out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


def begun(config: Any, quick: dict[str, Any]) -> Any:
    """The configuration, with the sizes of its quick form if that is asked for; jax is set to its device."""
    import jax

    if config.device:
        jax.config.update("jax_platforms", config.device)
    return replace(config, **quick) if config.quick else config


def recorded(name: str, body: dict[str, Any], config: Any) -> Path | None:
    """The path of the record of a run, which is written and printed; None after a quick run, which has none."""
    from memjax.record import write_record

    if config.quick:
        print("quick: nothing is recorded; this shows that everything runs, not how well")
        return None
    path = write_record(name, body, RECORDS if config.record else config.output)
    print(f"wrote {path}")
    return path


def settings(config: Any) -> dict[str, Any]:
    """The fields of a configuration that a record keeps: it speaks of the run, not of one machine's folders."""
    return {name: value for name, value in asdict(config).items() if name not in ("folder", "output", "record")}
