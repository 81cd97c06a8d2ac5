"""Files of a folder to texts, and why the others were left out."""

import errno
import importlib.util
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from memjax.data.encodings import decode
from memjax.data.markup import html_text, is_html, notebook_text
from memjax.data.pdf import NoReader, pdf_text
from memjax.errors import DataError

SKIPPED_FOLDERS = ("__pycache__", "node_modules")
"""Folders that hold no sources. Hidden files and folders (.git, .venv, .env) are passed over too."""

_TESTS = {"test", "tests", "idle_test"}
_UNUSABLE = dict.fromkeys((0, *range(0xD800, 0xE000)), "\ufffd")  # what the entities of an extracted text can hold


class File(NamedTuple):
    """One text with the name it is cited by: a relative path with "/", or a logical name."""

    path: str
    text: str
    lines: tuple[int, ...] | None = None
    """Of an extracted text: for each of its lines the line of the source, or the page of the PDF."""


class Skipped(NamedTuple):
    """A file that was not read, and why: "kind" or "kind: particulars"."""

    path: str
    reason: str
    unread: bool = False
    """It could not be read here and now, so what it holds is not known; or, of a folder, what is below it."""


def read_folder(
    path: str | os.PathLike, *, max_bytes: int = 1 << 24, extensions: tuple[str, ...] | None = None
) -> tuple[list[File], list[Skipped]]:
    """Read every file below a folder that holds text, in the order of their relative paths; or one file.

    Text is read in any encoding that is certain (`memjax.data.encodings`); line ends stay as they are. Of web pages the
    visible text is taken, of notebooks the cells' sources, of PDFs the pages (extra `pdf`): such a `File` has `lines`.
    Hidden entries, `SKIPPED_FOLDERS` and other extensions are passed over. Whatever else can't be used is listed:
    binary files, uncertain encodings, empty, oversized or unreadable files, pipes and devices, names that are not
    UTF-8, links to folders (they can form loops), and links to files outside of the folder. Other links are followed.

    Args:
      path: a folder or a file.
      max_bytes: larger files are skipped, and PDFs that unpack to more than four times as many characters.
      extensions: endings of names, such as (".py", ".md"); None takes all. Not asked of a file named by `path` itself.

    Returns:
      The files, and the skipped ones with their reasons.

    Raises:
      DataError: naming the path, if it does not exist, if the folder has no text file, or if the file is not usable.
    """
    root = Path(path)
    if extensions is not None and (not extensions or not all(end.startswith(".") for end in extensions)):
        raise ValueError(f"extensions must be endings that begin with a dot, such as ('.py',), got {extensions!r}")
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the name
        raise DataError(f"{root}: there is no such file or folder") from None
    except OSError as error:
        raise DataError(f"{root}: {_why(error)}") from None
    if not is_folder:
        found = _read(root, root.name, max_bytes)
        if isinstance(found, Skipped):
            raise DataError(f"{root}: can't be used as text: {found.reason}")
        return [found], []

    inside = root.resolve()
    read = [
        _read(file, name, max_bytes, inside) for name, file in sorted(_walk(root)) if name.endswith(extensions or "")
    ]
    files = [found for found in read if isinstance(found, File)]
    skipped = [found for found in read if isinstance(found, Skipped)]
    if not files:
        ending = f" with extension {' or '.join(extensions)}" if extensions else ""
        example = f", such as {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{root}: the folder holds no text file{ending} ({len(skipped)} skipped{example})")
    return files, skipped


def standard_library() -> list[File]:
    """The text that is on every machine with Python: the standard library's sources, and pydoc's help topics.

    The modules of `sys.stdlib_module_names` without their tests, in the order of their paths, then the topics under
    pydoc_data/topics/. It depends on nothing but the version of Python (3.11: 11.8 MB, 3.8
    million tokens of a BPE with a vocabulary of 2048).

    Raises:
      DataError: if this Python came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    # What else lies at the top is installed packages, or describes one machine (_sysconfigdata, sitecustomize).
    for module in sys.stdlib_module_names:
        if (root / f"{module}.py").is_file():
            found.append((f"{module}.py", root / f"{module}.py"))
        found += [(f"{module}/{name}", path) for name, path in _walk(root / module) if name.endswith(".py")]
    files = []
    for name, path in sorted(found):
        file = _read(path, name, max_bytes=1 << 24)
        # The topics are one dict literal in their source, and are read from the dict below.
        if isinstance(file, File) and not _TESTS & set(name.split("/")) and name != "pydoc_data/topics.py":
            files.append(file)
    if not files:
        raise DataError(f"{root}: this Python came without the sources of the standard library")
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        files += sorted(File(f"pydoc_data/topics/{name}.txt", text) for name, text in topics.items())
    return files


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of what is below root and not hidden.

    Links to folders are given, not entered; so are folders that can't be listed.
    """
    waiting = [("", root)]  # no recursion: folders may lie deeper than Python's stack
    while waiting:
        above, folder = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing]
        except OSError:
            yield above.removesuffix("/") or ".", folder
            continue
        for name, is_folder in entries:
            if not name.startswith("."):
                if not is_folder:
                    yield above + name, folder / name
                elif name not in SKIPPED_FOLDERS:
                    waiting.append((f"{above}{name}/", folder / name))


def _read(path: Path, name: str, max_bytes: int, inside: Path | None = None) -> File | Skipped:
    """One file; if `inside` is given, links must not lead out of it."""
    printable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if printable != name:
        return Skipped(printable, "its name is not UTF-8")
    try:
        # Look before opening: a named pipe would block for ever.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            if not path.is_symlink():
                os.listdir(path)  # it could not be listed, and raises that again
            return Skipped(name, "a link to a folder")
        if not stat.S_ISREG(status.st_mode):
            return Skipped(name, "not a regular file")
        if inside is not None and path.is_symlink() and not path.resolve().is_relative_to(inside):
            return Skipped(name, "a link out of the folder")
        with path.open("rb") as stream:
            data = b"" if status.st_size > max_bytes else stream.read(max_bytes + 1)  # it may grow meanwhile
        size = max(status.st_size, len(data))
        if size > max_bytes:
            return Skipped(name, f"too large: {size} bytes, over max_bytes = {max_bytes}")
    except OSError as error:
        return Skipped(name, _why(error), unread=error.errno != errno.ENOENT)
    try:
        file = _file(name, data, max_bytes)
    except NoReader as error:
        return Skipped(name, str(error), unread=True)
    except DataError as error:
        return Skipped(name, str(error))
    if not file.text.strip():
        return Skipped(name, "empty" if file.lines is None else "empty: no text to be seen")
    return file


def _file(name: str, data: bytes, max_bytes: int) -> File:
    ending = os.path.splitext(name)[1].lower()
    if ending == ".pdf":
        extract = pdf_text(data, max_bytes)
    elif data.startswith(b"%PDF-"):
        raise DataError("PDF: needs a name that ends in .pdf")  # by which its citations count pages
    else:
        text = decode(data)
        if is_html(name, text):
            extract = html_text(text)
        elif ending != ".ipynb" or (extract := notebook_text(text)) is None:
            return File(name, text)
    return File(name, extract.text.translate(_UNUSABLE), extract.lines)


def _why(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)
