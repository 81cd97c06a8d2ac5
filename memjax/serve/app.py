"""The page and the JSON endpoint of a bank, as a Starlette application."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import resources
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from memjax.errors import ConfigError, MemjaxError
from memjax.serve.bank import ServedBank
from memjax.serve.guard import Guard

Events = Iterator[dict[str, Any]]


def make_app(bank: ServedBank, hosts: frozenset[str]) -> Starlette:
    """The application. hosts: the names under which it may be asked, without port."""
    turn = anyio.Lock()  # one question at a time, on one thread: more would only wait for the same device
    page = resources.files("memjax.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = {"Content-Security-Policy": _policy(page)}

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=policy)

    async def about(request: Request) -> Response:
        async with turn:
            return _json(await _of_bank(bank.about))

    async def ask(request: Request) -> Any:
        question, streamed = _question(request.headers.get("content-type", ""), await request.body())
        return _Answer(bank, turn, question, streamed)

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/api/bank", about),
            Route("/api/ask", ask, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )
    app.router.redirect_slashes = False
    return app


# ---------------------------------------------------------------------------------------------- one question


class _Refused(HTTPException):
    def __init__(self, status: int, field: str, said: str):
        super().__init__(status, said)
        self.field = field


def _question(content_type: str, body: bytes) -> tuple[str, bool]:
    """The question of a body, and whether its answer is to be streamed."""
    if content_type.partition(";")[0].strip().lower() != "application/json":  # a form can't send this unasked
        raise _Refused(415, "Content-Type", f"Content-Type: is {content_type!r}, needs application/json")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, "body", f"body: is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _Refused(422, "body", f"body: is a {type(found).__name__}, needs an object")
    if unknown := found.keys() - {"question", "stream"}:
        raise _Refused(422, min(unknown), f"{min(unknown)}: is unknown; there are question, stream")
    question, streamed = found.get("question"), found.get("stream", False)
    if not isinstance(question, str):
        raise _Refused(422, "question", f"question: is {json.dumps(question)[:40]}, needs a text")
    if not question.strip():
        raise _Refused(422, "question", "question: is empty")
    if re.search("[\ud800-\udfff]", question):
        raise _Refused(422, "question", "question: holds half of a surrogate pair, needs Unicode")
    if not isinstance(streamed, bool):
        raise _Refused(422, "stream", f"stream: is {json.dumps(streamed)[:40]}, needs true or false")
    return question, streamed


class _Answer:
    """A response that waits for its turn, and sends what is found as it is found."""

    def __init__(self, bank: ServedBank, turn: anyio.Lock, question: str, streamed: bool):
        self.bank, self.turn, self.question, self.streamed = bank, turn, question, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.turn:
            if await Request(scope, receive).is_disconnected():
                return
            events = self.bank.ask(self.question)
            first = await _of_bank(next, events)
            if self.streamed:
                response = StreamingResponse(_lines(first, events), media_type="application/x-ndjson")
            else:
                response = _json(await _in_thread(_whole, first, events))
            await response(scope, receive, send)


async def _of_bank(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives that has to read the bank; what it raises as an answer to the client."""
    try:
        return await _in_thread(call, *arguments)
    except ConfigError as error:
        raise _Refused(422, "question", str(error)) from None
    except (MemjaxError, OSError) as error:
        raise HTTPException(503, str(error)) from None


async def _lines(first: dict[str, Any], events: Events) -> AsyncIterator[str]:
    event: dict[str, Any] | None = first
    while event is not None:
        yield json.dumps(event) + "\n"
        try:
            event = await _in_thread(next, events, None)
        except Exception as error:  # the status is sent: only the text can say it
            event = None
            yield json.dumps({"type": "error", "error": _said(error)}) + "\n"
            if not isinstance(error, MemjaxError):
                raise


def _whole(first: dict[str, Any], events: Events) -> dict[str, Any]:
    *texts, end = events
    found = {**first, "answer": "".join(t["text"] for t in texts), **end}
    return {name: value for name, value in found.items() if name != "type"}


# ---------------------------------------------------------------------------------------------- small parts


_in_thread = anyio.to_thread.run_sync  # jax computes there, so that the event loop goes on


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """In ASCII, so that no text of a document reaches a terminal as a control sequence."""
    return Response(json.dumps(content) + "\n", status, media_type="application/json")


def _http_error(request: Request, error: Any) -> Response:
    field = {"field": error.field} if isinstance(error, _Refused) else {}
    response = _json({"error": error.detail, **field}, error.status_code)
    response.headers.update(error.headers or {})
    return response


def _internal_error(request: Request, error: Exception) -> Response:
    return _json({"error": _said(error)}, 500)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, MemjaxError) else "internal error; the terminal of the server says more"


def _policy(page: str) -> str:
    """What the page may do: run its own script and style, and ask this server; nothing that a document brings in."""

    def own(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
