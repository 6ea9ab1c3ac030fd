"""Serves layers to Neuroglancer: on this machine only, read-only, to whoever knows the token in the URL."""

from __future__ import annotations

import errno
import hmac
import json
import logging
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

from volumen.inference.output.file_formats.neuroglancer_state import layer as layer_entry
from volumen.inference.output.file_formats.neuroglancer_state import viewer_state
from volumen.utils.errors import VolumenError
from volumen.viewing.chunks import ServedLayer
from volumen.viewing.layers import View

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
CLIENT = "https://neuroglancer-demo.appspot.com/"
"""The viewer, a page of the neuroglancer project that runs in the browser; data go from here to the browser only."""


class ViewServer(ThreadingHTTPServer):
    """A server for the layers of a view.

    Args:
        view: what is shown.
        port: the port; 0 for a free one.

    Attributes:
        url: address of the viewer with all layers.

    Raises:
        VolumenError: the port is taken or not allowed.
    """

    daemon_threads = True

    def __init__(self, view: View, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(16)
        self.layers = [ServedLayer(layer, view) for layer in view.layers]
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            problem = {
                errno.EADDRINUSE: "is taken by another program",
                errno.EACCES: "may not be used",
            }.get(error.errno or 0, f"cannot be used ({error.strerror})")
            raise VolumenError(
                f"--port {port}", problem, remedy="choose another one, or 0 for a free one"
            ) from None
        except OverflowError:
            raise VolumenError("--port", expected="a number from 0 to 65535", found=port) from None
        self.root = f"http://{HOST}:{self.server_port}/{self.token}"
        self.state = _state(view, self.root)
        self.page = _local_page(self.state)
        fragment = quote(json.dumps(self.state, separators=(",", ":")))
        self.url = self.page.url if self.page else f"{CLIENT}#!{fragment}"

    @property
    def start_page(self) -> str:
        """A short address that leads to the viewer."""
        return f"{self.root}/"

    def server_close(self) -> None:
        """Close the server, and that of the page."""
        super().server_close()
        if getattr(self, "page", None) is not None:
            cast(_LocalPage, self.page).close()
            self.page = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that a browser closed."""
        logger.debug("a connection was closed", exc_info=True)


class _LocalPage:
    """The page of the package `neuroglancer`, served by that package on this machine too, with a token of its own.

    Args:
        state: the state that it shows.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        import neuroglancer

        neuroglancer.set_server_bind_address(HOST)
        self._library = neuroglancer
        self._viewer = neuroglancer.Viewer(token=secrets.token_urlsafe(16))
        self._viewer.set_state(state)
        self.url = str(self._viewer.get_viewer_url())

    def close(self) -> None:
        self._library.stop()


def _local_page(state: dict[str, Any]) -> _LocalPage | None:
    """Return the page of the package `neuroglancer`; None if it is not installed."""
    try:
        return _LocalPage(state)
    except ImportError:
        return None


def _state(view: View, root: str) -> dict[str, Any]:
    entries = []
    for number, item in enumerate(view.layers):
        kind = "labels" if item.is_labels else item.content.kind
        content = type(item.content)(kind, item.content.channels, item.content.largest)
        entry = layer_entry(item.name, f"precomputed://{root}/layers/{number}", content)
        entries.append(entry if item.visible else {**entry, "visible": False})
    middle = view.position or tuple(n // 2 for n in view.layers[0].levels[0].shape)
    return viewer_state(entries, view.spacing, view.unit, [at + 0.5 for at in middle])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "volumen", ""

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def do_OPTIONS(self) -> None:
        """Answer a browser that asks whether a page may read from this server."""
        if self._allowed():
            self._answer(HTTPStatus.NO_CONTENT, b"", "text/plain")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with a part of a layer, or the state."""
        if not self._allowed():
            return
        parts = urlsplit(self.path).path.split("/")[2:]
        try:
            found = self._find([unquote(part) for part in parts])
        except VolumenError as error:
            logger.warning("%s", error)
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode(), "text/plain")
            return
        if found is None:
            self._answer(HTTPStatus.NOT_FOUND, b"", "text/plain")
        elif isinstance(found, str):
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", found)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._answer(HTTPStatus.OK, *found)

    def _allowed(self) -> bool:
        """Refuse requests without the token, and those that a page of another site sends through its own name."""
        server = cast(ViewServer, self.server)
        names = {f"{name}:{server.server_port}" for name in (HOST, "localhost")}
        token = urlsplit(self.path).path.split("/")[1:2]
        known = bool(token) and hmac.compare_digest(token[0].encode(), server.token.encode())
        if known and self.headers.get("Host") in names:
            return True
        self._answer(HTTPStatus.FORBIDDEN, b"", "text/plain")
        return False

    def _find(self, parts: list[str]) -> tuple[bytes, str] | str | None:
        """Return content and type of a path, a URL to go to, or None."""
        server = cast(ViewServer, self.server)
        match parts:
            case [] | [""]:
                return server.url
            case ["state.json"]:
                return json.dumps(server.state, indent=1).encode(), "application/json"
            case ["layers", number, *rest] if number.isdecimal() and int(number) < len(server.layers):
                layer = server.layers[int(number)]
                match rest:
                    case ["info"]:
                        return json.dumps(layer.info()).encode(), "application/json"
                    case [key, name]:
                        chunk = layer.chunk(key, name)
                        return None if chunk is None else (chunk, "application/octet-stream")
        return None

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status != HTTPStatus.FORBIDDEN:
            self.send_header("Access-Control-Allow-Origin", "*")
            self.send_header("Access-Control-Allow-Methods", "GET, HEAD")
            self.send_header("Access-Control-Allow-Headers", "*")
            self.send_header("Access-Control-Allow-Private-Network", "true")
        self.end_headers()
        if self.command not in ("HEAD", "OPTIONS"):
            self.wfile.write(content)
