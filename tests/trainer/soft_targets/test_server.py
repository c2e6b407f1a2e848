"""Servers that cannot be trusted: no redirect is followed, time and bytes have bounds, keys stay where they belong."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.models.settings import ServedSettings
from decoct.trainer.soft_targets.prompt_logprobs import most_bytes, read_positions
from decoct.trainer.soft_targets.served import ServedTeacher
from decoct.trainer.soft_targets.server import NoAnswerError, Server

KEY = "canary-key-123"
Handler = http.server.BaseHTTPRequestHandler
Act = Callable[[Handler], None]


class Hostile:
    """A server that does what it is told with the bare connection; keeps the keys that it was sent."""

    def __init__(self, act: Act) -> None:
        self.keys: list[str | None] = []
        outer = self

        class OneHandler(Handler):
            def do_POST(self) -> None:  # noqa: N802
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                outer.keys.append(self.headers.get("Authorization"))
                self.close_connection = True
                with contextlib.suppress(OSError):
                    act(self)

            do_GET = do_POST  # noqa: N815 - what a followed redirect would be

            def log_message(self, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneHandler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Act], Hostile]]:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    started: list[Hostile] = []

    def start(act: Act) -> Hostile:
        started.append(Hostile(act))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def send(data: bytes, code: int = 200, length: int | None = None, **headers: str) -> Act:
    def act(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)

    return act


def drip(headers: bool) -> Act:
    def act(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"" if headers else b"\r\n"))
        for _ in range(200):
            handler.wfile.write(b"a")
            handler.wfile.flush()
            time.sleep(0.05)

    return act


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(4000):
        handler.wfile.write(b" " * 1_000_000)


def raw(data: bytes) -> Act:
    return lambda handler: void(handler.wfile.write(data))


def void(_: object) -> None:
    return None


def ask(url: str, *, most: int = 1000, timeout: float = 5.0) -> bytes:
    return Server(url, "TEACHER_KEY", timeout).post("/completions", b"{}", most)


def trouble(url: str, **given: Any) -> NoAnswerError:
    with pytest.raises(NoAnswerError) as caught:
        ask(url, **given)
    text = str(caught.value)
    assert KEY not in text
    assert len(text.splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_stays(code: int, hostile: Callable[[Act], Hostile]) -> None:
    other = hostile(send(b"{}"))
    first = hostile(send(b"", code, Location=f"{other.url}/stolen"))
    error = trouble(first.url)
    assert f"HTTP {code}, a redirect to '127.0.0.1'" in str(error)
    assert not error.again
    assert first.keys == [f"Bearer {KEY}"]
    assert other.keys == []


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1:1/x", "http://[", ""])
def test_a_redirect_to_nowhere_is_told(place: str, hostile: Callable[[Act], Hostile]) -> None:
    assert "a redirect to" in str(trouble(hostile(send(b"", 302, Location=place)).url))


@pytest.mark.parametrize("headers", [True, False])
def test_an_answer_that_drips_ends_at_the_deadline(headers: bool, hostile: Callable[[Act], Hostile]) -> None:
    began = time.monotonic()
    error = trouble(hostile(drip(headers)).url, timeout=0.3)
    assert time.monotonic() - began < 2
    assert "no complete answer within 0.3 seconds" in str(error)
    assert error.again


def test_a_server_that_says_nothing_ends_at_the_deadline(hostile: Callable[[Act], Hostile]) -> None:
    assert "within 0.2 seconds" in str(trouble(hostile(lambda _: time.sleep(1)).url, timeout=0.2))


@pytest.mark.parametrize("act", [endless, send(b"a" * 5000), send(b"", length=10**12)])
def test_a_body_has_a_bound(act: Act, hostile: Callable[[Act], Hostile]) -> None:
    error = trouble(hostile(act).url)
    assert "more than 1,000 bytes" in str(error)
    assert not error.again


@pytest.mark.parametrize(
    "act",
    [
        send(b"{", length=900),
        raw(b"HELLO\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % at for at in range(300)) + b"\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\nabc\r\n"),
        raw(b""),
        send(b"busy", 503),
        send(b"slow down", 429),
        send(b"oops", 500, length=100_000),
    ],
)
def test_what_may_get_better_is_asked_again(act: Act, hostile: Callable[[Act], Hostile]) -> None:
    assert trouble(hostile(act).url).again


def test_a_key_that_the_server_sends_back_is_not_shown(hostile: Callable[[Act], Hostile]) -> None:
    error = trouble(hostile(send(b"bad key\n" + KEY.encode() + b" really", 401)).url)
    assert str(error) == "HTTP 401: bad key *** really"
    assert not error.again
    assert str(trouble(hostile(send(b"\x1b[2J\xffx", 401)).url)) == "HTTP 401: \\x1b[2J\ufffdx"


def test_a_variable_that_holds_no_key_is_told_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\r\nX-Evil: 1")
    with pytest.raises(UserError, match=r"TEACHER_KEY.*holds no valid key") as caught:
        Server("http://127.0.0.1:1/v1", "TEACHER_KEY", 1.0)
    assert KEY not in str(caught.value)


def test_a_whole_answer_comes_through(hostile: Callable[[Act], Hostile]) -> None:
    assert ask(hostile(send(b"x" * 1000)).url) == b"x" * 1000
    assert ask(hostile(raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")).url) == b"abc"


def test_what_breaks_off_is_asked_for_again_and_then_told_in_one_line(
    hostile: Callable[[Act], Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoct.trainer.soft_targets.served.time.sleep", lambda _: None)
    server = hostile(send(b'{"choices": [', length=500))
    teacher = ServedTeacher(ServedSettings(url=server.url, model="big", retries=2, key_variable="TEACHER_KEY"), 8)
    assert "with the key in TEACHER_KEY" in teacher.describe()
    with pytest.raises(UserError, match="gave no answer for model 'big': an answer that breaks off 487 bytes before its end") as caught:
        teacher._ask([1, 2, 3])
    assert len(server.keys) == 3
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://user:canary@host/v1",
        "https://canary@host/v1",
        "http://host/v1?api_key=canary",
        "http://host/v1#canary",
        "http:///canary@",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY") as caught:
        ServedSettings(url=url, model="big")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("url", ["host:8000/v1", "ftp://host/v1", "http:///v1", "http://host:99999/v1", "http://[/v1", "http://a b/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        ServedSettings(url=url, model="big")


def test_a_key_in_place_of_its_variable_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="key_variable= names the environment variable") as caught:
        ServedSettings(url="http://host/v1", model="big", key_variable="sk-canary")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("given", [{"requests": 100_000}, {"timeout": float("inf")}, {"timeout": float("nan")}, {"retries": 10**9}])
def test_counts_and_times_have_bounds(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"requests=|timeout=|retries="):
        ServedSettings(url="http://host/v1", model="big", **given)


def test_the_bound_on_bytes_is_far_above_what_a_server_sends() -> None:
    entry = {"logprob": -123.45678901234567, "rank": 128_000, "decoded_token": "\U0001f600" * 16}
    told = [None] + [{str(128_000 + at): entry for at in range(21)}] * 99
    data = json.dumps({"choices": [{"prompt_logprobs": told}]}).encode()
    assert len(data) < most_bytes(100, 20) < 10 * len(data)
    assert len(read_positions(data.replace(b"-123.4", b"-9.4"), length=100, v_eff=200_000)) == 100
