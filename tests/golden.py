"""Judge this library by golden files: `python -m tests.golden FILE...`

A golden file holds inputs, parameters, outputs and gradients that a reference implementation of one system made; the
adapters (tests/adapters) run ours on the same inputs. One line is printed for every array of the file:

    gla_layer_a    out_y    2.1e-07  <= 1.0e-06  PASS

The error is rms(x - ref) / rms(ref) over the entries where ref is finite. Entries that are not finite must be of the
same kind and sign, integer and boolean arrays identical. Every out_* and grad_* of the file must be there, or the line
says MISSING and fails. Exit status: 0 all passed, 1 something failed, 2 a file can't be judged.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import math
import pkgutil
import re
import sys
import traceback
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import tests.adapters
from tests.adapters import GoldenError, Tail

# Gradients of what feeds an exponential or a write strength: the one quantity summed over the whole sequence.
GATES = {"A_log", "a_proj", "b_proj", "beta", "dt_bias", "g", "gk", "gk_proj"}

# Noise of summation in float32, not a wrong formula: within this factor a run in float64 decides.
NOISE = 10.0

VALUES, GRADIENTS, GATE_GRADIENTS, FLOAT32_VALUES, BFLOAT16 = 1e-6, 1e-5, 2e-4, 1e-5, 0.1


class Row(NamedTuple):
    """The verdict on one array.

    error: nan where there is none (a missing array, another shape). note: what is wrong, or which of several
    implementations this, the worst, comes from.
    """

    system: str
    array: str
    error: float
    tolerance: float
    ok: bool
    note: str = ""


def _collect() -> tuple[dict[str, Any], dict[str, Mapping[str, float]]]:
    systems: dict[str, Any] = {}
    tolerances: dict[str, Mapping[str, float]] = {}
    for module in pkgutil.iter_modules(tests.adapters.__path__, "tests.adapters."):
        adapter = importlib.import_module(module.name)
        if twice := systems.keys() & adapter.SYSTEMS.keys():
            raise ValueError(f"{module.name}: {sorted(twice)} already have an adapter")
        systems |= adapter.SYSTEMS
        tolerances |= getattr(adapter, "TOLERANCES", {})
    return systems, tolerances


ADAPTERS, TOLERANCES = _collect()


def system_of(path: Path) -> str:
    """The system of a file <system>_<letter>.npz: the longest name with an adapter. GoldenError if there is none."""
    for name in sorted(ADAPTERS, key=len, reverse=True):
        if re.fullmatch(rf"{re.escape(name)}(_[a-z]{{1,2}}|_\d+)*", path.stem):
            return name
    raise GoldenError(f"{path}: no adapter for a system of this name; there are {', '.join(sorted(ADAPTERS))}")


def judge(path: str | Path) -> list[Row]:
    """The verdict on every array of a golden file, in the order of the file.

    Runs in float32, the precision the tolerances are made for. If all that fails misses its tolerance by no more than a
    factor of 10, a run in float64 decides, and the note says so.

    Raises GoldenError for a file that can't be judged; what the adapter raises passes through.
    """
    path = Path(path)
    system = system_of(path)
    arrays, cfg = _load(path)
    rows = _run(path, system, arrays, cfg, np.float32)
    failed = [row for row in rows if not row.ok]
    near = all(row.error <= NOISE * row.tolerance for row in failed)
    if not failed or not near or system in TOLERANCES:
        return rows
    with jax.enable_x64(True):
        wide = {row.array: row for row in _run(path, system, arrays, cfg, np.float64)}
    return [row if row.ok else wide[row.array]._replace(note=f"in float64; float32: {row.error:.1e}") for row in rows]


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise GoldenError(f"{path}: can't be read as .npz: {error}") from error
    if not any(_judged(name, a) for name, a in arrays.items()):
        raise GoldenError(f"{path}: holds no out_* or grad_* array, so it is no golden file")
    try:
        return arrays, json.loads(str(arrays.get("cfg_json", "{}")))
    except json.JSONDecodeError as error:
        raise GoldenError(f"{path}: cfg_json is no JSON: {error}") from error


def _judged(name: str, a: np.ndarray) -> bool:
    """An integer scalar among the outputs is a setting, such as the number of ranks."""
    return name.startswith(("out_", "grad_")) and not (a.ndim == 0 and np.issubdtype(a.dtype, np.integer))


def _run(path: Path, system: str, arrays: Mapping[str, np.ndarray], cfg: dict, dtype: Any) -> list[Row]:
    inputs = {name: a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a for name, a in arrays.items()}
    try:
        with jax.default_matmul_precision("highest"):  # an accelerator would multiply float32 in fewer bits
            results = ADAPTERS[system](inputs, cfg)
    except KeyError as error:
        raise GoldenError(f"{path}: has no {error}, which the adapter of {system} reads") from error
    except GoldenError as error:
        raise GoldenError(f"{path}: {error}") from error
    note = " ".join(np.ravel(arrays.get("note", "")).astype(str))
    rows = []
    for name, ref in arrays.items():
        if _judged(name, ref) or name in results:
            limit = tolerance(name, note, TOLERANCES.get(system, {}))
            rows.append(_compare(system, name, results.get(name), ref, limit))
    return rows


def tolerance(array: str, note: str, own: Mapping[str, float] | None = None) -> float:
    """The allowed error of an array: the first of the system's patterns that fits its name, else the common rule."""
    for pattern, value in (own or {}).items():
        if fnmatch.fnmatchcase(array, pattern):
            return value
    if array.endswith("_bf16"):
        return BFLOAT16
    if array.startswith("grad_"):
        parameter = array.removeprefix("grad_").removeprefix("param_").split(".")[0]
        return GATE_GRADIENTS if parameter in GATES else GRADIENTS
    by_float32_code = re.search(r"\b(float32|f32)\b", note) and "float64" not in note
    return FLOAT32_VALUES if by_float32_code else VALUES


def _compare(system: str, name: str, result: Any, ref: np.ndarray, limit: float) -> Row:
    exact = not np.issubdtype(ref.dtype, np.floating)
    if exact:
        limit = 0.0
    if result is None:
        return Row(system, name, math.nan, limit, False, "MISSING")
    runs = result if isinstance(result, dict) else {"": result}
    rows = []
    for label, a in runs.items():
        x = np.asarray(a.array if isinstance(a, Tail) else a)
        want = ref[..., -x.shape[-1] :] if isinstance(a, Tail) else ref
        if x.shape != want.shape:
            rows.append(Row(system, name, math.nan, limit, False, f"{label} shape {x.shape}, not {want.shape}".strip()))
            continue
        off = error(x, want) if not exact else float(np.mean(x != want)) if want.size else 0.0
        rows.append(Row(system, name, off, limit, off <= limit, label))
    return max(rows, key=lambda row: (not row.ok, math.inf if math.isnan(row.error) else row.error))


def error(x: np.ndarray, ref: np.ndarray) -> float:
    """rms(x - ref) / rms(ref) where ref is finite (rms(x) if ref is 0 there); inf where x differs in what is not."""
    x, ref = np.asarray(x, np.float64), np.asarray(ref, np.float64)
    finite = np.isfinite(ref)
    if not np.array_equal(x[~finite], ref[~finite], equal_nan=True) or not np.isfinite(x[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    scale = math.sqrt(np.mean(ref[finite] ** 2))
    return math.sqrt(np.mean((x[finite] - ref[finite]) ** 2)) / (scale or 1.0)


def _line(file: str, row: Row) -> str:
    verdict = "PASS" if row.ok else "FAIL"
    return f"{file}  {row.array:36}  {row.error:8.1e}  <= {row.tolerance:7.1e}  {verdict}  {row.note}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="golden files, <system>_<letter>.npz")
    files = parser.parse_args(argv).files
    arrays = failed = unjudged = 0
    for path in files:
        try:
            rows = judge(path)
        except GoldenError as error:
            print(error, file=sys.stderr)
            unjudged += 1
        except Exception:  # a bug in one adapter must not hide the verdict on the other files
            traceback.print_exc()
            print(f"{path}: the adapter failed", file=sys.stderr)
            unjudged += 1
        else:
            for row in rows:
                print(_line(f"{path.stem:{max(len(p.stem) for p in files)}}", row), flush=True)
            arrays, failed = arrays + len(rows), failed + sum(not row.ok for row in rows)
    judged = f"{len(files) - unjudged} files, {arrays} arrays, {failed} failed"
    print(f"{judged}, {unjudged} files not judged" if unjudged else judged)
    return 2 if unjudged else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
