"""Posts one request to a server and reads the complete answer. Servers are not trusted.

Redirects are not followed (the key would be sent along), one deadline covers the whole answer even if it arrives byte by byte, the size of
an answer is limited, and a server's text is shortened to one line without the key before it is shown.
"""

import http.client
import io
import os
import socket
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from ...models.common.errors import UserError
from ...models.common.terminal_text import printable

# time-outs, too many requests and failures of the server: the same request may succeed later
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_SHOWN = 300
"""Largest number of characters of a server's text in a message."""


class NoAnswerError(Exception):
    """No complete answer came; ``again`` is whether another try may succeed."""

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(why)
        self.again = again


class Server:
    """A server that answers requests.

    Args:
        url: Base address; paths are appended to it.
        key_variable: Environment variable that holds the key, if there is one.
        timeout: Seconds for a complete answer, from the connection to the last byte.

    Raises:
        UserError: the value of the variable cannot be a key.
    """

    def __init__(self, url: str, key_variable: str, timeout: float) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"the environment variable {key_variable} (teacher.served.key_variable) holds no valid key: a key is one line of ASCII text"
            )
        # built by hand, because urllib's default opener also follows redirects, opens files and sends passwords
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler,
            _Http,
            _Https,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPErrorProcessor,
        ):
            self._opener.add_handler(handler())

    @property
    def has_key(self) -> bool:
        """Whether a key is sent with each request."""
        return bool(self._key)

    def post(self, path: str, body: bytes, most: int) -> bytes:
        """The answer to ``body`` (JSON), at most ``most`` bytes.

        Raises:
            NoAnswerError: the server refuses, redirects, does not answer in time, or sends too many bytes or too few.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}{path}", body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                return _whole(answer, most)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._trouble(error) from None

    def _refusal(self, error: urllib.error.HTTPError) -> NoAnswerError:
        if 300 <= error.code < 400:
            what = f"HTTP {error.code}, a redirect to {_host(error.headers.get('Location'))}; redirects are not followed, because the key "
            return NoAnswerError(what + "would be sent along; give the final address", again=False)
        try:
            # enough for what is shown: UTF-8 takes up to four bytes per character
            text = error.read(4 * _SHOWN).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError):
            text = ""
        return NoAnswerError(f"HTTP {error.code}: {self._shown(text) or self._shown(str(error.reason))}", again=error.code in _AGAIN)

    def _trouble(self, error: Exception) -> NoAnswerError:
        reason: Any = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            return NoAnswerError(f"no complete answer within {self._timeout:g} seconds (teacher.served.timeout)", again=True)
        if isinstance(error, http.client.HTTPException):
            return NoAnswerError(f"an answer that breaks off or is not HTTP ({type(error).__name__})", again=True)
        return NoAnswerError(self._shown(str(reason)) or type(reason).__name__, again=True)

    def _shown(self, text: str) -> str:
        """A server's text on one line, shortened, without the key (which it may echo) and without terminal control characters."""
        return printable(" ".join((text.replace(self._key, "***") if self._key else text).split())[:_SHOWN])


def _whole(answer: http.client.HTTPResponse, most: int) -> bytes:
    """The complete body."""
    too_long = f"more than {most:,} bytes, the most that an answer to this request can have"
    if answer.length is not None and answer.length > most:
        raise NoAnswerError(too_long, again=False)
    # one byte more than allowed shows that there is more, without reading it all
    data = answer.read(most + 1)
    if len(data) > most:
        raise NoAnswerError(too_long, again=False)
    # http.client returns what it got when the connection ends early; length counts what is still missing
    if answer.length:
        raise NoAnswerError(f"an answer that breaks off {answer.length:,} bytes before its end", again=True)
    return data


def _host(location: str | None) -> str:
    try:
        # the host alone: the rest of an address may hold secrets, and comes from the server
        return repr(urlsplit(location or "").hostname or "nowhere")
    except ValueError:
        return "nowhere"


class _TimedReader(io.RawIOBase):
    """Reads of a socket with one deadline for all: with a time-out per read a server could send single bytes forever."""

    def __init__(self, raw: Any, connected: socket.socket, deadline: float) -> None:
        super().__init__()
        self._raw, self._socket, self._deadline = raw, connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """A connected socket whose reads and writes have one deadline."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._socket.makefile("rb", buffering=0), self._socket, self._deadline))

    def sendall(self, data: Any) -> None:
        self._socket.settimeout(_left(self._deadline))
        self._socket.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        deadline = time.monotonic() + float(self.timeout or 0)
        super().connect()
        self.sock: Any = _TimedSocket(self.sock, deadline)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        deadline = time.monotonic() + float(self.timeout or 0)
        super().connect()
        self.sock: Any = _TimedSocket(self.sock, deadline)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)
