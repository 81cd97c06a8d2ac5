r"""Memory Interleave as text: a model asks for documents by number, round by round, then answers. No model in here.

    <|im_start|>user\n                                                                    template
    \nPlease answer ... \n\n{question}\nPlease return all documents ... the question      question
    \n <|im_end|>\n <|im_start|>                                                          question, template, response
    [4][17]<|object_ref_end|>                          the model asks                     response
    [4]. text of 4\n[17]. text of 17\n                 what it is given                   question while newest
    <|object_ref_end|>[9]<|object_ref_end|>...         the next round                     response
    <End-of-Retrieve><|im_start|>The user's question is: {question}\n<|object_ref_end|>   response
    The answer to the question is: ...<|im_end|>       the model answers                  response

The text is a row of pieces, each with its role on the right; roles and marks go by pieces, never by a search in the
text, so that brackets and marks inside a question or a document are only text. Numbers are looked for in what the model
wrote, and nowhere else. Each round reads the whole text anew, and what routes then is the question together with the
newest documents: the second hop is found through the text of the first.
Source: MSA, arXiv 2603.23516 (Memory Interleave).
Differs from the released code: `rounds` bounds the loop and `window` the text; a retrieval that ends without the model
saying so is closed with its mark, and the question is put again; a number is cut off after 18 digits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

from memjax.errors import ConfigError

QUESTION, RESPONSE, TEMPLATE = 0, -1, -2  # only tokens of role QUESTION route
_NUMBER = re.compile(r"\[(\d{1,18})\]", re.ASCII)

Reason = Literal["end_of_retrieval", "rounds", "window", "characters", "tokens", "end_of_text"]
"""Why retrieval stopped: the model said so; as many rounds as allowed; no room for more text; a round of too many
characters or tokens; the model ended its text."""


class Marks(NamedTuple):
    """The fixed strings, as MSA-4B was trained on them; the first four are single tokens where the tokenizer has them.

    head and tail: strings before and behind the question, of which those that equal a mark are marks. first: the number
    by which the model knows the first document.
    """

    begin: str = "<|im_start|>"
    end: str = "<|im_end|>"
    delimiter: str = "<|object_ref_end|>"
    finish: str = "<End-of-Retrieve>"
    head: tuple[str, ...] = ("<|im_start|>", "user\n")
    before: str = "\nPlease answer the question based on the above historical document information\n\n"
    after: str = "\nPlease return all documents related to the question"
    tail: tuple[str, ...] = ("<|im_end|>", "\n")
    again: str = "The user's question is: "
    answer: str = "The answer to the question is:"
    first: int = 1


MSA_4B = Marks()


class Limits(NamedTuple):
    """rounds: of retrieval. characters, tokens: that a round may have without a mark; it is the last one then.
    answer_tokens: of the answer, kept free for it in the window."""

    rounds: int = 8
    characters: int = 1000
    tokens: int = 2048
    answer_tokens: int = 256


LIMITS = Limits()


class Piece(NamedTuple):
    """A part of the text with one role. mark: a control token, which text never turns into."""

    text: str
    role: int
    mark: bool = False


class Call(NamedTuple):
    """What `decode` gets: continue `text` until one of the marks in `until`, or a limit.

    kept: so many pieces are in the cache that the call before left behind, what it decoded and the mark that ended it
    included; the others are appended there, and nothing routes. 0: the whole text is read anew, and routes.
    """

    text: tuple[Piece, ...]
    kept: int
    until: tuple[str, ...]
    tokens: int
    characters: int | None  # None: no limit


class Decoded(NamedTuple):
    """What was written, and the mark that ended it, which is no part of it; None: a limit did.

    length: of both in the cache, in units of `size`; None: as `size` measures them.
    """

    text: str
    ended: str | None
    length: int | None = None


Decode: TypeAlias = Callable[[Call], Decoded]
"""A model, or a script, that continues text."""


class Round(NamedTuple):
    """What the model wrote, the numbers in it (ascending, each once), those that no document has, and those it got.

    Numbers that are in neither of the last two found no room in the window.
    """

    text: str
    asked: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()
    read: tuple[int, ...] = ()


class Interleaved(NamedTuple):
    """documents: numbers of all that was read, in the order of the first reading. text: all pieces, the answer last."""

    answer: str
    rounds: tuple[Round, ...]
    stopped: Reason
    documents: tuple[int, ...]
    text: tuple[Piece, ...]


def in_rounds(
    question: str,
    decode: Decode,
    text_of: Callable[[int], str | None],
    *,
    marks: Marks = MSA_4B,
    limits: Limits = LIMITS,
    window: int | None = None,
    size: Callable[[Piece], int] = lambda piece: len(piece.text),
    interleave: bool = True,
    original_text: bool = True,
) -> Interleaved:
    """Answer one question in rounds of retrieval. A wrong number costs a round at most: it is listed as unknown.

    Args:
      decode: continues the text; see `Call`.
      text_of: the text of a document by the number that the model uses; None: there is none (any more).
      window: the longest text that the model can hold, in units of `size`; None: any. Documents of a round that have
        no room beside the answer are left out, retrieval stops, and the answer is given from what was read.
      size: of one piece.
      interleave: False: one round and one routing; its documents are appended behind what routed (an ablation of the
        paper).
      original_text: False: documents are named, not shown; the model answers from what routing reads (an ablation).

    Raises:
      ConfigError: the question is empty, or leaves no room in the window for a round and the answer.
      ValueError: marks that are empty or equal, limits below 1, a `decode` that ends with a mark nobody asked for.
    """
    _check(question, marks, limits)
    opening = (*_fixed(marks, marks.head, TEMPLATE), Piece(marks.before + question + marks.after, QUESTION))
    begin, delimiter, finish = (Piece(m, RESPONSE, True) for m in (marks.begin, marks.delimiter, marks.finish))
    closing = (begin, Piece(f"{marks.again}{question}\n", RESPONSE), delimiter)
    ending = sum(map(size, (delimiter, finish, *closing))) + limits.answer_tokens
    free = math.inf if window is None else window - ending

    def room(text: Iterable[Piece]) -> int | float:
        return free - sum(map(size, text))

    text = (*opening, Piece("\n", QUESTION), *_fixed(marks, marks.tail, TEMPLATE), begin)
    if room(text) < 1:
        raise ConfigError(
            f"question: is {sum(map(size, text))} tokens with its prompt, and at most {max(0, free - 1)} leave room "
            f"for a round and an answer of {limits.answer_tokens}; the model's window is {window}"
        )
    rounds: list[Round] = []
    stopped: Reason | None = None
    ended, kept = None, 0
    while stopped is None:
        before = room(text)
        tokens = int(min(limits.tokens, before))
        until = (marks.delimiter, marks.finish, marks.end)
        got, ended, length = _decode(decode, Call(text, 0, until, tokens, limits.characters), size)
        text = (*text, *got)
        kept, written = len(text), got[0].text
        if ended == marks.delimiter and len(written) <= limits.characters:
            asked = tuple(sorted({int(n) for n in _NUMBER.findall(written)}))
            found = {n: t for n in asked if (t := text_of(n)) is not None}
            answered = (*opening, *_responses(text[len(opening) :]))
            spare = room(answered) if interleave else before - length
            new: dict[int, Piece] = {}
            for n, t in found.items():
                piece = Piece(f"[{n}]. {t if original_text else ''}\n", QUESTION)
                if size(piece) <= spare:
                    new[n], spare = piece, spare - size(piece)
            rounds.append(Round(written, asked, tuple(n for n in asked if n not in found), tuple(new)))
            if len(new) < len(found):
                stopped = "window"
            elif len(rounds) == (limits.rounds if interleave else 1):
                stopped = "rounds"
            elif spare <= size(delimiter):
                stopped = "window"
            if not interleave:
                text = (*text, *_responses(new.values()), delimiter)
            elif new or not stopped:
                text, kept = (*answered, *new.values(), delimiter), 0  # else there is nothing new to read
        else:
            rounds.append(Round(written))
            stopped = _reason(written, ended, marks, limits, tokens)
    text = (*text, *(() if ended == marks.finish else (finish,)), *closing)
    got, _, _ = _decode(decode, Call(text, kept, (marks.end,), limits.answer_tokens, None), size)
    documents = tuple(dict.fromkeys(n for r in rounds for n in r.read))
    answer = got[0].text.rpartition(marks.answer)[2].strip()
    return Interleaved(answer, tuple(rounds), stopped, documents, (*text, *got))


def _decode(decode: Decode, call: Call, size: Callable[[Piece], int]) -> tuple[tuple[Piece, ...], str | None, int]:
    """What was written, with the mark that ended it as a piece of its own; the mark; how long both are."""
    got = decode(call)
    if got.ended is not None and got.ended not in call.until:
        raise ValueError(f"decode: ended with {got.ended!r}, needs one of {call.until} or None")
    mark = () if got.ended is None else (Piece(got.ended, RESPONSE, True),)
    pieces = (Piece(got.text, RESPONSE), *mark)
    return pieces, got.ended, sum(map(size, pieces)) if got.length is None else got.length


def _reason(written: str, ended: str | None, marks: Marks, limits: Limits, tokens: int) -> Reason:
    if ended == marks.finish:
        return "end_of_retrieval"
    if len(written) > limits.characters:
        return "characters"
    if ended == marks.end:
        return "end_of_text"
    return "window" if tokens < limits.tokens else "tokens"


def _fixed(marks: Marks, texts: Iterable[str], role: int) -> tuple[Piece, ...]:
    return tuple(Piece(t, role, t in marks[:4]) for t in texts)


def _responses(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """As the pieces behind the question are read again: nothing of them routes."""
    return tuple(p._replace(role=RESPONSE) for p in pieces)


def _check(question: str, marks: Marks, limits: Limits) -> None:
    if not question:
        raise ConfigError("question: is empty")
    if len(set(marks[:4])) < 4 or "" in marks[:4]:
        raise ValueError(f"marks: begin, end, delimiter and finish are {marks[:4]}, need to be distinct and not empty")
    for name, value in limits._asdict().items():
        if value < 1:
            raise ValueError(f"limits: {name} is {value}, needs at least 1")
