"""The page of a run in progress, from a server on this machine."""

import html
import ipaddress
import socket
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jaxrobust.report import curves, gathered, page

_LARGEST_PORT = 65535


def serve(
    places: Sequence[Path], *, host: str = "127.0.0.1", port: int = 8017, every: float = 10
) -> None:
    """Serve the page for these places until Ctrl-C, rebuilt for each request."""
    if missing := [str(place) for place in places if not place.exists()]:
        raise ValueError(
            f"{missing[0]} does not exist; name a run that has begun, or a folder of runs"
        )
    with server(places, host=host, port=port, every=every) as serving:
        address = f"http://{host}:{serving.server_address[1]}/"
        if not _is_loopback(host):
            print(
                f"warning: --host={host} shows the page, without a password, to anyone who "
                "can reach this machine",
                file=sys.stderr,
            )
        print(f"{address} shows {', '.join(map(str, places))}; press Ctrl-C to stop", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print("ended")


def server(places: Sequence[Path], *, host: str, port: int, every: float) -> ThreadingHTTPServer:
    """Return a listening server; port 0 takes any free port."""
    if not 0 <= port <= _LARGEST_PORT:
        raise ValueError(f"--port={port} is not a valid port; give one from 1 to {_LARGEST_PORT}")
    followed = curves.Followed()
    handler = _handler(lambda: _page(places, every, followed), _is_loopback(host))
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); another program may be "
            "using the port: choose a different one with --port"
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def _page(places: Sequence[Path], every: float, followed: curves.Followed) -> str:
    """Return the current page, or one that shows the error, as the run may still write files."""
    try:
        return page.page(gathered.gather(places, metrics_of=followed.read), refresh=every)
    except (ValueError, OSError) as error:
        text = html.escape(str(error))
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>Nothing yet'
            f'</title><meta http-equiv="refresh" content="{every:g}"/></head><body><main><p>{text}'
            "</p></main></body></html>\n"
        )


def _handler(make: Callable[[], str], local: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers requests for / with the page."""

        def do_GET(self) -> None:
            """Send the page."""
            # Prevents DNS rebinding: other sites must not read the page through their own names.
            if local and not _is_local_name(self.headers.get("Host") or ""):
                return self.send_error(403, "Use the address that was printed")
            if self.path.partition("?")[0] != "/":
                return self.send_error(404, "There is one page, /")
            body = make().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing, because a page reloads again and again."""

    return Handler


def _is_local_name(host: str) -> bool:
    """Tell whether the Host header, perhaps with a port, is a loopback name or address."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name in ("localhost", "") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
