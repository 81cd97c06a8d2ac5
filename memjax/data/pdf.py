"""The text of PDF files, by pypdf (extra `pdf`)."""

import io
import logging
from typing import Any

from memjax.data.markup import Extract
from memjax.errors import DataError

CHARACTERS = 4  # of text and of drawing commands, for each byte that a file may have; what unpacks to more is a bomb


class NoReader(DataError):
    """The library that reads such files is not installed."""


def pdf_text(data: bytes, max_bytes: int) -> Extract:
    """The pages, a blank line between two, with the number of the page for each line.

    Raises:
      NoReader: there is no pypdf.
      DataError: why it can't be read: encrypted, broken, without text (pictures of pages), too large.
    """
    try:
        import pypdf
        from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError
    except ImportError:
        raise NoReader("PDF: needs pypdf: pip install 'memjax[pdf]'") from None
    log = logging.getLogger("pypdf")  # it would tell of every oddity that it mends
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        return _pages(pypdf.PdfReader(io.BytesIO(data)), CHARACTERS * max_bytes)
    except DataError:
        raise
    except (FileNotDecryptedError, DependencyError):  # needs a password, or a library for AES
        raise DataError("PDF: encrypted") from None
    except LimitReachedError as error:
        raise DataError(f"PDF: too large, {_line(error)}") from None
    except Exception as error:  # of any class, for it follows what the file says
        raise DataError(f"PDF: broken, {type(error).__name__}: {_line(error)}") from None
    finally:
        log.setLevel(level)


def _pages(reader: Any, limit: int) -> Extract:
    texts, lines, commands, characters = [], [], 0, 0
    for number, page in enumerate(reader.pages, start=1):
        contents = page.get_contents()
        commands += len(contents.get_data()) if contents is not None else 0
        text = page.extract_text().strip() if commands <= limit else ""
        characters += len(text)
        if max(commands, characters) > limit:
            raise DataError(f"PDF: too large, it unpacks to more than {limit} characters by page {number}")
        if text:
            texts.append(text + "\n")
            lines.append([number] * len(texts[-1].split("\n")))
    if not texts:
        raise DataError("PDF: holds no text, perhaps pictures of pages")
    return Extract("\n".join(texts), tuple(n for page in lines for n in page)[:-1])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
