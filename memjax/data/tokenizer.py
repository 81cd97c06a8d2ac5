"""Tokenizers: text to token ids and back, without a network.

Two kinds under one protocol: `ByteTokenizer` (no dependency, no training) and `BPETokenizer` (a `tokenizers.Tokenizer`,
trained here in seconds with `train_bpe`, or read from a Hugging Face tokenizer.json with `load_tokenizer`).

Text is only ever text: "<eos>" inside a document becomes the tokens of these five characters, never the end-of-sequence
token, so a corpus can't smuggle in control tokens. Special tokens are placed by id, `tokenizer.special["<eos>"]`,
and decode to nothing.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from memjax.errors import TokenizerError, shorten

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<question>", "<document>", "<answer>", "<end>")
"""The special tokens of a tokenizer made here, in the order of their ids: padding is 0; then the borders of a sequence,
the marks in front of a question, a document and an answer, and the end of an answer."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer. Ids are int32 in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def special(self) -> dict[str, int]:
        """Special tokens: name -> id."""
        ...

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical json: equal for tokenizers that do the same, whatever file they come from."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " t"]:
        """Ids of a text; adds no special token and recognises none."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Any) -> str:
        """Text of a 1-D sequence of ids. Special tokens give nothing; bytes that are not UTF-8 give U+FFFD."""
        ...

    def to_json(self) -> str:
        """The tokenizer as JSON text, read back by `load_tokenizer` and by the class's `from_json`."""
        ...

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_json` to a file, whole or not at all."""
        ...


class _Saved:
    """hash and save, which follow from to_json."""

    def to_json(self) -> str:
        raise NotImplementedError

    @functools.cached_property
    def hash(self) -> str:
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(self.to_json(), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise TokenizerError(f"{path}: the tokenizer can't be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class ByteTokenizer(_Saved):
    """One token per UTF-8 byte: id = byte + the number of special tokens, which come first.

    Args:
      special_tokens: distinct names; their place is their id.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hé").tolist(), tokenizer.decode([111, tokenizer.special["<eos>"]])
    ([111, 202, 176], 'h')
    """

    special_tokens: tuple[str, ...] = SPECIAL_TOKENS

    def __post_init__(self):
        _check_special(self.special_tokens)

    @property
    def vocab_size(self) -> int:
        return 256 + len(self.special_tokens)

    @property
    def special(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.special_tokens)}

    def encode(self, text: str) -> Int32[np.ndarray, " t"]:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32) + np.int32(len(self.special_tokens))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        ids = _checked_ids(ids, self.vocab_size) - len(self.special_tokens)
        return ids[ids >= 0].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"class": "ByteTokenizer", "version": 1, "special_tokens": self.special_tokens})

    @classmethod
    def from_json(cls, text: str) -> "ByteTokenizer":
        """Raises TokenizerError where the text is not what `to_json` gave."""
        config = _parse(text)
        kind = config.get("class"), config.get("version")
        if kind != ("ByteTokenizer", 1):
            raise TokenizerError(f"class and version must be 'ByteTokenizer' and 1, got {kind[0]!r} and {kind[1]!r}")
        names = config.get("special_tokens")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TokenizerError(f"special_tokens must be a list of strings, got {names!r}")
        return cls(tuple(names))


class BPETokenizer(_Saved):
    """A `tokenizers.Tokenizer` under the protocol: usually byte-level BPE, but any model of a tokenizer.json works.

    The given tokenizer is taken over: its padding and truncation are switched off, since they would change ids unasked.
    The round trip decode(encode(text)) == text is exact for byte-level tokenizers without a normalizer, as `train_bpe`
    makes them; a loaded one may normalise (Qwen: NFC).

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
    """

    def __init__(self, tokenizer: Any):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size}, special={len(self.special)}, hash={self.hash[:12]})"

    def __reduce__(self):
        # tokenizers pickles through its JSON, which leaves encode_special_tokens out: rebuild through ours instead.
        return BPETokenizer.from_json, (self.to_json(),)

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @functools.cached_property
    def special(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    def encode(self, text: str) -> Int32[np.ndarray, " t"]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # An Encoding holds some 150 bytes per token, so a whole corpus at once would fill the memory.
        encoded = []
        for part in _parts(texts, characters=1 << 22):
            for encoding in self._tokenizer.encode_batch_fast(part, add_special_tokens=False):
                encoded.append(np.asarray(encoding.ids, np.int32))
        return encoded

    def decode(self, ids: Any) -> str:
        return self._tokenizer.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> "BPETokenizer":
        """Raises TokenizerError where the text is not a tokenizer.json."""
        _parse(text)
        try:
            return cls(_tokenizers().Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"not a tokenizer.json: {error}") from error


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = 2048,
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS,
    split_digits: bool = True,
) -> BPETokenizer:
    """Train a byte-level BPE. It encodes every text, every round trip is exact, and equal texts train equal tokenizers.

    Args:
      texts: the training texts; a few seconds for 12 MB on two cores.
      vocab_size: tokens in all, at least 256 + special tokens; a small corpus may yield fewer.
      special_tokens: distinct names that take the first ids, in this order.
      split_digits: every digit is a token of its own, so that numbers of equal length have equally many tokens.

    Raises:
      ValueError: on a vocabulary too small for the bytes, or repeated special tokens.
      TypeError: on one string instead of many.
    """
    _check_special(special_tokens)
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(
            f"vocab_size must be at least 256 bytes + {len(special_tokens)} special tokens, got {vocab_size}"
        )
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, got one string: put it in a list")
    library = _tokenizers()
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [library.pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_utf8(text).decode() for text in texts), trainer)
    return BPETokenizer(tokenizer)


def load_tokenizer(path: str | os.PathLike) -> ByteTokenizer | BPETokenizer:
    """Read a saved tokenizer: a tokenizer.json of Hugging Face layout, a folder that holds one, or a ByteTokenizer.

    Raises:
      TokenizerError: naming the file and the reason, where it is missing, truncated or something else.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        kind = ByteTokenizer if _parse(text).get("class") == "ByteTokenizer" else BPETokenizer
        return kind.from_json(text)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: the tokenizer can't be read: {shorten(error)}") from error


class DecodeStream:
    """Text of ids that arrive one by one, in pieces that never end inside a character.

    The pieces joined equal `tokenizer.decode` of all ids. A token decodes differently alone than among others (a part
    of a character, a leading space), so each piece is the difference of two decodings from the last clean border on.
    One exception: a tokenizer with byte fallback, as Llama 2's, decodes a whole run of byte tokens to U+FFFD if its end
    is not UTF-8, when its beginning has been given out.

        stream = DecodeStream(tokenizer)
        for i in ids: print(stream.push(i), end="")
        print(stream.finish())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the border before the last piece
        self._text = ""  # the part of their text that was already given out
        self._given = 0  # ids that belong to it

    def push(self, id: int | np.integer) -> str:
        """Add one id; returns the text that became complete, often "" in the middle of a character."""
        self._ids.append(int(id))
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._text):
            return ""
        piece = text[len(self._text) :]
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        self._text = self._tokenizer.decode(self._ids)
        return piece

    def finish(self) -> str:
        """The rest: "", or U+FFFD where the ids ended inside a character. The stream is empty after it."""
        piece = self._tokenizer.decode(self._ids)[len(self._text) :]
        self._ids, self._text, self._given = [], "", 0
        return piece


def _tokenizers():
    """The library, imported when it is first needed, and quiet in forked children.

    A child forked after parallel work has no worker threads: tokenizers prints a warning and goes on with one thread,
    unless the variable is set. Say the same to it without the warning. A user's own setting is left alone.
    """
    import tokenizers

    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))
    return tokenizers


def _check_special(names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names) or "" in names:
        raise ValueError(f"special_tokens must be distinct and not empty, got {names!r}")


def _checked_ids(ids: Any, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be a 1-D sequence of integers, got shape {ids.shape} of {ids.dtype}")
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise TokenizerError(f"ids must be in [0, {vocab_size}), the vocabulary of this tokenizer, got {wrong}")
    return ids


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be valid Unicode, got a lone surrogate at character {error.start}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"not JSON, or truncated: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"must be a JSON object, got {type(config).__name__}")
    return config


def _parts(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    """Runs of consecutive texts, each of about so many characters; also where a lone surrogate is noticed."""
    part, size = [], 0
    for text in texts:
        if not text.isascii():
            _utf8(text)
        part.append(text)
        size += len(text) + 1
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part
