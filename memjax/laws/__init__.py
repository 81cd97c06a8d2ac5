"""The laws of a memory: what "it works" means, as one function for the catalog and for your own memory.

    from memjax import laws

    laws.check(MyMemory(dim=16))  # one line a law: holds, is broken (with the smallest case found), or does not apply

     1 split        apply on x is apply on x[:, :s], then on x[:, s:] with the state carried over
     2 step         apply is a scan of step
     3 causal       an output does not change when later tokens do
     4 batch        each row is what it is alone
     5 padding      invalid tokens, NaN and huge numbers in them, change neither the state nor a valid output
     6 packing      documents packed with `start` are the documents one by one
     7 bounded      the state keeps its shapes, dtypes and `state_bytes`, and grows at most linearly
     8 gradients    finite, equal to finite differences, equal to those through the scan of step (float64)
     9 precision    bfloat16 in, bfloat16 out, near float32, state dtypes kept
    10 kernels      every implementation gives the values, the state and the gradients of "reference"
    11 sharded      rows over devices, and the sequence over devices, give the result of one device (gradients too)
    12 saved        configuration, parameters and state survive the disk, and the sequence continues bit for bit
    13 transformed  jit, vmap, grad, scan, remat, eval_shape; other values do not retrace
    14 golden       it reproduces recorded numbers

Everything runs on [4, 12] tokens, in mid-stream (documents written if there is a store, then a call) and on fresh rows.
Most laws are other contents of one compiled call, so a memory takes seconds. Parameters get a little noise: what
begins at zero would hide a mistake. Law 14 is needed beside the others: a decay that is applied before instead of after
the write obeys them all.
"""

from __future__ import annotations

import functools
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOBase
from typing import NamedTuple

import numpy as np

from memjax.laws.bench import B, Bench, Case, T
from memjax.laws.compare import Broken, NotApplicable, count
from memjax.laws.contents import CONTENTS
from memjax.laws.whole import WHOLE
from memjax.memory import Memory

NAMES = (*list(CONTENTS)[:6], "bounded", *list(CONTENTS)[6:], "saved", "transformed", "golden")
MARKS = {True: "✓", False: "✗", None: "–"}


class Result(NamedTuple):
    """ok is None where the law does not apply. detail: the smallest failing case, the reason, or what was looked at."""

    law: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{MARKS[self.ok]} {self.law:12} {self.detail}"


def check(
    memory: Memory,
    *,
    only: str | Iterable[str] | None = None,
    seed: int = 0,
    exceptions: Mapping[str, str] | None = None,
    golden: Callable[[], Iterable[tuple[str, float, bool]]] | None = None,
    bfloat16_error: float = 3e-2,
    raise_on_failure: bool = False,
    out: TextIOBase | None = None,
) -> dict[str, Result]:
    """Check a memory against the laws and print one line for each.

    Args:
      memory: any `Memory`, small: dim 16 or so. A class of your own must be importable, for the law `saved`.
      only: the name of a law, or several; None checks all.
      seed: of the parameters and the contents.
      exceptions: law -> the reason why it holds only inside a document that has already begun. It is checked there,
        and has to fail elsewhere: a declaration that isn't needed is itself reported.
      golden: gives (array, error, ok) for each recorded array; None: nothing was recorded.
      bfloat16_error: what law 9 allows, root mean square of the difference over that of the float32 result.
      raise_on_failure: raise AssertionError, naming the broken laws, after all of them were checked.
      out: where to print; None is sys.stdout.

    Returns:
      law -> Result, in the order of the laws.

    Raises:
      ValueError: `only` or `exceptions` names what is no law, or a law that can't be declared off.
      What the memory raises when it is built, initialised and called once passes through.
    """
    names = [only] if isinstance(only, str) else list(NAMES if only is None else only)
    exceptions = dict(exceptions or {})
    for label, given, known in (("only", names, NAMES), ("exceptions", exceptions, tuple(CONTENTS))):
        if unknown := [n for n in given if n not in known]:
            raise ValueError(f"{label}: got {unknown[0]!r}, needs names among {', '.join(known)}")
    begin = time.perf_counter()
    print(textwrap.shorten(str(memory), 118, placeholder=" ..."), file=out)
    bench, results = Bench(memory, seed, bfloat16_error), {}
    for name in names:
        results[name] = judge(bench, name, exceptions.get(name), golden)
        print(f"  {results[name]}", file=out, flush=True)
    number = {ok: sum(r.ok is ok for r in results.values()) for ok in MARKS}
    words = [f"{number[True]} hold", f"{number[False]} broken", f"{number[None]} not applicable"]
    print(f"  {', '.join(words)} ({time.perf_counter() - begin:.1f} s)", file=out)
    if raise_on_failure and number[False]:
        broken = [f"\n  {r}" for r in results.values() if r.ok is False]
        raise AssertionError(f"{type(memory).__name__} breaks" + "".join(broken))
    return results


def judge(bench: Bench, name: str, exception: str | None = None, golden: Callable | None = None) -> Result:
    """One law on a bench that is kept: what was compiled for one law serves the others. Arguments as in `check`."""
    if name == "golden":
        return _golden(golden)
    if name in WHOLE:
        return Result(name, *_verdict(WHOLE[name], bench))
    if exception is None:
        return _over(name, bench, bench.cases_of(name))
    inside = [c._replace(start=np.zeros((B, T), bool), fresh=False) for c in bench.cases_of(name)]
    result = _over(name, bench, inside)
    if result.ok is not True:
        return result
    outside = [c for c in bench.cases_of(name) if c.fresh or c.start.any()]
    if all(_verdict(CONTENTS[name], bench, c)[0] for c in outside):
        return Result(name, False, f"declared off, but it holds: {exception}")
    return Result(name, True, f"inside a document; declared: {exception}")


def _over(name: str, bench: Bench, cases: Iterable[Case]) -> Result:
    """One law on cases; the first that fails is made as small as simple steps make it."""
    law, detail = functools.partial(_verdict, CONTENTS[name], bench), ""
    for case in cases:
        ok, detail = law(case)
        if ok is False and detail.startswith("raises"):  # whatever the contents, mostly; and each try compiles anew
            return Result(name, False, detail)
        while ok is False:
            found = next((f for f in ((c, *law(c)) for c in _smaller(case)) if f[1] is False), None)
            if found is None:
                return Result(name, False, f"{detail} ({case})")
            case, _, detail = found
        if ok is None:
            return Result(name, None, detail)
    return Result(name, True, detail)


def _verdict(law: Callable, *args) -> tuple[bool | None, str]:
    """A memory under construction may also raise: that is a broken law, not the end of the check."""
    try:
        return True, law(*args)
    except NotApplicable as reason:
        return None, f"n/a: {reason}"
    except Broken as broken:
        return False, str(broken)
    except Exception as error:
        return False, f"raises {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _smaller(case: Case) -> Iterator[Case]:
    """No start, no padding, one row, fewer tokens, one start less: each is simpler, so shrinking ends."""
    live, at = case.valid | case.start, np.arange(T)[None]
    rows, length = np.flatnonzero(live.any(1)), 1 + int(np.flatnonzero(live.any(0)).max(initial=0))
    if case.start.any():
        yield case._replace(start=np.zeros_like(case.start))
    filled = live.any(1, keepdims=True) & (at < length)
    if (filled & ~case.valid).any():
        yield case._replace(valid=filled)
    keep = [(np.arange(B) == r)[:, None] & (at >= 0) for r in rows] if len(rows) > 1 else []
    keep += [at < n for n in sorted({length // 2, length - 1}) if n > 0]
    for k in keep:
        yield case._replace(valid=case.valid & k, start=case.start & k)
    for r, t in np.argwhere(case.start):
        fewer = case.start.copy()
        fewer[r, t] = False
        yield case._replace(start=fewer)


def _golden(golden: Callable | None) -> Result:
    if golden is None:
        return Result("golden", None, "n/a: no recorded numbers given")
    try:
        rows = list(golden())
    except Exception as error:
        return Result("golden", False, f"raises {type(error).__name__}: {error}")
    off = [f"{array} off by {error:.1e}" for array, error, ok in rows if not ok]
    if off or not rows:
        return Result("golden", False, "; ".join(off) or "holds no array")
    return Result("golden", True, f"{count(len(rows), 'array')}, the worst off by {max(r[1] for r in rows):.1e}")
