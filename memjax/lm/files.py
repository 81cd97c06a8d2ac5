"""A model on disk: one folder with everything that is needed to run it, written whole or not at all.

    model/config.json         format and version, the memory as `to_config` gives it, reading settings, hashes
    model/params.safetensors  arrays in float32 or bfloat16, named by their dotted path: "body.0.memory.w_q"
    model/tokenizer.json      as `Tokenizer.save` writes it

The model's hash is sha256 over its configuration and the bytes of its parameters. A bank stores it: vectors of another
model have the right shapes and mean nothing. Reading settings are not part of it and may be edited.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from memjax.data.tokenizer import Tokenizer, load_tokenizer
from memjax.errors import CheckpointError, ConfigError, TokenizerError, shorten
from memjax.memory import Memory, from_config, named, nested, to_config

FORMAT, VERSION = "memjax-model", 1
CONFIG, PARAMS, TOKENIZER = "config.json", "params.safetensors", "tokenizer.json"
FIELDS: dict[str, type] = {
    "format": str,
    "version": int,
    "memory": object,
    "reading": object,
    "hash": str,
    "tokenizer_hash": str,
    "params_bytes": int,
}


@dataclass(frozen=True)
class ReadingSettings:
    """How a model that was trained with a bank reads: what it met in training, hence what it should meet in use.

    document_tokens: tokens of a document at most. passages: documents read again before answering. answer_tokens:
    tokens of an answer at most.
    """

    document_tokens: int = 64
    passages: int = 2
    answer_tokens: int = 32

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"reading settings: {name} is {value!r}, needs a whole number of at least 1")


ParamsDtype = Literal["float32", "bfloat16"]


class LoadedModel(NamedTuple):
    """What `load_model` gives. params: float32; reading: None for a model that reads no bank; dtype: of the file."""

    model: Memory
    params: dict
    tokenizer: Tokenizer
    reading: ReadingSettings | None
    hash: str
    dtype: ParamsDtype


def save_model(
    path: str | os.PathLike[str],
    model: Memory,
    params: dict,
    tokenizer: Tokenizer,
    *,
    reading: ReadingSettings | None = None,
    dtype: ParamsDtype = "float32",
    overwrite: bool = False,
) -> str:
    """Write a model folder and return the model's hash.

    Args:
      path: a folder that does not exist; with overwrite=True it may be another model, which is replaced at the end.
      model: a memory over token ids, such as `LanguageModel`.
      params: float32, as `model.init` makes them.
      tokenizer: its vocabulary fits into the model's.
      reading: for a model that asks a bank.
      dtype: what params are rounded to on disk; "bfloat16" takes half the space.

    Raises:
      ConfigError: the model takes no token ids.
      CheckpointError: params are not those of the model, or the target exists.
      TokenizerError: the tokenizer has more tokens than the model.
    """
    from memjax.lm.weights.tensorfile import write_tensors

    path = Path(path)
    _check_model("model", model, tokenizer)
    arrays = {name: np.asarray(a) for name, a in named(params).items()}
    _check_arrays("params", model, arrays, "float32")
    _check_target(path, overwrite)
    with whole_folder(path) as partial:
        write_tensors(partial / PARAMS, {name: a.astype(jnp.dtype(dtype)) for name, a in arrays.items()})
        tokenizer.save(partial / TOKENIZER)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "memory": to_config(model),
            "reading": None if reading is None else asdict(reading),
            "hash": _hash(model, partial / PARAMS),
            "tokenizer_hash": tokenizer.hash,
            "params_bytes": (partial / PARAMS).stat().st_size,
        }
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return config["hash"]


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Read a model folder; parameters go to the default device.

    Raises:
      CheckpointError: naming the file and the field: not a model folder, another version, a file that is missing,
        truncated or changed, an array that is missing, not declared, or of another shape.
      ConfigError: the configuration names a class or a field that this version does not have.
      TokenizerError: the tokenizer can't be read, is another one, or does not fit the model.
    """
    from memjax.lm.weights.tensorfile import TensorFile

    path = Path(path)
    config = _read_config(path / CONFIG)
    model = _build(path / CONFIG, config["memory"])
    try:
        reading = None if config["reading"] is None else ReadingSettings(**config["reading"])
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path / CONFIG}: {shorten(error)}") from None

    file = path / PARAMS
    try:
        arrays = TensorFile(file)
    except CheckpointError as error:
        size = f" ({file.stat().st_size:,} bytes, needs {config['params_bytes']:,})" if file.is_file() else ""
        raise CheckpointError(f"{error}{size}") from None
    _check_arrays(str(file), model, arrays, *get_args(ParamsDtype))
    if (found := _hash(model, file)) != (stated := config["hash"]):
        said = f"field 'hash' of {CONFIG} is {shorten(repr(stated))}, config and file give {found!r}"
        raise CheckpointError(f"{file}: {said}")

    tokenizer: Tokenizer = load_tokenizer(path / TOKENIZER)  # type: ignore[assignment]  # cached_property, not property
    if tokenizer.hash != config["tokenizer_hash"]:
        found, needs = tokenizer.hash[:12], str(config["tokenizer_hash"])[:12]
        raise TokenizerError(f"{path / TOKENIZER}: its hash is {found}..., the model needs {needs}...")
    _check_model(str(path), model, tokenizer)
    specs = model.param_specs()
    # copied: the arrays lie in the file, which may be replaced
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32), nested(specs, dict(arrays)))
    stored: Any = next((a.dtype.name for a in arrays.values()), "float32")
    return LoadedModel(model, params, tokenizer, reading, config["hash"], stored)


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it holds a model; `load_model` tells whether it is whole."""
    return _stated(path).get("format") == FORMAT


def model_hash(path: str | os.PathLike[str]) -> str | None:
    """The hash that a model folder states, read in no time; None where there is no model folder."""
    return _stated(path).get("hash") if is_model(path) else None


def _stated(path: str | os.PathLike[str]) -> dict:
    try:
        found = json.loads((Path(path) / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------- checks


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}, needs a model folder") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON, or truncated: {shorten(error)}") from None
    found = config.get("format") if isinstance(config, dict) else type(config).__name__
    if found != FORMAT:
        raise CheckpointError(f"{file}: field 'format' is {shorten(repr(found))}, needs {FORMAT!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(f"{file}: field 'version' is {shorten(repr(config.get('version')))}, needs {VERSION}")
    if missing := FIELDS.keys() - config.keys():
        raise CheckpointError(f"{file}: has no field {min(missing)!r}")
    for name, kind in FIELDS.items():
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise CheckpointError(f"{file}: field {name!r} is {shorten(repr(config[name]))}, needs a {kind.__name__}")
    return config


def _build(file: Path, config: Any) -> Memory:
    """The memory of a configuration, whose declarations can be read; ConfigError for anything that is none."""
    try:
        model = from_config(config)
        if isinstance(model, Memory):
            named(model.param_specs())
            return model
    except ConfigError as error:
        raise ConfigError(f"{file}: {shorten(error)}") from None
    except Exception as error:  # fields of the wrong type fail wherever they are used first
        said = f"{type(error).__name__}: {shorten(error)}"
        raise ConfigError(f"{file}: field 'memory' describes nothing that can be built: {said}") from None
    raise ConfigError(f"{file}: field 'memory' is {shorten(repr(config))}, needs a configuration")


def _check_model(name: str, model: Memory, tokenizer: Tokenizer) -> None:
    if not model.takes_ids or model.reads_ids is None:
        raise ConfigError(f"{name}: {type(model).__name__} takes no token ids, needs a language model")
    if tokenizer.vocab_size > model.reads_ids:
        raise TokenizerError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.reads_ids}")


def _check_arrays(name: str, model: Memory, arrays: Mapping[str, np.ndarray], *dtypes: str) -> None:
    """All of the model's arrays, in one of these dtypes, and no other."""
    dtypes = next(((a.dtype.name,) for a in arrays.values() if a.dtype.name in dtypes), dtypes)
    specs = named(model.param_specs())
    for leaf, spec in specs.items():
        if leaf not in arrays:
            raise CheckpointError(f"{name}: has no array {leaf!r}, needs {dtypes[0]}{list(spec.shape)}")
        found = arrays[leaf]
        if found.shape != spec.shape or found.dtype.name not in dtypes:
            raise CheckpointError(
                f"{name}: array {leaf!r} is {found.dtype.name}{list(found.shape)}, needs {dtypes[0]}{list(spec.shape)}"
            )
    if extra := arrays.keys() - specs.keys():
        raise CheckpointError(f"{name}: array {shorten(repr(min(extra)))} is none of this model")


def _check_target(path: Path, overwrite: bool) -> None:
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{path}: exists; overwrite=True replaces a model")
    if not is_model(path):
        raise CheckpointError(f"{path}: exists and is no model; it is not overwritten")


# ---------------------------------------------------------------------------------------------- small parts


def _hash(model: Memory, params: Path) -> str:
    digest = hashlib.sha256(json.dumps(to_config(model), sort_keys=True, separators=(",", ":")).encode() + b"\n")
    with params.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that gets the name `path`, in the place of an older one, when the block ends well."""
    token = secrets.token_hex(8)
    partial, old = (path.with_name(f"{path.name}.{kind}-{token}") for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if replaces := path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            if replaces:
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
