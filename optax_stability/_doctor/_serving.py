"""Shows the report of a log as a page that renews itself.

The server listens on the loopback interface unless another address is given: whoever
can reach it can read the log. It only answers GET and HEAD, and runs nothing.
"""

import html
import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from optax_stability._doctor._examination import Examination
from optax_stability._doctor._log import UnreadableError

_WAITING = b"<!doctype html><title>Waiting</title><p>Waiting for the first row."


class Pages:
    """The pages to show, by path; replaced as a whole."""

    def __init__(self) -> None:
        """A page that says that there is nothing yet."""
        self._pages: dict[str, tuple[str, bytes]] = {"/": ("text/html", _WAITING)}

    def get(self, path: str) -> tuple[str, bytes] | None:
        """(type, content) of a page; None if there is none."""
        return self._pages.get(path.partition("?")[0])

    def renew(self, examined: list[Examination]) -> None:
        """Draws the pages of the logs."""
        pages: dict[str, tuple[str, bytes]] = {}
        for i, each in enumerate(examined, 1):
            pages[f"/{i}"] = "text/html", each.report()
        pages["/"] = pages["/1"] if len(examined) == 1 else _list(examined)
        found = [
            {"log": each.log.name, "findings": [one._asdict() for one in each.findings]}
            for each in examined
        ]
        text = json.dumps(found, ensure_ascii=False)
        pages["/findings.json"] = "application/json", text.encode()
        self._pages = pages


def _list(examined: list[Examination]) -> tuple[str, bytes]:
    """A page with a link to each log."""
    items = "".join(
        f'<li><a href="/{i}">{html.escape(each.log.name)}</a>: '
        f"{len(each.findings)} findings</li>"
        for i, each in enumerate(examined, 1)
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>Logs</title><style>:root{color-scheme:'
        "light dark}body{font:1rem/1.6 system-ui;margin:2rem}</style>"
        f"<h1>Logs</h1><ol>{items}</ol></html>"
    )
    return "text/html", page.encode()


def serve(port: int, host: str, pages: Pages, every: float) -> ThreadingHTTPServer:
    """Starts a server in a thread of its own.

    Args:
      port: 0 for any that is free.
      host: the address to listen on.
      pages: what to show.
      every: seconds after which a browser loads a page again.

    Raises:
      UnreadableError: the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # The name is given by the base class.
            self._answer(with_content=True)

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def _answer(self, *, with_content: bool) -> None:
            found = pages.get(self.path)
            kind, content = found or ("text/plain", b"There is no such page.\n")
            self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if kind == "text/html":
                self.send_header("Refresh", f"{max(round(every), 1)}")
            self.end_headers()
            if with_content:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UnreadableError(
            f"--serve {port}: {host} cannot be listened on there "
            f"({error.strerror or error}); choose another port, or 0 for any."
        ) from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
