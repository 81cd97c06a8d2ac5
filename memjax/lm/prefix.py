"""What a model has read, on disk: read a long prompt once, continue it as often as you like.

    prefix = read(model, params, model.init_state(1), prompt)
    save_prefix("manual.prefix", model, params, prefix)
    prefix = load_prefix("manual.prefix", model, params)
    tokens, _ = generate(model, params, fork(model, prefix, 4), questions, steps=32)

One safetensors file: the state's arrays by their dotted path and the logits, with the model's configuration and hash
in the header. A state of other parameters has the right shapes and means nothing, so it is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from memjax.errors import CheckpointError, shorten
from memjax.lm.generate import Prefix
from memjax.lm.weights.tensorfile import TensorFile, has_format, save_tensors
from memjax.memory import CAPACITY_AXES, Memory, named, nested, to_config

FORMAT, VERSION = "memjax-prefix", "1"


def fingerprint(model: Memory, params: dict) -> str:
    """sha256 over the configuration, and the paths, shapes and bytes of the parameters."""
    digest = hashlib.sha256(_config(model).encode())
    for path, leaf in named(params).items():
        a = np.asarray(leaf, order="C")
        digest.update(f"\n{path} {a.dtype.name}{list(a.shape)}\n".encode())
        digest.update(a.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_prefix(path: str | os.PathLike[str], model: Memory, params: dict, prefix: Prefix) -> None:
    """Write a prefix, whole or not at all. An older one of this name is replaced.

    Raises CheckpointError where the file exists and is something else.
    """
    header = {"format": FORMAT, "version": VERSION, "model": fingerprint(model, params), "memory": _config(model)}
    save_tensors(path, {name: np.asarray(a) for name, a in _arrays(prefix).items()}, header, "saved state")


def load_prefix(path: str | os.PathLike[str], model: Memory, params: dict) -> Prefix:
    """Read a prefix that this model has written; arrays go to the default device.

    Raises CheckpointError, naming the file and the field or array: missing, truncated, no prefix, of another version,
    of a model with another configuration or other parameters.
    """
    file = TensorFile(path)
    for field, needs in (("format", FORMAT), ("version", VERSION)):
        if (found := file.metadata.get(field)) != needs:
            raise CheckpointError(f"{path}: field {field!r} is {shorten(repr(found))}, needs {needs!r}")
    if file.metadata.get("memory") != _config(model):
        raise CheckpointError(f"{path}: field 'memory' is of a model with another configuration")
    if (found := file.metadata.get("model")) != (needs := fingerprint(model, params)):
        raise CheckpointError(f"{path}: field 'model' is {str(found)[:12]}..., this model is {needs[:12]}...")
    if "logits" not in file.specs or len(file.specs["logits"].shape) != 2:
        raise CheckpointError(f"{path}: has no array 'logits' of rows and tokens")
    logits = file["logits"]
    specs = model.state_specs(len(logits))
    expected = {f"state.{name}": spec for name, spec in named(specs).items()}
    for name, spec in expected.items():
        if name not in file.specs:
            raise CheckpointError(f"{path}: has no array {name!r}")
        a, shape = file[name], spec.shape
        same = a.ndim == len(shape) and all(
            m == n or axis in CAPACITY_AXES for m, n, axis in zip(a.shape, shape, spec.axes, strict=True)
        )
        if not same or a.dtype != jnp.dtype(spec.dtype):
            needs = f"{jnp.dtype(spec.dtype).name}{list(shape)}"
            raise CheckpointError(f"{path}: array {name!r} is {a.dtype.name}{list(a.shape)}, needs {needs}")
    if extra := file.specs.keys() - expected.keys() - {"logits"}:
        raise CheckpointError(f"{path}: array {shorten(repr(min(extra)))} is none of this model")
    state = nested(specs, {name: jnp.array(file[f"state.{name}"]) for name in named(specs)})
    return Prefix(state, jnp.array(logits))


def is_prefix(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a prefix; `load_prefix` tells whether it is whole."""
    return has_format(path, FORMAT)


def _config(model: Memory) -> str:
    return json.dumps(to_config(model), sort_keys=True)


def _arrays(prefix: Prefix) -> dict[str, Any]:
    return {"logits": prefix.logits, **{f"state.{name}": a for name, a in named(prefix.state).items()}}
