"""Offer the page of `pitstop web` beside the API, with the headers that let a browser give it threads."""

from pathlib import Path

from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pitstop.errors import UsageError

FILES = ("index.html", "config.json")
# Without the first two a browser gives no shared memory, and so no threads. A page is asked for anew at every visit,
# for its files must be of one build; an unchanged one is answered with a few bytes.
HEADERS = (
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-embedder-policy", b"require-corp"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)


def check_page(folder: Path) -> Path:
    """Return a folder if a page is in it.

    Raises:
        UsageError: there is none.
    """
    if not all((folder / name).is_file() for name in FILES):
        raise UsageError("there is no page", where=folder, cure=f"write it: pitstop web {folder} --repository …")
    return folder


class WithPage:
    """Answers with the files of a folder where there is one, and with the application elsewhere.

    The page and what a repository holds are public: an API key is asked for by the application only.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app = app
        self._files = StaticFiles(directory=folder, html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if not self._has(scope):
            await self._app(scope, receive, send)
            return

        async def send_isolated(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._files(scope, receive, send_isolated)

    def _has(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        _, found = self._files.lookup_path(self._files.get_path(scope))
        return found is not None
