"""Markdown of the README's tables."""

from __future__ import annotations

from typing import Any


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def tokens(n: int) -> str:
    """16384 -> "16K"; K is 1024."""
    return f"{n >> 20}M" if n % (1 << 20) == 0 else f"{n >> 10}K" if n % 1024 == 0 else str(n)


def missing(command: str) -> str:
    """What stands where a record is missing."""
    return f"There is no record yet: `{command}` makes one,\nand `python -m experiments.readme_tables` puts it here."


def source(record: dict[str, Any], command: str) -> str:
    """Where numbers come from."""
    where = record["environment"]
    return (
        f"Record [`{record['name']}`](experiments/records/{record['name']}), {where['cpu'] or where['device']}, "
        f"jax {where['versions']['jax']}, made by `{command}`."
    )
