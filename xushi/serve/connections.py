"""Limits on connections: how many there are, and how long one may take over a request's headers.

Not here: who may ask (access), how many requests wait (worker).
"""

import asyncio
import itertools
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# A client sends its headers at once. What takes this long is broken, or holds connections on
# purpose.
SECONDS_FOR_HEADERS = 10.0
MOST_CONNECTIONS = 1000
# asyncio accepts this many connections, and one more, before it looks at any of them.
ACCEPTED_AT_ONCE = 16
# Files that the process has open besides connections, and connections that are accepted and not yet
# refused.
SPARE_FILES = 128
# How many the operating system holds until they are accepted.
WAITING_CONNECTIONS = 1024
# Numbers in the order of time. A clock may show several connections the same time (uvloop's does).
_ORDER = itertools.count()


def connection_limit() -> int:
    """The largest number of open connections that leaves files for everything else."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(ACCEPTED_AT_ONCE, min(MOST_CONNECTIONS, files - SPARE_FILES))


class Connection(H11Protocol):
    """One connection. It is closed when its headers take too long.

    When there are too many, the one that has waited longest without a request is closed for the
    new one, and the new one itself if all have requests.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limit = connection_limit()
        self._headers_timer: asyncio.TimerHandle | None = None
        self.idle_since = next(_ORDER)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            self._make_room()
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        if self._headers_timer is not None:
            self._headers_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Part of a request has come."""
        super().data_received(data)
        self._time_headers()

    def on_response_complete(self) -> None:
        """A request has been answered."""
        self.idle_since = next(_ORDER)
        super().on_response_complete()

    def _time_headers(self) -> None:
        """Run the timer exactly while the headers of a request are incomplete. uvicorn itself
        closes connections on which nothing at all comes after a request.
        """
        if self.is_idle and self._headers_timer is None:
            self._headers_timer = self.loop.call_later(SECONDS_FOR_HEADERS, self.transport.abort)
        elif not self.is_idle and self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _make_room(self) -> None:
        open_ = [each for each in self.connections if isinstance(each, Connection)]
        idle = [each for each in open_ if each.is_idle and not each.transport.is_closing()]
        oldest = min(idle, key=lambda each: each.idle_since)
        oldest.transport.abort()
