"""Checkpoints: parameters, optimizer state, key, data position and configuration of a step, exact to the bit.

    DIRECTORY/step_00000200/checkpoint.json      format, step, config, key, data position; size and crc32 of each file
    DIRECTORY/step_00000200/{params,opt_state}/  arrays, written and read by orbax (`orbax.checkpoint.v1`)

A checkpoint is written under a temporary name and renamed when it is whole, so what has a final name is finished:
resuming takes the newest of these from disk and remembers nothing. orbax itself restores into another dtype without a
word and reads a flipped bit as another number; names, shapes, dtypes and checksums are compared here, before it reads.
The directory is local, or shared by all processes; every process calls `save` and `restore`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from memjax.errors import CheckpointError, shorten
from memjax.in_storage.bank_disk import is_inside

FORMAT = 1
MANIFEST = "checkpoint.json"


class Checkpoint(NamedTuple):
    """What `restore` gives back."""

    step: int
    params: Any
    opt_state: Any
    key: Array
    extra: Any


# ---------------------------------------------------------------------------------------------- save


def save(
    directory: str | os.PathLike[str],
    step: int,
    *,
    params: Any,
    opt_state: Any,
    key: Array,
    config: dict[str, Any],
    data_iterator: Any = None,
    extra: Any = None,
) -> Path:
    """Write the checkpoint of `step` and return its path; it is finished when this returns.

    Args:
      directory: of the run; made where it is missing.
      step: updates done.
      params, opt_state, extra: pytrees of arrays, sharded or not; extra is what else there is (a memory's state).
      key: a random key, typed or uint32, stored as its key data.
      config: JSON-able; with `memjax.memory.to_config(memory)` the memory can be rebuilt from the file alone.
      data_iterator: its `get_state()` is stored, JSON-able (grain's are). It is one position, the same in every process
        (each reads its own rows of one global order), so that another number of processes can resume.

    Raises:
      CheckpointError: there is a checkpoint of this step already, something is not JSON-able, or the disk is full.
    """
    from orbax.checkpoint import v1 as ocp

    final = Path(directory).absolute() / f"step_{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    if final.exists():
        raise CheckpointError(f"{final}: there is a checkpoint of step {step} already")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "config": _as_json("config", config),
        "key": _key_to_json(key),
        "data": None if data_iterator is None else _position(data_iterator),
    }
    if jax.process_index() == 0:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(final.parent)
    _barrier(f"save {step}: directory")
    trees = {"params": params, "opt_state": opt_state, "extra": extra}
    needs, free = sum(a.nbytes for a in jax.tree.leaves(trees)), shutil.disk_usage(final.parent).free
    if free < needs:  # said here in one line, and by orbax's threads in many
        raise CheckpointError(f"{final}: can't be written: needs {needs:,} bytes, the disk has {free:,} left")
    with _orbax(final, "written"):
        ocp.save_checkpointables(str(temporary), {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)})
    if jax.process_index() == 0:
        names = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
        manifest["files"] = {n: [(temporary / n).stat().st_size, _crc32(temporary / n)] for n in names}
        manifest["crc32"] = _crc32_of(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(temporary, final)
    _barrier(f"save {step}: renamed")
    return final


def delete_old(directory: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed processes left."""
    if jax.process_index() == 0:
        _remove_left_overs(Path(directory))
        for step in finished_steps(directory)[:-keep]:
            path = Path(directory) / f"step_{step:08d}"
            doomed = path.with_name(path.name + ".tmp")  # renamed first: half of it must not look finished
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def _remove_left_overs(directory: Path) -> None:
    """Of a run that was killed while it wrote or deleted."""
    for left_over in directory.glob("step_*.tmp*"):
        shutil.rmtree(left_over)


def finished_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps with a finished checkpoint, ascending; empty where the directory is missing."""
    matches = (re.fullmatch(r"step_([0-9]{8,})", p.name) for p in Path(directory).glob("step_*") if p.is_dir())
    return sorted(int(m[1]) for m in matches if m)


# ---------------------------------------------------------------------------------------------- restore


def restore(
    directory: str | os.PathLike[str],
    *,
    params: Any,
    opt_state: Any,
    config: dict[str, Any] | None = None,
    step: int | None = None,
    data_iterator: Any = None,
    extra: Any = None,
) -> Checkpoint:
    """Read a checkpoint, exact to the bit.

    Args:
      directory: of the run.
      params, opt_state, extra: pytrees of arrays or `jax.ShapeDtypeStruct`: what the checkpoint must hold, and where it
        goes (`sharding`; that of another run or another number of devices is no matter). extra None: not read.
      config: what the checkpoint's must equal; None: not compared.
      step: None takes the newest finished one.
      data_iterator: is set to the stored position.

    Raises:
      CheckpointError: no checkpoint; one of another format, config, structure, shape or dtype, naming the first field
        that differs; a file that is missing, truncated or damaged, naming it.
    """
    path = _path_of(directory, step)
    manifest = _read_manifest(path)
    if config is not None and (found := _difference(manifest["config"], _as_json("config", config), "config")):
        field, stored, given = found
        raise CheckpointError(f"{path}: {field} is {stored} in the checkpoint, needed {given}")
    key = _key_from_json(path / MANIFEST, manifest["key"])
    _check_files(path, manifest)
    wanted = {"params": params, "opt_state": opt_state, "extra": extra}
    trees = _load(path, {name: tree for name, tree in wanted.items() if jax.tree.leaves(tree)})
    if data_iterator is not None:
        if manifest["data"] is None:
            raise CheckpointError(f"{path}: has no data position, needed one to resume data_iterator")
        try:
            data_iterator.set_state(manifest["data"])
        except Exception as error:  # whatever an iterator makes of a position that is none of its own
            said = f"field 'data' is no position of data_iterator: {shorten(error)}"
            raise CheckpointError(f"{path / MANIFEST}: {said}") from error
    whole = {name: trees.get(name, tree) for name, tree in wanted.items()}  # a tree without arrays is its own value
    return Checkpoint(manifest["step"], key=key, **whole)


def load_params(path: str | os.PathLike[str], abstract: Any = None) -> tuple[dict[str, Any], Any]:
    """(config, params) of a checkpoint, or of the newest in a run's directory.

    `abstract`, a pytree of `jax.ShapeDtypeStruct` with shardings, says what must be there and where it goes; None takes
    what is there onto the default device. `memjax.memory.from_config(config)` is the memory, if its config was stored.

    Raises:
      CheckpointError: as `restore`.
    """
    path = Path(path) if (Path(path) / MANIFEST).exists() else _path_of(path, None)
    manifest = _read_manifest(path)
    _check_files(path, manifest)
    if abstract is None:
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), _metadata(path, "params"))
    return manifest["config"], _load(path, {"params": abstract})["params"]


def _path_of(directory: str | os.PathLike[str], step: int | None) -> Path:
    steps = finished_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{directory}: needed {wanted}, finished steps are {steps}")
    return Path(directory).absolute() / f"step_{steps[-1] if step is None else step:08d}"


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        crc32 = manifest.pop("crc32")
        found = _crc32_of(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{file}: the file is truncated or damaged") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format is {_word(manifest.get('format'))}, needed {FORMAT}")
    if crc32 != found:
        raise CheckpointError(f"{file}: the file is damaged, its crc32 is not the one stored in it")
    for field, fits, needs in (
        ("step", lambda v: type(v) is int and v >= 0, "a whole number"),
        ("config", lambda v: isinstance(v, dict), "an object"),
        ("key", lambda v: isinstance(v, dict) and v.keys() == {"impl", "data"}, "an object of impl and data"),
        ("data", lambda v: True, "a position"),
        ("files", lambda v: isinstance(v, dict) and all(map(_is_entry, v.items())), "size and crc32 of each file"),
    ):
        if field not in manifest or not fits(manifest[field]):
            raise CheckpointError(f"{file}: field {field!r} is {_word(manifest.get(field, ...))}, needed {needs}")
    return manifest


def _is_entry(entry: tuple[str, Any]) -> bool:
    """Whether this is (name, [size, crc32]) of a file in the checkpoint."""
    name, value = entry
    return is_inside(name) and isinstance(value, list) and [type(v) for v in value] == [int, int]


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    """Every file is there and whole; the checksums are shared out among the processes."""
    for i, (name, (size, crc32)) in enumerate(manifest["files"].items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: the file is missing")
        if (got := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: the file has {got} bytes, needed {size}; it is truncated or was changed")
        if i % jax.process_count() == jax.process_index() and _crc32(file) != crc32:
            raise CheckpointError(f"{file}: the file is damaged, its crc32 is not the one in {MANIFEST}")


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    for name, tree in wanted.items():
        _check_tree(path, name, _metadata(path, name), tree)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(a) -> bool:  # an array that was never put anywhere may still join others on a mesh, and must stay so
        return a.committed if isinstance(a, Array) else getattr(a, "sharding", None) is not None

    def target(a) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if placed(a) else device)

    with _orbax(path, "read"):
        loaded = ocp.load_checkpointables(str(path), jax.tree.map(target, wanted))
    return jax.tree.map(lambda a, got: got if placed(a) else jax.numpy.asarray(np.asarray(got)), wanted, loaded)


def _metadata(path: Path, name: str) -> Any:
    """The stored pytree with shapes and dtypes in place of arrays; NamedTuples are dicts, tuples are lists."""
    from orbax.checkpoint import v1 as ocp

    if not (path / name).is_dir():
        raise CheckpointError(f"{path}: has no {name}")
    with _orbax(path, "read"):
        return ocp.metadata(str(path), name).metadata


@contextlib.contextmanager
def _orbax(path: Path, done: str) -> Iterator[None]:
    """orbax's errors, which are of any class, as one that names the checkpoint; what its threads log is beyond us."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        said = os.strerror(number) if number else f"{type(error).__name__}: {shorten(error)}"
        raise CheckpointError(f"{path}: can't be {done}: {said}") from error


def _check_tree(path: Path, name: str, stored: Any, wanted: Any) -> None:
    stored, wanted = _arrays(stored, name), _arrays(wanted, name)
    for leaf, need in wanted.items():
        if leaf not in stored:
            raise CheckpointError(f"{path}: has no {leaf}, needed {need}")
        if stored[leaf] != need:
            raise CheckpointError(f"{path}: {leaf} is {stored[leaf]} in the checkpoint, needed {need}")
    for leaf, got in stored.items():
        if leaf not in wanted:
            raise CheckpointError(f"{path}: {leaf} is {got} in the checkpoint, needed no such array")


def _arrays(tree: Any, name: str) -> dict[str, str]:
    """ "params/embed" -> "float32[64, 8]", with the same names for a NamedTuple and for the dict it is stored as."""

    def entry(key) -> str:
        return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join([name, *map(entry, p)]): f"{np.dtype(a.dtype).name}{list(a.shape)}" for p, a in leaves}


def _difference(stored: Any, given: Any, path: str) -> tuple[str, str, str] | None:
    """The first field of two JSON values that differs: its path, and both as JSON."""
    if isinstance(stored, dict) and isinstance(given, dict):
        pairs = [(f"{path}.{k}", stored.get(k, ...), given.get(k, ...)) for k in {**stored, **given}]
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(stored, given, strict=True))]
    else:
        return None if stored == given else (path, _word(stored), _word(given))
    return next((d for p, a, b in pairs if (d := _difference(a, b, p))), None)


def _word(value: Any) -> str:
    return "absent" if value is ... else shorten(json.dumps(value))


# ---------------------------------------------------------------------------------------------- small things


def _key_to_json(key: Array) -> dict[str, Any]:
    typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(key) if typed else key
    return {"impl": str(jax.random.key_impl(key)) if typed else None, "data": np.asarray(data).tolist()}


def _key_from_json(file: Path, stored: dict[str, Any]) -> Array:
    try:
        data = jax.numpy.asarray(np.asarray(stored["data"], np.uint32))
        return data if stored["impl"] is None else jax.random.wrap_key_data(data, impl=stored["impl"])
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: field 'key' is no random key: {shorten(error)}") from None


def _position(data_iterator: Any) -> Any:
    position = _as_json("data_iterator.get_state()", data_iterator.get_state())
    if jax.process_count() > 1:
        message = "save: data_iterator is at different positions in different processes, needs one"
        multihost_utils.assert_equal(np.uint32(_crc32_of(position)), message)
    return position


def _as_json(name: str, value: Any) -> Any:
    """As it will be read back: tuples become lists."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise CheckpointError(f"save: {name} is {value!r:.80}, needs JSON values: {error}") from None


def _crc32(file: Path) -> int:
    crc32 = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def _crc32_of(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
