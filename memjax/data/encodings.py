"""Bytes to text, only where the encoding is certain: a wrong guess is worse than a file that is left out."""

import codecs
import re
import unicodedata

from memjax.errors import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# Python's and Emacs' cookie, Vim's fileencoding, HTML's meta, XML's declaration, gettext's header.
_DECLARED = re.compile(rb"(?:coding|charset)[ \t]*[:=][ \t]*[\"']?([A-Za-z][\w.-]*)")
_HEAD = 1024  # bytes in which a declaration is looked for, as browsers do

# What a label means in practice (https://encoding.spec.whatwg.org): the larger of two encodings.
_LARGER = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030"}
_LARGER |= {"shift_jis": "cp932", "euc_kr": "cp949"}

# What is guessed: encodings that many files were written in. Those of DOS and of old Macs give way, because their
# text is often plausible in each other. Below chardet's own threshold, or with another text nearly as likely, nothing
# is certain. Tried on 7,200 texts of gettext catalogs, a line to a page long, in 22 languages and 35 pairs of language
# and encoding, after the two numbers were chosen on others: 6 were wrong, two thirds were read, and most of the rest
# were single lines, DOS or Macintosh. The best guess alone was wrong for 2 % (charset-normalizer 3.5: 25 %).
_GUESSED = "cp874 cp932 cp949 cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 cp866 koi8-r koi8-u"
_GUESSED += " iso8859-1 iso8859-2 iso8859-5 iso8859-6 iso8859-7 iso8859-8 iso8859-13 iso8859-15"
_GUESSED += " gb2312 gbk gb18030 big5 big5hkscs euc_jp euc_jis_2004 shift_jis euc_kr iso2022_jp iso2022_jp_2 iso2022_kr"
_CONFIDENCE, _NEARLY = 0.2, 0.97


def decode(data: bytes) -> str:
    """The text of a file: by its byte order mark, as UTF-8, as it declares itself, or as `chardet` is sure of.

    Line ends stay as they are, a byte order mark is dropped.

    Raises:
      DataError: why it can't be told, or that it is no text; the kind, a colon, the reason.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            text = _decoded(data[len(mark) :], encoding)
            if text is None or "\0" in text or (encoding != "utf-8" and not _is_plausible(text)):
                raise DataError(f"binary: begins with the byte order mark of {encoding.upper()}, but is none")
            return text
    if b"\0" in data:
        raise DataError(f"binary: a NUL byte at offset {data.index(0)}")
    shifts = b"\x1b$" in data and data.isascii()  # as in ISO-2022, which has no other bytes
    try:
        if not shifts:
            return data.decode("utf-8")
        problem = "escape sequences of ISO-2022"
    except UnicodeDecodeError as error:
        problem = f"byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
    text = _as_declared(data) or _as_guessed(data)
    if text is None and shifts:
        text = _decoded(data, "utf-8")
    if text is None:
        raise DataError(f"encoding unknown: {problem}, none is declared and none is certain")
    return text


def _as_declared(data: bytes) -> str | None:
    found = _DECLARED.search(data, 0, _HEAD)
    if found is None:
        return None
    try:
        encoding = codecs.lookup(found[1].decode()).name
        # A declaration that can be read is not one of UTF-16 or EBCDIC.
        if "coding=a1".encode(encoding) != b"coding=a1" or encoding.endswith("unicode-escape"):
            return None
    except (LookupError, UnicodeError):  # unknown, or no encoding of text, such as base64
        return None
    text = _decoded(data, _LARGER.get(encoding, encoding))
    return text if text is not None and _is_plausible(text) else None


def _as_guessed(data: bytes) -> str | None:
    import chardet

    known = {codecs.lookup(name).name for name in _GUESSED.split()}
    best: tuple[str, float] | None = None
    for found in chardet.detect_all(data, ignore_threshold=True, max_bytes=len(data), compat_names=False):
        encoding, confidence = found["encoding"], found["confidence"]
        if encoding is None or confidence < _CONFIDENCE * _NEARLY or (best and confidence < best[1] * _NEARLY):
            break
        text = _decoded(data, encoding)
        if text is None or not _is_plausible(text):
            continue
        if best is None:
            if confidence < _CONFIDENCE or codecs.lookup(encoding).name not in known:
                return None
            best = text, confidence
        elif text != best[0] and codecs.lookup(encoding).name in known:
            return None
    return best[0] if best else None


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except (UnicodeError, LookupError):
        return None


def _is_plausible(text: str) -> bool:
    """No control characters but those of terminals, and none that is unassigned, private or half a pair."""
    return not any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in set(text) - set("\t\n\v\f\r\b\x1b"))
