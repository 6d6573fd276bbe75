"""Access control: the Host header, and the token."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from retriever.serve.errors import error_response

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Monitoring asks these without a token; they then say only whether the service works.
OPEN_PATHS = ("/health", "/healthz")
AUTHORIZED = "authorized"
"""Key of the request's state: whether it has the token."""


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine's own name or address, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allowed_names(host: str, names: Sequence[str]) -> frozenset[str] | None:
    """The names that a Host header may state; None if any.

    Args:
        host: the address that the service listens on.
        names: further names, of a proxy for example. With an address that other machines reach, the only ones.
    """
    if is_loopback(host):
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, host, *names))
    return frozenset(name.lower() for name in (*LOOPBACK_NAMES, host, *names)) if names else None


class Guard:
    """Middleware that refuses requests with another Host header or without the token.

    A page of another site can make a browser send requests to a service on its user's machine under the name of that
    site (DNS rebinding); the Host header is then that name.

    Args:
        app: the application.
        names: names that a Host header may state; None: any.
        token: the token, expected as `Authorization: Bearer TOKEN` or as the password of Basic authentication, which
            browsers ask for. None: no token.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str] | None, token: str | None) -> None:
        self._app = app
        self._names = names
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._names is not None and _name_of(host) not in self._names:
            message = f"Host: expected {' or '.join(sorted(self._names))}, found {host!r:.80}; see --allowed-host"
            await error_response(path, 421, message)(scope, receive, send)
            return
        authorized = self._token is None or _has_token(headers.get("authorization", ""), self._token)
        if not authorized and path not in OPEN_PATHS:
            wanted = {"www-authenticate": 'Basic realm="retriever", charset="UTF-8"'}
            await error_response(path, 401, "expected the service's token", wanted)(scope, receive, send)
            return
        scope.setdefault("state", {})[AUTHORIZED] = authorized
        await self._app(scope, receive, send)


def _name_of(host: str) -> str:
    """The name in a Host header, without port and without the brackets of an IPv6 address, in lower case."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    return name.strip("[]").lower()


def _has_token(value: str, token: str) -> bool:
    scheme, _, given = value.partition(" ")
    if scheme.lower() == "basic":
        try:
            sent = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() == "bearer":
        # Starlette decodes the bytes of headers as Latin-1.
        sent = given.strip().encode("latin-1")
    else:
        return False
    # The time of the comparison must not tell how much of the token was right.
    return hmac.compare_digest(sent, token.encode())
