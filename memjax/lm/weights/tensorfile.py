"""Safetensors files as they lie on disk: a tensor is read when asked for, a file can be written again byte for byte.

The safetensors package checks a file. It is not what reads and writes it here, because it sorts the tensors its own way
when it writes, and numpy alone has no bfloat16.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax.errors import CheckpointError, shorten
from memjax.in_storage.bank_disk import is_inside

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(jnp.bfloat16),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Spec(NamedTuple):
    """One tensor: dtype as the file calls it, shape, and which bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name, mapped into memory and read-only.

    path: as given. metadata: text by text. specs: name -> `Spec`, in the order of the bytes.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises CheckpointError where the file is missing, truncated or damaged."""
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            with safe_open(self.path, framework="numpy"):
                pass
            with self.path.open("rb") as stream:
                length = stream.read(8)
                self._head = length + stream.read(int.from_bytes(length, "little"))
            header = json.loads(self._head[8:])
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            found = {name: Spec(t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()}
            empty = self.path.stat().st_size == len(self._head)
            self._bytes = np.empty(0, np.uint8) if empty else np.memmap(self.path, np.uint8, "r", len(self._head))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror or 'missing'}") from None
        # The two parsers of a header don't agree on everything: numbers of 5000 digits in fields that nobody reads.
        except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: truncated or damaged: {shorten(error)}") from None
        self.specs = dict(sorted(found.items(), key=lambda item: item[1].begin))

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        if spec.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} is {spec.dtype}, needs one of {', '.join(DTYPES)}")
        try:
            return self._bytes[spec.begin : spec.end].view(DTYPES[spec.dtype]).reshape(spec.shape)
        except ValueError:  # without elements, and more of them along an axis than an array can have
            raise CheckpointError(f"{self.path}: tensor {name!r} is {list(spec.shape)}") from None

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        """A file with this one's header, and other values: `arrays` by name, in these shapes, cast to these dtypes."""
        with path.open("wb") as stream:
            stream.write(self._head)
            for name, spec in self.specs.items():
                stream.write(np.ascontiguousarray(arrays[name]).astype(DTYPES[spec.dtype]).tobytes())


def save_tensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: dict[str, str], what: str
) -> None:
    """Write a file, whole or not at all; one whose metadata has the same "format" is replaced.

    Raises CheckpointError where the file exists and is not what it is going to be.
    """
    path = Path(path)
    if path.exists() and not has_format(path, metadata["format"]):
        raise CheckpointError(f"{path}: exists and is no {what}; it is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(8)}")
    try:
        write_tensors(partial, arrays, metadata)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a file as the safetensors package does. CheckpointError where the disk refuses."""
    import safetensors.numpy

    try:
        # order C: the file takes the bytes as they lie, whatever the strides say
        safetensors.numpy.save_file({n: np.asarray(a, order="C") for n, a in arrays.items()}, path, metadata)
    except (OSError, safetensors.SafetensorError) as error:  # the package has a full disk as an error of its own
        raise CheckpointError(f"{path}: can't be written: {error}") from None


def has_format(path: str | os.PathLike[str], name: str) -> bool:
    """Whether a file's metadata says that it has this format."""
    try:
        return TensorFile(path).metadata.get("format") == name
    except CheckpointError:
        return False


class Shards:
    """The safetensors files of a folder, and in which of them each tensor is."""

    def __init__(self, folder: Path):
        self.folder, self.index = folder, None
        if (folder / WHOLE).is_file():
            self.files = {WHOLE: TensorFile(folder / WHOLE)}
        elif (folder / INDEX).is_file():
            self.index = folder / INDEX
            found = _weight_map(self.index)
            self.files = {name: TensorFile(folder / name) for name in sorted(set(found.values()))}
            for tensor, name in found.items():
                if tensor not in self.files[name]:
                    raise CheckpointError(f"{folder / name}: has no tensor {tensor!r}, which {INDEX} says is there")
        else:
            raise CheckpointError(f"{folder}: has neither {WHOLE} nor {INDEX}{_others(folder)}")
        self.where: dict[str, TensorFile] = {}
        for file in self.files.values():
            for tensor in file:
                if tensor in self.where:
                    raise CheckpointError(f"{file.path}: tensor {tensor!r} is in {self.where[tensor].path.name} too")
                self.where[tensor] = file

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.where[name].specs[name].shape

    @property
    def label(self) -> Path:
        """The file to name where a tensor is in none."""
        return self.index or self.folder / WHOLE


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{index}: has no field 'weight_map'") from None
    if not isinstance(found, dict) or not all(map(_is_name, found.values())):
        raise CheckpointError(f"{index}: field 'weight_map' needs the name of a file for each tensor")
    return found


def _is_name(name: object) -> bool:
    """Whether this is the name of a file in a folder, and no path to another."""
    if not isinstance(name, str) or len(name) > 255 or not name.isprintable():
        return False
    return is_inside(name) and Path(name).name == name


def _others(folder: Path) -> str:
    """A hint, where the weights are there in another format."""
    others = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pth", ".pt", ".safetensors"))
    return f"; {others[0]} is not read, save it as {WHOLE}" if others else ""
