"""`Guard`: rejects requests of other web sites, and sets headers that keep foreign content out of the page."""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
HEADER = "x-sidelight-page"  # another site cannot set it: the browser sends a preflight request, which is rejected

_SAFE = ("GET", "HEAD")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """ASGI middleware. Answers 403, with the reason, to requests that do not come from the page itself.

    `hosts` are the names by which the page may be opened. Another name in the Host header may be DNS rebinding: a site
    has pointed its own name at this address.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(each.lower() for each in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        app = self._app if refusal is None else PlainTextResponse(refusal, 403)
        await app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        """Return why a request is rejected; None if it is the page's own."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if (_name(f"//{host}") or "") not in self._hosts:
            return f"host: got {host!r}, expected {', '.join(sorted(self._hosts))}; --host-name allows another"
        if origin is not None and urlsplit(origin).netloc != host:
            return f"origin: got {origin!r}, expected that of the page"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "the request comes from another site"
        if method not in _SAFE and HEADER not in headers:
            return f"the header {HEADER} is missing"
        return None


def _name(url: str) -> str | None:
    """Return the host name of a URL in lower case, without its port; None if there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
