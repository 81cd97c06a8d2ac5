"""Adapters: how each golden file's arrays are given to this library and its results named as in the file.

A module here defines SYSTEMS, name of a system -> function(arrays, cfg) -> {array name: result}. `arrays` are those of
the file, floats in the dtype to run in; `cfg` is the file's cfg_json. A result may also be a dict {label: array} of the
same quantity computed in several ways, of which the worst is judged. A module may define TOLERANCES, name of a system
-> {pattern of an array's name: tolerance}; such a system is judged in float32 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import tensors
from memjax.memory import How, Memory
from memjax.tensors import Tensor
from pallas_kernels.compat import QUICK_COMPILE

Arrays = Mapping[str, np.ndarray]
Results = dict[str, Any]


class GoldenError(Exception):
    """A file that can't be judged: unreadable, not a golden file, or of a system without an adapter."""


class Tail(NamedTuple):
    """A result that stands for the end of the array's last axis: what the reference keeps before it, we don't hold."""

    array: jax.Array


def given(arrays: Arrays, *names: str, optional: Iterable[str] = ()) -> dict[str, jax.Array]:
    """The inputs in_<name> of the file, by name, on the device; `optional` ones only if the file has them."""
    names = (*names, *(name for name in optional if f"in_{name}" in arrays))
    return {name: jnp.asarray(arrays[f"in_{name}"]) for name in names}


def parameters(arrays: Arrays) -> dict[str, jax.Array]:
    """All param_<name> of the file, by name, on the device."""
    return {name.removeprefix("param_"): jnp.asarray(a) for name, a in arrays.items() if name.startswith("param_")}


def in_dtype(tree: Any, dtype: Any) -> Any:
    """A state whose floats have the dtype of the run."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def expect(system: str, cfg: Mapping[str, Any], **fixed: Any) -> None:
    """Raise GoldenError where the file's settings are not those that its adapter runs."""
    for key, value in fixed.items():
        if key in cfg and cfg[key] != value:
            raise GoldenError(f"{system}: cfg_json has {key} = {cfg[key]!r}, this adapter runs only {value!r}")


def value_and_grads(run: Callable[[Any], tuple[Any, Any]], inputs: Any, do: Any) -> tuple[Any, Any, Any]:
    """(outputs, aux) of run(inputs), and the gradients of sum(outputs * do) in the structure of inputs."""

    def both(inputs, do):
        outputs, pull, aux = jax.vjp(run, inputs, has_aux=True)
        return outputs, aux, pull(do)[0]

    return jax.jit(both, compiler_options=QUICK_COMPILE if jax.default_backend() == "cpu" else None)(inputs, do)


def recurrence(
    implementations: Iterable[str],
    call: Callable[[dict[str, jax.Array], str | None], tuple[jax.Array, jax.Array]],
    inputs: dict[str, jax.Array],
    arrays: Arrays,
) -> Results:
    """out_o and out_final_state, which `call(inputs, implementation)` gives, and the gradients of sum(o do) +
    sum(final_state dht): by every implementation, and by the one that None picks."""
    cotangents = given(arrays, "do", "dht")

    def compute(implementation: str | None) -> Results:
        run = lambda a: (dict(zip(("do", "dht"), call(a, implementation), strict=True)), {})  # noqa: E731
        out, _, grads = value_and_grads(run, inputs, cotangents)
        return {"out_o": out["do"], "out_final_state": out["dht"]} | {f"grad_{n}": g for n, g in grads.items()}

    return each((*implementations, None), compute)


def layer(
    memory: Memory, arrays: Arrays, outputs: Callable[[Any], Results], table: Mapping[str, Tensor] | None = None
) -> Results:
    """A layer from its empty state: out_y, the `outputs` of its final state, and the gradients of sum(y do), for x and
    for every parameter under the name that `table` (None: the memory's own) gives it; by every implementation."""
    table = memory.tensors() if table is None else table

    def run(a, how):
        state = in_dtype(memory.init_state(len(a["x"])), a["x"].dtype)
        return memory.apply(tensors.read(table, a["params"]), state, a["x"], how=how)

    def compute(implementation: str | None) -> Results:
        inputs = {"params": parameters(arrays), **given(arrays, "x")}
        y, state, grads = value_and_grads(lambda a: run(a, How(implementation)), inputs, **given(arrays, "do"))
        named = {f"grad_param_{name}": g for name, g in grads["params"].items()}
        return {"out_y": y, **outputs(state), "grad_x": grads["x"], **named}

    return each((*memory.implementations, None), compute)


def convolutions(cache: Any, widths: Iterable[int]) -> Results:
    """out_conv0, out_conv1, ... of a cache [b w c] that holds several streams, of which each reference keeps one."""
    ends = np.cumsum(list(widths))[:-1].tolist()
    return {f"out_conv{i}": Tail(a) for i, a in enumerate(jnp.split(jnp.swapaxes(cache, 1, 2), ends, 1))}


def each(labels: Iterable[str | None], compute: Callable[[Any], Results]) -> Results:
    """The results of `compute(label)` for every label, together under each array's name; None is called default."""
    runs = {label or "default": compute(label) for label in labels}
    names = next(iter(runs.values()))
    return {name: {label: run[name] for label, run in runs.items()} for name in names}
