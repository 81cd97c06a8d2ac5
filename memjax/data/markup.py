"""The readable text of web pages and notebooks, and for each of its lines the line of the file that it comes from."""

import bisect
import html
import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]  # the parts of json's own decoder, which are not in
from json.scanner import py_make_scanner  # type: ignore[attr-defined]  # its type stubs
from typing import Any, NamedTuple


class Extract(NamedTuple):
    """Text, and the number in the file (of a line, of a PDF's page) for each of its lines."""

    text: str
    lines: tuple[int, ...]


# Of the parsers that were tried, html.parser (3.11) raises AssertionError at "<![" and takes 14 s for 40 KB of "<a ",
# selectolax 1.0 takes 3 minutes for 1 MB of "<div>", and lxml 6.1 drops what is nested deeper than 256 and counts lines
# up to 65535. The text alone needs no tree, and these expressions look at no character twice (possessive quantifiers).
_TAG = r"<(/?)([a-zA-Z][^\s/>]*+)(?>[^>=]++|=\s*+(?:\"[^\"]*+\"?|'[^']*+'?)?+)*+>?"
_OTHER = r"<!--(?:-?>|(?>[^-]++|-(?!-!?>))*+(?:--!?>)?+)|<[!?/][^>]*+>?"
_TOKEN = re.compile(f"{_TAG}|{_OTHER}")
_SPACE = re.compile(r"[ \t\r\f]+")

_HIDDEN = frozenset("iframe noembed noframes noscript script style svg template textarea".split())
_BLOCKS = frozenset(
    "address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset figcaption figure"
    " footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li main menu nav ol optgroup option p pre search"
    " section summary table tbody tfoot thead title tr ul".split()
)


def html_text(source: str) -> Extract:
    """What a browser shows of a page, the title first; each block, and each line of the source, is a line of its own.

    Scripts, styles and comments are dropped, entities are decoded, spaces are collapsed but in <pre>; the cells of a
    table are parted by tabs. Any text is accepted, in a time linear in its length.
    """
    page, end, preformatted, titled = _Lines(), 0, 0, False
    while token := _TOKEN.search(source, end):
        page.add(source, end, token.start(), preformatted > 0)
        closes, name, end = bool(token[1]), (token[2] or "").lower(), token.end()
        opens = not closes and not token[0].endswith("/>")
        if name in _BLOCKS:
            page.end_line(preformatted > 0)
        elif name in ("td", "th") and not closes:
            page.add_cell()
        if name == "pre":
            preformatted = max(0, preformatted + (-1 if closes else 1))
        elif opens and (name in _HIDDEN or name == "title"):
            begin, end = end, _closing(source, name, end)
            if name == "title" and not titled:
                titled = True
                page.add(source, begin, end, False)
    page.add(source, end, len(source), preformatted > 0)
    page.end_line(preformatted > 0)
    return _extract(source, page.done)


def is_html(name: str, text: str) -> bool:
    """By the ending of its name, if there is a tag; without an ending, by how it begins."""
    if name.lower().endswith((".html", ".htm", ".xhtml")):
        return _TOKEN.search(text) is not None
    begins = "" if "." in name else text[:1024].lstrip().lower()
    return begins.startswith(("<!doctype html", "<html"))


def notebook_text(source: str) -> Extract | None:
    """The sources of a Jupyter notebook's cells, a blank line between two; None if it is none (nbformat 4)."""
    decoder = json.JSONDecoder()
    decoder.parse_string = _located_string  # type: ignore[attr-defined]
    decoder.scan_once = py_make_scanner(decoder)  # type: ignore[attr-defined]
    try:
        cells = decoder.decode(source)["cells"]
        sources = [cell["source"] for cell in cells]
        parts: list[list[Any]] = [[part] if isinstance(part, str) else list(part) for part in sources]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(part, _Located) for cell in parts for part in cell):
        return None
    lines: list[tuple[int, str]] = []
    for cell in parts:
        if not cell:
            continue
        if lines:
            lines.append((cell[0].at, ""))
        lines.append((cell[0].at, ""))
        for part in cell:
            first, *rest = part.split("\n")
            begun, text = lines[-1]
            lines[-1] = (begun if text else part.at, text + first)
            lines += [(part.at, line) for line in rest]
    return _extract(source, lines)


class _Lines:
    """Lines of text with the offset in the source at which each begins."""

    def __init__(self):
        self.done: list[tuple[int, str]] = []
        self._parts: list[str] = []
        self._begin: int | None = None

    def add(self, source: str, start: int, stop: int, preformatted: bool) -> None:
        for i, line in enumerate(source[start:stop].split("\n")):
            if i:
                self.end_line(preformatted)
            if line and self._begin is None and (preformatted or not line.isspace()):
                self._begin = start
            self._parts.append(line if preformatted else _SPACE.sub(" ", line))
            start += len(line) + 1

    def add_cell(self) -> None:
        if self._begin is not None:
            self._parts.append("\t")

    def end_line(self, preformatted: bool) -> None:
        if self._begin is None:  # nothing but spaces
            self._parts = []
            return
        text = html.unescape("".join(self._parts))
        if preformatted:
            text = " ".join(text.rstrip().splitlines())
        else:
            text = "\t".join(" ".join(cell.split()) for cell in text.split("\t")).strip()
        if text:
            self.done.append((self._begin, text))
        self._parts, self._begin = [], None


class _Located(str):
    """A string of a JSON text, and where it stands."""

    at: int


def _located_string(source: str, begin: int, strict: bool) -> tuple[_Located, int]:
    text, end = scanstring(source, begin, strict)
    located = _Located(text)
    located.at = begin
    return located, end


def _closing(source: str, name: str, start: int) -> int:
    """Where the end tag of an element begins whose content is not markup; the end of the text if there is none."""
    found = re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE).search(source, start)
    return found.start() if found else len(source)


def _extract(source: str, lines: list[tuple[int, Any]]) -> Extract:
    ends = [found.start() for found in re.finditer("\n", source)]
    numbers = tuple(bisect.bisect_left(ends, offset) + 1 for offset, _ in lines)
    return Extract("".join(f"{text}\n" for _, text in lines), numbers)
