"""A real HTTP server that speaks as vLLM does."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from decoct.models.settings import ServedSettings

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """Answers POST /v1/completions by ``answer``; keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked, self.keys = answer, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                code, told = outer.answer(body) if self.path == "/v1/completions" else (404, {})
                data = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(code)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def settings(self, **given: Any) -> ServedSettings:
        return ServedSettings(**{"url": self.url, "model": "big", "retries": 0, **given})


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def as_vllm() -> Callable[[Any], Answer]:
    """Of a model: the tokens' log-probabilities as vLLM tells them, the likeliest ones, and the one that stands there."""
    return _as_vllm


def _as_vllm(model: Any) -> Answer:

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        ids = body["prompt"]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        told: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            values, best = logs[at].topk(body["prompt_logprobs"])
            chosen = dict(zip(best.tolist(), values.tolist())) | {token: float(logs[at, token])}
            told.append({str(i): {"logprob": v, "rank": int((logs[at] > v).sum()) + 1, "decoded_token": "?"} for i, v in chosen.items()})
        return 200, {"choices": [{"text": "", "prompt_logprobs": told}]}

    return answer
