"""What a page must not do: complain in its console, throw, or ask another host."""

from typing import Any
from urllib.parse import urlsplit

OURS = ("127.0.0.1", "")  # "": data:, blob: and file: have no host

# (part of the message, end of its address) of what says nothing about the page.
IGNORED = [
    ("Failed to load resource", "/favicon.ico"),  # a browser asks every new host for it, whatever the page says
]


class Watch:
    """Collects a page's errors and foreign requests; `problems()` is empty for a page that behaves."""

    def __init__(self, context: Any, requests: bool = False) -> None:
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.requested: list[str] = []
        context.on("console", self._console)
        context.on("weberror", lambda error: self.errors.append(f"thrown: {error.error}"))
        context.on("request", self._request)
        context.route(lambda url: urlsplit(url).hostname not in (None, *OURS), lambda route: route.abort())

    def _console(self, message: Any) -> None:
        address = message.location.get("url", "")
        known = any(part in message.text and address.endswith(end) for part, end in IGNORED)
        if message.type == "error" and not known:
            self.errors.append(f"{message.text} ({address})")

    def _request(self, request: Any) -> None:
        url = urlsplit(request.url)
        if (url.hostname or "") not in OURS:
            self.foreign.append(request.url)
        if url.scheme not in ("data", "blob"):
            self.requested.append(request.url)

    def problems(self) -> list[str]:
        return [*(f"console: {text}" for text in self.errors), *(f"foreign host: {url}" for url in self.foreign)]
