"""`memjax bank serve`: a bank on a local page; and what it has in common with `bank ask`."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, count, printable
from memjax.errors import ConfigError

GRACE = 2  # seconds that answers have to end after Ctrl-C


@dataclass(frozen=True, kw_only=True)
class Asking(Command):
    """What every command has that asks a bank."""

    bank: Positional[Path]
    model: Path | None = None
    """Folder of the model that built the bank; by default the copy inside the bank."""
    passages: int | None = None
    """Documents that are read before answering; by default as in training."""
    words: bool = False
    """Choose the passages by the model and by their words (BM25) together; needs the extra `demo`."""
    location: Literal["disk", "host", "device"] = "disk"
    """Where the bank lies while it is searched."""

    def open(self) -> tuple[Any, Any]:
        """The model and the open bank."""
        from memjax.lm.asking import open_with_model

        if self.passages is not None and self.passages < 1:
            raise ConfigError(f"--passages is {self.passages}, needs at least 1")
        return open_with_model(self.bank, self.model, self.location)


@dataclass(frozen=True, kw_only=True)
class Serve(Asking):
    """Ask a bank in the browser: the answer as it comes, its passages, and what each router layer chose.

    There is a JSON endpoint too, POST /api/ask. A bank that is changed meanwhile is opened anew (needs `.[serve]`).
    """

    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it can read the bank; by default nobody but this machine."""
    name: tuple[str, ...] = ()
    """Other names that the server is reached by, such as that of a proxy; requests to any other name are refused."""
    port: int = 8000
    """Port to listen on; 0 takes any that is free."""

    def run(self) -> None:
        try:
            import uvicorn

            from memjax.serve import ServedBank, is_loopback, known_hosts, make_app
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
                raise
            raise ConfigError("bank serve: needs starlette and uvicorn: pip install 'memjax[serve]'") from None

        with _listen(self.host, self.port) as listening:  # before the model is compiled for a port that is taken
            out, began = self.start(), time.perf_counter()
            out.print("loading and compiling ...", style="dim")
            bank = ServedBank(self.bank, self.open, self.passages, self.words)
            bank.warm_up()
            about, (address, port) = bank.about(), listening.getsockname()[:2]
            hosts = known_hosts(address, self.host, *self.name)
            holds = f"{count(about['documents'], 'document')}, {about['tokens']:,} tokens"
            out.print(f"{printable(about['bank'])}: {holds}; ready after {time.perf_counter() - began:.1f} s")
            if not is_loopback(address):
                out.print(f"whoever reaches {address} can ask this bank and read what it holds", style="yellow")
            host = f"[{self.host}]" if ":" in self.host else self.host
            out.print(Text.assemble((f"http://{host}:{port}", "bold green"), ("   Ctrl-C ends it", "dim")))
            config = uvicorn.Config(
                make_app(bank, hosts),
                http="h11",  # what the tests speak to, whatever else is installed
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE,
            )
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended, and hands on what ended it
                uvicorn.Server(config).run(sockets=[listening])
            out.print("stopped", style="dim")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. ConfigError that names the option: a host that is none, a port that can't be had."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port is {port}, needs 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host!r}: {getattr(error, 'strerror', None) or error}") from None
    except OSError as error:
        taken = "another program listens there; --port 0 takes any that is free"
        said = taken if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(f"--port {port}: {host}:{port}: {said}") from None
