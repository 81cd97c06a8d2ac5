"""What every op does before its mathematics: choose an implementation, check its arguments, choose a dtype."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.compat import match_varying
from pallas_kernels.scan import only

Form = Callable[..., Any]

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
"""The implementation that is written for a platform, where an op has it."""

SHORT = 16
"""Up to this many tokens None means the token recurrence: its program is several times smaller than that of the chunk
form, and nothing is left to win from chunks."""

MARGIN = 1.15
"""So many times faster than the recurrence must another form have been measured to be taken: less is noise."""

MEASURED: Mapping[str, Sequence[Mapping[str, Any]]] = json.loads(
    (Path(__file__).parent / "measured_on_cpu.json").read_text(encoding="utf-8")
)["forward"]
"""For each op and variant the times of its forms, without a gradient, by tokens t and elements of state. Made by
`python -m experiments.measure_forms`."""


def run(
    op: str,
    implementation: str | None,
    forms: Mapping[str, Form],
    args: tuple,
    *,
    t: int,
    size: int,
    variant: str = "",
    short: int = SHORT,
    **static: Any,
) -> Any:
    """forms[implementation](*args, **static); None takes the form that was measured to be the fastest.

    Args:
      forms: by name, functions of a module, so that what was compiled of them is found again.
      args: arrays, None, or trees of these. static: settings.
      t: tokens. size: elements of the state, all rows together. variant: of the op, where its forms cost otherwise.

    None picks by what is asked for. Up to `short` tokens it is the recurrence. Beyond, where a gradient is taken, it is
    a kernel of the platform or "xla", whose memory doesn't grow with t times the state; without a gradient CPUs follow
    MEASURED. The platform is that which the program is lowered for, whatever devices this machine has. A form that
    raises NotImplementedError leaves the work to the next; every other error is one. Only a custom VJP can tell whether
    a gradient is taken, so there None has no forward-mode derivative: name "reference" for that.

    Raises ValueError for a name that is not among the forms.
    """
    if implementation is not None:
        if implementation not in forms:
            raise ValueError(f"{op}: implementation is {implementation!r}, needs None or one of {', '.join(forms)}")
        return forms[implementation](*args, **static)
    if t <= short:
        return forms["reference"](*args, **static)
    kernels = tuple((platform, forms[name]) for platform, name in KERNELS.items() if name in forms)
    cpu = forms[fastest_on_cpu(op + variant, t, size)]
    return _by_platform(cpu, kernels, forms["xla"], tuple(sorted(static.items())))(*match_varying(args))


@functools.cache
def _by_platform(
    cpu: Form, kernels: tuple[tuple[str, Form], ...], xla: Form, static: tuple[tuple[str, Any], ...]
) -> Form:
    """A function of the arguments: `cpu` on CPUs without a gradient, kernels on their platforms, `xla` elsewhere."""
    settings = dict(static)
    other = functools.partial(xla, **settings)
    native = {platform: _or_else(functools.partial(form, **settings), other) for platform, form in kernels}
    forward = native if cpu is xla else native | {"cpu": functools.partial(cpu, **settings)}

    def choose(forms: Mapping[str, Form], *args: Any) -> Any:
        return lax.platform_dependent(*args, **forms, default=other) if forms else other(*args)

    run = jax.custom_vjp(functools.partial(choose, forward))
    run.defvjp(functools.partial(jax.vjp, functools.partial(choose, native)), lambda vjp, cotangents: vjp(cotangents))
    return run


def _or_else(form: Form, other: Form) -> Form:
    def attempt(*args: Any) -> Any:
        try:
            return form(*args)
        except NotImplementedError:
            return other(*args)

    return attempt


def fastest_on_cpu(case: str, t: int, size: int) -> str:
    """The form that was fastest without a gradient at the nearest of the shapes measured, by ratios of t and size."""

    def distance(row: Mapping[str, Any]) -> float:
        return abs(math.log(row["t"] / t)) + abs(math.log(row["size"] / size))

    rows = MEASURED.get(case)
    if not rows:
        return "xla"
    milliseconds = min(rows, key=distance)["milliseconds"]
    return "xla" if MARGIN * milliseconds["xla"] < milliseconds["reference"] else "reference"


def variant_of(log_decay: Array | None) -> str:
    """The name in MEASURED for a decay per head ("", the op itself), none, or one per channel."""
    if log_decay is None:
        return " without decay"
    return "" if log_decay.ndim == 3 else " per channel"


def keep(valid: Array | None, *arrays: Array | None) -> tuple[Any, ...]:
    """The arrays [b t ...] with zeros where valid [b t] is False, whatever stands there; None stays None."""
    if valid is None:
        return arrays
    return tuple(a if a is None else only(valid, a) for a in arrays)


def check_shape(op: str, name: str, array: Array | None, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError if an array that is given has none of the allowed shapes."""
    if array is not None and array.shape not in allowed:
        needed = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{op}: {name} has shape {list(array.shape)}, needs {needed}")


def check_rank(op: str, name: str, array: Array, axes: str) -> None:
    """Raises ValueError if the array has not the axes that the string of names counts, or has an axis of size 0."""
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise ValueError(f"{op}: {name} has shape {list(array.shape)}, needs [{axes}], each at least 1")


def check_bool(op: str, name: str, array: Array | None) -> None:
    """Raises ValueError if an array that is given is not boolean."""
    if array is not None and array.dtype != jnp.bool:
        raise ValueError(f"{op}: {name} has dtype {array.dtype}, needs bool")


def check_masks(op: str, shape: tuple[int, ...], **masks: Array | None) -> None:
    """Raises ValueError if a mask that is given has another shape or is not boolean."""
    for name, mask in masks.items():
        check_shape(op, name, mask, shape)
        check_bool(op, name, mask)


def check_float(op: str, **arrays: Array | None) -> None:
    """Raises ValueError if an array that is given holds no real floats."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}, needs a real floating dtype")


def check_choice(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ValueError if a setting has none of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}, needs one of {', '.join(map(str, allowed))}")


def initial(state: Array | None, shape: tuple[int, ...], dtype: DTypeLike, start: Array | None) -> Array:
    """The state [b ...] to begin with: zeros if none is given, and where a document begins at the first token.

    The latter is what the recurrence does too, but by a product in the fast forms: a state that is not finite, left by
    another document, would stay.
    """
    if state is None:
        return jnp.zeros(shape, dtype)
    state = state.astype(dtype)
    return state if start is None else only(~start[:, 0], state)


def accumulator(*arrays: Array | None) -> DTypeLike:
    """The dtype to accumulate in: float64 if any array has it, else float32."""
    return jnp.float64 if any(a is not None and a.dtype == jnp.float64 for a in arrays) else jnp.float32


def chunk_size_for(op: str, chunk_size: int | None, k: int, v: int) -> int:
    """The chunk_size that is given, or for None the width of a key or a value, whichever is narrower, as a power of two
    from 16 to 64: then a token costs about as much inside its chunk as on the state.

    Raises ValueError unless it is a power of two: chunks are halved again and again.
    """
    if chunk_size is None:
        return min(64, max(16, 1 << (min(k, v) - 1).bit_length()))
    check_chunk_size(op, chunk_size)
    return chunk_size


def check_chunk_size(op: str, chunk_size: int) -> None:
    """Raises ValueError unless chunk_size is a power of two: chunks are halved again and again."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size is {chunk_size}, needs a power of two")
