"""What a bank does to a disk: a few operations that end when the disk has it, and errors that name the file.

Whatever changes a bank goes through the functions of this file, so that a test can stop them at any of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from memjax.errors import BankError, shorten

PARTIAL = ".partial-"  # in the name of every file that is not yet whole


def make_directory(path: Path) -> None:
    """A new directory, and those above it where they are missing."""
    with storage_errors(str(path)):
        path.mkdir(parents=True)


def write_file(file: Path, data: bytes) -> None:
    """Write, and wait until it is on disk."""
    with storage_errors(str(file)), open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def replace_file(file: Path, data: bytes) -> None:
    """Write a file in one step for whoever reads it meanwhile, and wait until it is on disk, name and all."""
    new = file.with_name(f"{file.name}{PARTIAL}{secrets.token_hex(8)}")
    try:
        write_file(new, data)
        rename(new, file)
    except BaseException:
        with contextlib.suppress(BankError):
            remove(new)
        raise
    sync_directory(file.parent)


def rename(old: Path, new: Path) -> None:
    """Give a file another name, in the place of the file that has it."""
    with storage_errors(str(new)):
        os.replace(old, new)


def remove(path: Path) -> None:
    """A file, or a directory with all that is in it; nothing where there is none."""
    with storage_errors(str(path)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    with storage_errors(str(directory)):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(directory: Path) -> int:
    """Take the lock of a bank; it ends with `os.close` of the result, or with the process, however that ends."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BankError(f"{directory}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock before may have removed the directory.
        if not os.path.samestat(os.fstat(handle), os.stat(directory)):
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise BankError(f"{directory}: another process is changing this bank") from None
    except OSError as error:  # a file system without locks
        os.close(handle)
        raise BankError(f"{directory}: can't be locked: {error.strerror}") from None
    return handle


# ---------------------------------------------------------------------------------------------- errors and checks


@contextlib.contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """The storage's errors as a BankError that names the file; TensorStore's own end in a page of specification."""
    try:
        yield
    except BankError:
        raise
    except OSError as error:
        raise BankError(f"{name}: {error.strerror or shorten(error)}") from None
    except ValueError as error:
        text = str(error)
        file = re.search(r'local file "([^"]*)"', text)
        for sign, meaning in (
            ("Digest mismatch", "checksum mismatch, the file is damaged"),
            ("is missing", "missing: lost, or the bank was compacted since it was opened"),
            ("NOT_FOUND", "missing: lost, or the bank was compacted since it was opened"),
        ):
            if sign in text:
                raise BankError(f"{file[1] if file else name}: {meaning}") from None
        if system := re.search(r"os_error_code='(\d+)'", text):
            raise BankError(f"{file[1] if file else name}: {os.strerror(int(system[1]))}") from None
        raise BankError(f"{file[1] if file else name}: {shorten(text.split(' [')[0])}") from None


def is_inside(path: Any) -> bool:
    """A relative path that stays below where it begins, on any system, and that can be printed."""
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    try:
        path.encode()
    except UnicodeEncodeError:  # half a character, which JSON can spell
        return False
    return all(not p.anchor and ".." not in p.parts for p in (PurePosixPath(path), PureWindowsPath(path)))


def sha256_of_ids(ids: np.ndarray) -> str:
    """Of the ids as little-endian uint32: what names the content of a document, with any tokenizer and any dtype."""
    return hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
