"""``python -m gateway``: the HTTP server, until SIGTERM, Ctrl-C or, with ``--parent-pipe``, the end of the parent."""

from __future__ import annotations

import errno
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from ethogram.errors import Conflict, InvalidInput
from gateway.settings import GatewaySettings, is_loopback
from services.runtime.lifetime import run_process

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """Prints its URL once it listens, and ends event streams before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, close_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._close_streams = close_streams

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info("ready", extra={"url": url})
        # For people, and for a parent that asked for any free port.
        sys.stdout.write(f"gateway ready at {url}\n")
        sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._close_streams()
        await super().shutdown(sockets)


def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    for chatty in ("uvicorn.error", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # The port first: if it is taken, another gateway may be using the same database.
    listener = _listen(settings.host, settings.port)
    # Imported here, so that a wrong setting or port is said before all that the application needs is loaded.
    from gateway.app import create_app

    app = create_app(settings)
    _allow_many_connections()
    if not settings.hosts and not is_loopback(settings.host):
        logger.warning(
            "answers to any name, so web pages can reach it by DNS rebinding; set ETHOGRAM_HOSTS to the names by which "
            "clients reach it"
        )
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config, app.state.services.tails.close_streams)
    # uvicorn raises the signal again after its shutdown; a clean exit must not count as a failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])


def main() -> None:
    """``python -m gateway``."""
    run_process("gateway", "gateway", GatewaySettings, serve)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"port {port} on {host} is taken; set ETHOGRAM_PORT to another, or to 0 for any free one"
            ) from None
        raise InvalidInput.field(
            "host", f"cannot listen on {host}:{port} ({error.strerror}); set ETHOGRAM_HOST, ETHOGRAM_PORT"
        ) from None
    return listener


def _allow_many_connections() -> None:
    """Raise the limit on open files: each stream is one, and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main()
