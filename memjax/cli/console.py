"""What every command prints alike: the line about the machine, errors, sizes, text that arrives piece by piece."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from memjax.errors import ConfigError

SKIPPED_NAMES = 3  # of each kind

# Text of files and models may hold terminal control sequences: none but newline and tab get through.
_CONTROLS = {c: "\ufffd" for c in (*range(9), *range(11, 32), *range(127, 160))}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Platform to run on; by default the best that jax finds."""

    def start(self) -> Console:
        """Take the device, print the first line, and return where to print."""
        out = console()
        out.print(_machine(self.device), style="dim")
        return out


def console(stderr: bool = False) -> Console:
    """Standard output as it is now; off a terminal wide enough that tables are not folded."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False}  # names of files may hold brackets
    found = Console(**plain)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(**plain, width=140)


def error(message: str) -> None:
    """One red line on standard error."""
    line = " ".join(printable(message).split())
    console(stderr=True).print(Text.assemble(("error: ", "bold red"), (line, "red")), soft_wrap=True)


def note(message: str) -> None:
    """One yellow line on standard error."""
    console(stderr=True).print(Text(printable(message), "yellow"), soft_wrap=True)


def printable(text: str) -> str:
    """The text without control characters."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def size(n: int) -> str:
    """Bytes with a unit: "1.5 MB" (1 MB = 1e6 bytes)."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n >= scale:
            return f"{n / scale:.3g} {unit}" if n < 1e3 * scale else f"{n / scale:,.0f} {unit}"
    return f"{n} B"


def count(n: int, what: str) -> str:
    """A number with what it counts: "1 file", "2,000 files"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def hint(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of the known ones: those that are close, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [n for n in names if name.lower() in n]
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def json_object(source: str, text: str) -> dict[str, Any]:
    """A JSON object; ConfigError that begins with its source."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: needs a JSON object, got {type(found).__name__}")
    return found


def report_skipped(out: Console, skipped: list[Any]) -> None:
    """How many files were not read, by the kind of their reasons, with the first names of each kind."""
    if not skipped:
        return
    out.print(f"skipped {len(skipped):,} file{'s'[: len(skipped) > 1]}:", style="yellow")
    kinds: dict[str, list[Any]] = {}
    for one in skipped:
        kinds.setdefault(one.reason.partition(":")[0], []).append(one)
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        names = ", ".join(one.path for one in found[:SKIPPED_NAMES])
        more = f" and {len(found) - SKIPPED_NAMES:,} more" if len(found) > SKIPPED_NAMES else ""
        reason = found[0].reason if len({one.reason for one in found}) == 1 else kind
        line = f"{names}: {reason}" if len(found) == 1 else f"{len(found):,} {reason}: {names}{more}"
        out.print(Text(f"  {' '.join(printable(line).split())}", "yellow"), soft_wrap=True)


def write_stream(texts: Iterable[str]) -> float | None:
    """Print texts as they come, and a newline; when the first word was there (`time.perf_counter`), None: no word."""
    first = None
    for text in texts:
        if first is None and text.strip():
            first = time.perf_counter()
        sys.stdout.write(printable(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return first


def _machine(device: str | None) -> str:
    """cpu x 1, jax 0.10.2, kernels: xla"""
    import jax

    from pallas_kernels.delta_rule import IMPLEMENTATIONS

    before = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax adds its options at run time
    try:
        if device is not None:
            jax.config.update("jax_platforms", device)
        first = jax.devices()[0]
        if device is not None and first.platform != device:
            raise RuntimeError(f"jax already runs on {first.platform}")
    except RuntimeError as error:
        jax.config.update("jax_platforms", before)
        raise ConfigError(f"--device {device or '(jax chose)'}: {error}") from None
    kind = "" if first.device_kind == first.platform else f" ({first.device_kind})"
    own = f"pallas_{first.platform}"
    kernels = own if own in IMPLEMENTATIONS else "xla"
    return f"{first.platform} x {jax.device_count()}{kind}, jax {jax.__version__}, kernels: {kernels}"
