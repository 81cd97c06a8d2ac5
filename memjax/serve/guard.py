"""What stands before every request: who may ask, and how much they may send.

A page of another site can make the reader's browser send requests here, by a form or, where its name is made to
resolve to 127.0.0.1, as if it were of this site. Hence the checks of Host and Origin. Nothing allows other origins
(CORS), so that no other page reads an answer either.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIMIT = 64 << 10  # bytes of a body
SECONDS = 20  # to send it in
ANY_ADDRESS = "any IP address"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def known_hosts(address: str, *names: str) -> frozenset[str]:
    """The hosts that a browser may name when the server listens on an address.

    Where others can reach it, any address will do, since only a name can be made to resolve to another machine.
    """
    others = () if is_loopback(address) else (ANY_ADDRESS, socket.gethostname().lower())
    return frozenset({"localhost", "127.0.0.1", "::1", address, *map(str.lower, names), *others})


def is_loopback(address: str) -> bool:
    """Whether nobody but this machine can reach an address."""
    return ipaddress.ip_address(address).is_loopback


class Guard:
    """An ASGI middleware that refuses unknown hosts, other sites' pages, and large or slow bodies.

    hosts: those that a request may name, without port.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end
            return await self.app(scope, receive, send)

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        body, refused = await _body(Headers(scope=scope), receive)
        refused = refused or _refused(scope, self.hosts)
        if refused is not None:
            # The rest of a body that was not read would be taken for the next request.
            response = JSONResponse({"error": refused[1]}, refused[0], {"Connection": "close"})
            return await response(scope, receive, send_more)
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, receive_body, send_more)


async def _body(headers: Headers, receive: Receive) -> tuple[bytes, tuple[int, str] | None]:
    """The body; or why it is refused.

    What is too large is read to its end and thrown away: a client that is still sending would not see the answer. One
    that waits for a word before it sends gets its answer at once.
    """
    body, size, more = bytearray(), 0, True
    large = 413, f"body: is larger than {LIMIT:,} bytes"
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > LIMIT and "expect" in headers:
        return b"", large
    with anyio.move_on_after(SECONDS):
        while more:
            message = await receive()
            part = message.get("body", b"")
            more, size = message.get("more_body", False), size + len(part)
            if size <= LIMIT:
                body += part
            else:
                body.clear()
    if size > LIMIT:
        return b"", large
    return bytes(body), (408, f"body: did not arrive within {SECONDS} seconds") if more else None


def _refused(scope: Scope, hosts: frozenset[str]) -> tuple[int, str] | None:
    headers = Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")
    name = _parts(f"//{host}")[1]
    if name not in hosts and not (ANY_ADDRESS in hosts and _is_address(name)):
        return 421, f"Host: is {host!r}, needs one of {', '.join(sorted(hosts))}"
    if scope["method"] in ("GET", "HEAD"):  # a page may link here, and can't read what comes
        return None
    other = origin is not None and _parts(origin)[0] != host
    if other or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return 403, f"Origin: is {origin!r}, needs this site"
    return None


def _is_address(name: str | None) -> bool:
    try:
        return bool(name and ipaddress.ip_address(name))
    except ValueError:
        return False


def _parts(url: str) -> tuple[str, str | None]:
    """Host with port, and without."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname
    except ValueError:
        return "", None
