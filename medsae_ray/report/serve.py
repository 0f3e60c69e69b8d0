"""A report in the browser: opened from disk, or served to this machine alone."""

from __future__ import annotations

import webbrowser
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A page of another site may not load the data, which are scripts, nor the radiographs.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    # The folder may be made anew while it is served.
    "Cache-Control": "no-cache",
}
TYPES = {
    "": "application/octet-stream",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".txt": "text/plain; charset=utf-8",
}
"""Of files, by ending; not the system's table: with nosniff, a script of the wrong type is not run."""


def open_report(folder: Path) -> None:
    """Open a report's overview from disk, in the user's browser."""
    _browse((folder / "index.html").as_uri())


def serve_report(folder: Path, *, browse: bool = False) -> None:
    """Serve a report on a free port of 127.0.0.1 until Ctrl-C; `browse` opens it as well."""
    with report_server(folder) as server:
        url = f"http://127.0.0.1:{server.server_port}/index.html"
        print(f"Serving the report to this machine alone: {url} (Ctrl-C ends it)", flush=True)
        if browse:
            _browse(url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def report_server(folder: Path) -> ThreadingHTTPServer:
    """A server of the files in `folder`, bound to a free port of 127.0.0.1, not yet serving."""
    return ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))


def _browse(url: str) -> None:
    if not webbrowser.open(url):
        print(f"No browser was found here: open {url}", flush=True)


class _Handler(SimpleHTTPRequestHandler):
    """Files inside the folder, nothing else, and only to who asks for this machine by its own name."""

    server: ThreadingHTTPServer
    extensions_map = TYPES

    def send_head(self) -> Any:
        # A site that has its own name resolved to 127.0.0.1 (DNS rebinding) sends that name.
        own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        if self.headers.get("Host") not in own:
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        # A link inside the folder must not lead out of it.
        if not Path(self.translate_path(self.path)).resolve().is_relative_to(Path(self.directory).resolve()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was looked at is nobody's business."""
