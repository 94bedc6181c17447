"""Who may ask: keys, the names that this machine is asked under, and pages of other origins.

A server on a loopback address is reachable for every page that a browser on the same machine shows.
Such a page can send requests from its own origin, and read the answers if its name can be made to
lead to this machine (DNS rebinding). So the Host header must be a name of this machine, requests
that a browser marks as coming from other pages are refused, and bodies must be JSON, which a
browser asks permission for. On another address, programs may ask under any name; without keys a
page may not. Not here: limits on connections (connections), bodies (protocol).
"""

import hashlib
import hmac
import ipaddress
import re
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xushi.base.errors import BadInput
from xushi.serve.completions import json_response
from xushi.serve.protocol import ApiError

KEYS_VARIABLE = "XUSHI_API_KEYS"
REQUEST_ID = re.compile(r"[!-~]{1,200}")
_OWN_PORT = re.compile(r"^(http://[^/]*):80$|^(https://[^/]*):443$")
_KEY = re.compile(r"[!-~]+")
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/\s?#]+")


@dataclass(frozen=True)
class Access:
    """`local`: the server listens on a loopback address, so Host must name this machine. On another
    address it must only where a page asks and there are no keys, and any IP address does. `origins`
    are other origins whose pages may ask, as in the Origin header. `keys`: one of them must come
    with every request under /v1; without keys none is needed.
    """

    local: bool = True
    origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise BadInput(
                    f"--allow-origin {origin!r} is not an origin",
                    "give scheme, host and port without a path, such as http://localhost:3000",
                )

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this machine, or an origin that may ask."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        names = {"localhost", socket.gethostname().lower()}
        names |= {urlsplit(origin).hostname or "" for origin in self.origins} - {""}
        if name.rstrip(".") in names or name.endswith(".localhost"):
            return True
        return is_loopback(name) if self.local else _is_address(name)

    def is_key(self, given: str) -> bool:
        """Whether a key is one of the keys, in a time that does not depend on how much is right."""
        digest = hashlib.sha256(given.encode()).digest()
        found = [
            hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in self.keys
        ]
        return any(found)


def is_loopback(address: str) -> bool:
    """Whether the text is an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def read_keys(path: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a file, one a line, and of the variable XUSHI_API_KEYS, separated by white space.

    A source that is given and holds no key is an error: it was not meant to let everybody in.
    """
    sources = {}
    if path is not None:
        try:
            sources[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"--api-key-file {path} cannot be read: {error}",
                "give a text file with one key a line",
            ) from None
    if KEYS_VARIABLE in environment:
        sources[KEYS_VARIABLE] = environment[KEYS_VARIABLE]
    for name, text in sources.items():
        if not text.split() or not all(_KEY.fullmatch(key) for key in text.split()):
            raise BadInput(
                f"{name} holds no key, or one with characters that a header cannot carry",
                "write one key a line, of letters, digits and signs of ASCII",
            )
    return tuple(key for text in sources.values() for key in text.split())


class AccessMiddleware:
    """Refuses requests as `Access` says, and gives every response an `x-request-id`: the request's
    own, or a new one.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        added = {"x-request-id": _identity(headers)}
        origin = headers.get("origin")
        if origin in self._access.origins:
            added |= {
                "access-control-allow-origin": origin,
                "access-control-expose-headers": "x-request-id, retry-after",
                "vary": "Origin",
            }

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(added)
            await send(message)

        app = self._first_answer(scope["method"], scope["path"], headers) or self._app
        try:
            await app(scope, receive, send_with_headers)
        except Exception:
            # starlette's own handler stands outside of this middleware and would add no headers.
            if not started:
                failed = ApiError(
                    500, "the server failed; its log has the error", code="internal_error"
                )
                await json_response(failed.body, 500)(scope, receive, send_with_headers)
            raise  # for the log

    def _first_answer(self, method: str, path: str, headers: Headers) -> Response | None:
        """A refusal, or the answer to a browser that asks permission. None lets a request pass."""
        try:
            self._check_sender(method, path, headers)
            if method == "OPTIONS" and "access-control-request-method" in headers:
                return Response(status_code=204, headers=_permission(headers))
            self._check_key(path, headers)
            _check_media_type(method, headers)
        except ApiError as error:
            return json_response(error.body, error.status, error.headers)
        return None

    def _check_sender(self, method: str, path: str, headers: Headers) -> None:
        access = self._access
        host = headers.get("host")
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site", "none")
        own = origin is not None and origin.partition("://")[2].lower() == (host or "").lower()
        checks_name = access.local or (own and not access.keys)
        if checks_name and host is not None and not access.is_named(host):
            raise ApiError(
                403,
                f"Host {host!r} is not a name of this machine; use "
                f"{'localhost' if access.local else 'its IP address'}, or start the server "
                "with --allow-origin and the address that its users type",
                code="unknown_host",
            )
        if origin is not None:
            if own or origin in access.origins:
                return
        elif site in ("none", "same-origin") or _opens_page(method, path, headers):
            return
        raise ApiError(
            403,
            "a page of another origin may not use this server; allow it with --allow-origin "
            f"{origin or 'and its address'}",
            code="cross_origin",
        )

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._access.keys or not path.startswith("/v1"):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self._access.is_key(key.strip()):
            raise ApiError(
                401,
                "the server needs an API key, as in Authorization: Bearer KEY, and the request has "
                "none or another one",
                None,
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )


def _check_media_type(method: str, headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        raise ApiError(
            415,
            f"the body is {kind or 'of no named type'}; send the header "
            "Content-Type: application/json",
            code="unsupported_media_type",
        )


def _permission(headers: Headers) -> dict[str, str]:
    """What a browser is told that asks for an allowed origin's page. `Private-Network` is asked
    for a public page's request to this machine.
    """
    told = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", ""),
        "Access-Control-Max-Age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        told["Access-Control-Allow-Private-Network"] = "true"
    return told


def _opens_page(method: str, path: str, headers: Headers) -> bool:
    """Whether a link of another page opens the chat page, whose answer that page cannot read."""
    is_navigation = headers.get("sec-fetch-mode") == "navigate"
    return method in ("GET", "HEAD") and path == "/" and is_navigation


def _identity(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def clean_origins(values: Iterable[str]) -> tuple[str, ...]:
    """Origins as a browser writes them: in lower case, without a slash at the end and without the
    scheme's own port.
    """
    cleaned = (value.lower().rstrip("/") for value in values)
    return tuple(_OWN_PORT.sub(r"\1\2", value) for value in cleaned)
