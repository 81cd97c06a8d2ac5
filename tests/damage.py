"""Damage to files, drawn by hypothesis: to the structure of JSON and of safetensors headers, and to single bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# As JSON texts, since some have no value in Python, and two fields of one name have none at all.
ODD = (
    *("null", "true", "false", "0", "1", "-1", "2", "1.5", "-0", "1e999", "-1e999", "NaN", "Infinity"),
    *(str(n) for k in (31, 32, 62, 63, 64, 100) for n in (2**k - 1, 2**k)),
    *("1" * 4000, "1" * 5000),
    *('""', '"x"', '"é\\u202e"', '"\\u0000"', '"\\ud800"', '"\\n"', '"' + "a" * 100_000 + '"'),
    *('"../x"', '"/etc/passwd"', '"C:\\\\x"', '"segment-00000000/../../home"', '"."', '".."'),
    *("[]", "{}", "[[]]", '{"a": 1}', "[1, 2]", "[" * 500 + "]" * 500, '{"a":' * 900 + "1" + "}" * 900),
    *("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
)


class Damage(bytes):
    """What a file is replaced with; printed only where it is short."""

    def __repr__(self) -> str:
        return f"{bytes(self)!r}" if len(self) < 4000 else f"{bytes(self[:2000])!r}... {len(self)} bytes"


class Pairs(list):
    """A JSON object that may have a field twice."""


class Raw(str):
    """A JSON text in the place of a value."""


def parsed(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def spelled(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {spelled(v)}" for name, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spelled, value)) + "]"
    return json.dumps(value)


def slots(value: Any) -> Iterator[tuple[list, int]]:
    """Every place in a value: the list it is in (of an object: the pair), and where."""
    for i, item in enumerate(value if isinstance(value, list) else ()):
        holder, at = (item, 1) if isinstance(value, Pairs) else (value, i)
        yield holder, at
        if not isinstance(holder[at], Raw):
            yield from slots(holder[at])


def containers(value: Any) -> Iterator[list]:
    if isinstance(value, list):
        yield value
    for holder, at in slots(value):
        if isinstance(holder[at], list):
            yield holder[at]


@st.composite
def damaged_json(draw: st.DrawFn, data: bytes) -> bytes:
    """The text after up to three changes of its values, and perhaps one of its bytes."""
    value = parsed(data)
    for _ in range(draw(st.integers(0, 3))):
        some = list(slots(value))
        if not some:
            break
        holder, at = some[draw(st.integers(0, len(some) - 1))]
        odd = Raw(draw(st.sampled_from(ODD)))
        inside = list(containers(value))
        group = inside[draw(st.integers(0, len(inside) - 1))]
        kind = draw(st.sampled_from(("replace", "replace", "swap", "drop", "add", "twice", "rename")))
        if kind == "replace" or not group:
            holder[at] = odd
        elif kind == "swap":
            other, there = some[draw(st.integers(0, len(some) - 1))]
            if not isinstance(holder[at], list) and not isinstance(other[there], list):
                holder[at], other[there] = other[there], holder[at]
        elif kind == "drop":
            del group[draw(st.integers(0, len(group) - 1))]
        elif kind == "add":
            group.append(["extra", odd] if isinstance(group, Pairs) else odd)
        elif kind == "twice":
            again = group[draw(st.integers(0, len(group) - 1))]
            group.insert(draw(st.integers(0, len(group))), [again[0], odd] if isinstance(group, Pairs) else again)
        elif isinstance(group, Pairs):
            group[draw(st.integers(0, len(group) - 1))][0] = draw(st.sampled_from(("", "x", "../x", "/x", "\0", "é")))
    text = spelled(value).encode()
    return draw(st.just(text) | damaged_bytes(text) | st.sampled_from(coded(text)))


def coded(text: bytes) -> list[bytes]:
    """The same text with a byte order mark, or in another encoding."""
    return [b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text.decode().encode("utf-32-le"), b" " + text]


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A bit flipped, a part lost, overwritten or added."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    kind = draw(st.sampled_from(("flip", "cut", "lose", "overwrite", "insert", "append", "empty")))
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "lose":
        return data[:at] + data[at + draw(st.integers(1, 16)) :]
    new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from((b"[" * 100_000, b"\0" * 64)))
    if kind == "overwrite":
        return data[:at] + new + data[at + len(new) :]
    return {"insert": data[:at] + new + data[at:], "append": data + new}.get(kind, b"")


@st.composite
def damaged_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file: the header as JSON, the number in front of it, or the bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    part = draw(st.sampled_from(("header", "header", "length", "body")))
    if part == "length":
        near = st.sampled_from((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        return draw(near | st.integers(0, 2**64 - 1)).to_bytes(8, "little") + header + body
    if part == "body":
        return data[: 8 + length] + draw(damaged_bytes(body))
    header = draw(damaged_json(header))
    return len(header).to_bytes(8, "little") + header + body
