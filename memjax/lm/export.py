"""One decoding step of a model as a program of its own, which runs without memjax, on a CPU, a GPU or a TPU.

    save_export("model.export", model, params, batch=4)  # or: memjax export MODEL --out model.export --batch 4

The file is safetensors: the parameters, and two programs of `jax.export` as bytes. To run it takes jax, flatbuffers,
safetensors, and this:

    import jax, jax.export
    from safetensors.numpy import load_file

    params = load_file("model.export")
    names = "program.init_state", "program.step"
    init_state, step = (jax.export.deserialize(bytearray(params.pop(name))).call for name in names)
    state, step = init_state(), jax.jit(step, donate_argnums=1)
    logits, state = step(params, state, token, valid)  # int32 [4], bool [4] (False: a row rests) -> float32 [4, vocab]

params and state are flat dicts, each array under its dotted path ("body.0.memory.w_q"), because a tree of classes could
only be read where the classes are; the header's field `state_axes` has the axes of each array of the state. Parameters
are arguments and not constants: the program stays small, is compiled without them, and takes those of another model of
this configuration, whose params.safetensors has the same names.

jax reads exported programs for six months at least, later versions may not: keep the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ConfigError
from memjax.lm.weights.tensorfile import save_tensors
from memjax.memory import How, Memory, check_tree, named, nested, to_config
from pallas_kernels.dispatch import KERNELS

FORMAT, VERSION = "memjax-export", "1"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_step(
    model: Memory, params: dict, batch: int, *, platforms: Iterable[str] = PLATFORMS, how: How = How()
) -> bytes:
    """The program (params, state, token [b], valid [b]) -> (logits [b v], state), for all platforms at once.

    Args:
      model: a memory over token ids, such as `LanguageModel`.
      params: its parameters, or their shapes (`jax.eval_shape(model.init, key)`).
      batch: rows; the state is made for them.
      platforms: any of "cpu", "cuda", "tpu", whatever devices this machine has.
      how: an implementation that is named must run on all of the platforms; None takes for each what is best there.

    Raises:
      ConfigError: flatbuffers is not installed, or the model takes no token ids.
      ValueError: params are not those of the model; batch, a platform or an implementation is none.
    """
    _check(model, batch, platforms := tuple(platforms), how)
    specs, states = model.param_specs(), model.state_specs(batch)
    check_tree("export_step", "params", specs, params)

    def step(params, state, token, valid):
        logits, state = model.step(nested(specs, params), nested(states, state), token, valid=valid, how=how)
        return logits, named(state)

    row = lambda dtype: jax.ShapeDtypeStruct((batch,), dtype)  # noqa: E731
    return _export(step, platforms, _shapes(params), _shapes(states), row(jnp.int32), row(jnp.bool_))


def export_init_state(model: Memory, batch: int, *, platforms: Iterable[str] = PLATFORMS) -> bytes:
    """The program () -> state, the empty memory for these rows. Arguments and errors as for `export_step`."""
    _check(model, batch, platforms := tuple(platforms), How())
    return _export(lambda: named(model.init_state(batch)), platforms)


def save_export(
    path: str | os.PathLike[str],
    model: Memory,
    params: dict,
    batch: int,
    *,
    platforms: Iterable[str] = PLATFORMS,
    how: How = How(),
) -> int:
    """Write both programs and the parameters into one file, whole or not at all; the bytes of the programs.

    An older export of this name is replaced. Arguments and errors as for `export_step`, and CheckpointError where the
    file exists and is something else.
    """
    platforms = tuple(platforms)
    programs = {
        "program.init_state": export_init_state(model, batch, platforms=platforms),
        "program.step": export_step(model, params, batch, platforms=platforms, how=how),
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "jax": jax.__version__,
        "batch": str(batch),
        "platforms": " ".join(platforms),
        "memory": json.dumps(to_config(model), sort_keys=True),
        "state_axes": json.dumps({name: spec.axes for name, spec in named(model.state_specs(batch)).items()}),
    }
    arrays = {name: np.frombuffer(program, np.uint8) for name, program in programs.items()}
    save_tensors(path, {**arrays, **{name: np.asarray(a) for name, a in named(params).items()}}, header, "export")
    return sum(map(len, programs.values()))


def _check(model: Memory, batch: int, platforms: tuple[str, ...], how: How) -> None:
    if not model.takes_ids:
        raise ConfigError(f"export: {type(model).__name__} takes no token ids, needs a language model")
    if batch < 1:
        raise ValueError(f"export: batch is {batch}, needs at least 1")
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"export: platforms are {platforms}, needs some of {', '.join(PLATFORMS)}")
    if (name := how.implementation) is None:
        return
    if name not in model.implementations:
        raise ValueError(f"export: implementation is {name!r}, this model has {', '.join(model.implementations)}")
    only = [p for p, kernel in KERNELS.items() if kernel == name]
    if only and (others := [p for p in platforms if p not in only]):
        raise ValueError(
            f"export: implementation {name!r} is none for {others[0]}; name the platform {only[0]} alone, or leave the"
            " choice to each platform (None)"
        )


def _export(program: Callable[..., Any], platforms: tuple[str, ...], *shapes: Any) -> bytes:
    from jax import export

    exported = export.export(jax.jit(program), platforms=platforms)(*shapes)
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise ConfigError(f"export: needs flatbuffers, pip install 'memjax[export]': {error}") from None


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What stands in the flat dict of a tree of arrays, of their shapes or of their declarations."""
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in named(tree).items()}
