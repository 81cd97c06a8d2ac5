"""Language models from the field: folders of config.json and safetensors in Hugging Face's layout, read and written.

    model, params = load_pretrained("gla-1.3B-100B")
    save_pretrained("mine", model, params, like="gla-1.3B-100B")  # the same params: the same bytes

Which models: `families.py`. Where a memory's parameters are found, its own table says (`Memory.tensors`). Parameters
are float32, whatever the file holds; when they are written, each tensor gets its dtype back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import tensors
from memjax.errors import CheckpointError, ConfigError, shorten
from memjax.lm.files import whole_folder
from memjax.lm.model import LanguageModel
from memjax.lm.weights.config import Config
from memjax.lm.weights.families import published
from memjax.lm.weights.names import Published
from memjax.lm.weights.tensorfile import Shards
from memjax.memory import named

CONFIG = "config.json"
FLOATS = ("F32", "F16", "BF16")
# What else a tensor is called: with the norm and the gate apart (flash-linear-attention), or by mamba_ssm.
ALSO = ((".g_norm_swish_gate.", ".g_norm."), ("backbone.embeddings.", "backbone.embedding."))
HEAD, UP, GATE = "lm_head.weight", ".up_proj.weight", ".gate_proj.weight"


class Place(NamedTuple):
    """Where a tensor is: its name in the file, or part `part` of `parts` of the rows under this name."""

    name: str
    part: int = 0
    parts: int = 1


def is_pretrained(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a config.json of the field's kind; `load_pretrained` tells whether it can be read."""
    try:
        values = Config(Path(folder) / CONFIG).values
    except CheckpointError:
        return False
    return "model_type" in values or "ssm_cfg" in values


def special_tokens(folder: str | os.PathLike[str]) -> tuple[int | None, int | None]:
    """The tokens in front of a document and at its end; None where config.json names none."""
    values = Config(Path(folder) / CONFIG).values
    begin, end = (values.get(name) for name in ("bos_token_id", "eos_token_id"))
    return begin, end[0] if isinstance(end, list) else end


def load_pretrained(folder: str | os.PathLike[str], *, dtype: str = "float32") -> tuple[LanguageModel, dict]:
    """Read a published model: the model and its parameters, which go to the default device.

    Args:
      folder: with config.json and model.safetensors, or the shards that model.safetensors.index.json names.
      dtype: the model's compute dtype.

    Raises:
      ConfigError: config.json describes what is not read; it names the field.
      CheckpointError: a file is missing, truncated or damaged; a tensor is missing, left over, of another shape, or
        holds no floats. It names the file and the tensor.
    """
    folder = Path(folder)
    model, layers = known = published(folder / CONFIG, dtype)
    shards = Shards(folder)
    places = _places(known, shards)
    specs = named(model.param_specs())
    found: dict[str, Any] = {}
    for layer in layers:
        names = {name for t in layer.table.values() for name, _ in t.parts}
        arrays = {name: _read(shards, places[layer.prefix + name]) for name in names}
        for path, a in tensors.read(layer.table, arrays).items():
            path = layer.path + path
            if layer.index is None:
                found[path] = a
                continue
            if path not in found:
                found[path] = np.empty(specs[path].shape, np.float32)
            found[path][layer.index] = a
    leaves = [jnp.asarray(found.pop(path)) for path in specs]
    return model, jax.tree.unflatten(jax.tree.structure(model.param_specs()), leaves)


def save_pretrained(
    folder: str | os.PathLike[str], model: LanguageModel, params: dict, *, like: str | os.PathLike[str]
) -> None:
    """Write parameters in the layout of the published model they came from, whole or not at all.

    Args:
      folder: does not exist.
      like: the folder that was loaded. Its config.json, names, order, dtypes, metadata and shards are kept, so that
        parameters that did not change give the same files byte for byte.

    Raises:
      ConfigError: the model is not the one of `like`.
      CheckpointError: `folder` exists, params are not those of the model, or `like` can't be read.
    """
    folder, like = Path(folder), Path(like)
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: exists")
    known = published(like / CONFIG, model.dtype)
    if model != known.model:
        raise ConfigError(f"model: is {model}, {like / CONFIG} describes {known.model}")
    shards = Shards(like)
    places = _places(known, shards)
    arrays = _arrays(known, params, places)
    if known.model.tied and HEAD in shards.where:
        arrays[HEAD] = arrays[_embedding(known, places)]
    with whole_folder(folder) as partial:
        for name, file in shards.files.items():
            file.write(partial / name, arrays)
        for file in (like / CONFIG, shards.index):
            if file is not None:
                shutil.copyfile(file, partial / file.name)


# ---------------------------------------------------------------------------------------------- names and shapes


def _places(known: Published, shards: Shards) -> dict[str, Place]:
    """Where each tensor of the model is. Raises CheckpointError where the file and the model don't fit."""
    places, used = {}, set()
    for name, shape in _shapes(known):
        place = _place(name, shape, shards)
        if place is None:
            raise CheckpointError(f"{shards.label}: has no tensor {name!r}, needs {list(shape)}")
        places[name], file = place, shards.where[place.name]
        spec = file.specs[place.name]
        needs = (shape[0] * place.parts, *shape[1:])
        if spec.shape != needs:
            raise CheckpointError(f"{file.path}: tensor {place.name!r} is {list(spec.shape)}, needs {list(needs)}")
        if spec.dtype not in FLOATS:
            raise CheckpointError(f"{file.path}: tensor {place.name!r} is {spec.dtype}, needs {' or '.join(FLOATS)}")
        used.add(place.name)
    extra = shards.where.keys() - used
    if known.model.tied and HEAD in extra:
        extra -= {HEAD}
        embed = _embedding(known, places)
        ours, theirs = (shards.where[n] for n in (HEAD, embed))
        if ours.specs[HEAD].dtype != theirs.specs[embed].dtype or not np.array_equal(
            ours[HEAD].view(np.uint8), theirs[embed].view(np.uint8)
        ):
            raise CheckpointError(f"{ours.path}: tensor {HEAD!r} differs from {embed!r}, to which {CONFIG} ties it")
    if extra:
        name = min(extra)
        raise CheckpointError(f"{shards.where[name].path}: tensor {shorten(repr(name))} is none of this model")
    return places


def _shapes(known: Published) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the model, each under the first of its names."""
    specs = named(known.model.param_specs())
    for layer in known.layers:
        whole = {path: specs[layer.path + path].shape for path in layer.table}
        leaves = {
            path: jax.ShapeDtypeStruct(shape if layer.index is None else shape[1:], jnp.float32)
            for path, shape in whole.items()
        }
        for name, a in jax.eval_shape(lambda p, table=layer.table: tensors.write(table, p), leaves).items():
            yield layer.prefix + name, a.shape


def _place(name: str, shape: tuple[int, ...], shards: Shards) -> Place | None:
    for found in (name, *(name.replace(old, new) for old, new in ALSO)):
        if found in shards.where and not _is_fused(found, shape, shards):
            return Place(found)
    both = name.replace(UP, GATE)
    if name.endswith((UP, GATE)) and both in shards.where and _is_fused(both, shape, shards):
        return Place(both, part=int(name.endswith(UP)), parts=2)
    return None


def _is_fused(name: str, shape: tuple[int, ...], shards: Shards) -> bool:
    """Whether a gate_proj holds the rows of up_proj too, as in flash-linear-attention before February 2025."""
    return (
        name.endswith(GATE)
        and name.replace(GATE, UP) not in shards.where
        and shards.shape(name) == (2 * shape[0], *shape[1:])
    )


def _embedding(known: Published, places: dict[str, Place]) -> str:
    ((name, _),) = known.layers[0].table["embed"].parts
    return places[name].name


# ---------------------------------------------------------------------------------------------- values


def _read(shards: Shards, place: Place) -> np.ndarray:
    a = shards.where[place.name][place.name]
    rows = len(a) // place.parts
    return a[place.part * rows : (place.part + 1) * rows].astype(np.float32)


def _arrays(known: Published, params: dict, places: dict[str, Place]) -> dict[str, np.ndarray]:
    """The tensors of the file, float32, by their names there."""
    given, specs = named(params), named(known.model.param_specs())
    for path, spec in specs.items():
        if path not in given or given[path].shape != spec.shape:
            found = list(given[path].shape) if path in given else "missing"
            raise CheckpointError(f"params: array {path!r} is {found}, needs {list(spec.shape)}")
    if extra := given.keys() - specs.keys():
        raise CheckpointError(f"params: array {min(extra)!r} is none of this model")
    parts: dict[str, dict[int, np.ndarray]] = {}
    for layer in known.layers:
        here = {path: np.asarray(given[layer.path + path]) for path in layer.table}
        if layer.index is not None:
            here = {path: a[layer.index] for path, a in here.items()}
        for name, a in tensors.write(layer.table, here).items():
            place = places[layer.prefix + name]
            parts.setdefault(place.name, {})[place.part] = a
    return {name: np.concatenate([a for _, a in sorted(found.items())]) for name, found in parts.items()}
