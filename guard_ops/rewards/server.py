"""A reward as a server, for trainers on other machines; the client is the reward ``remote``.

    export GUARD_OPS_REWARD_TOKEN=...
    python -m guard_ops.rewards.server pickscore --host 0.0.0.0 --port 8600

POST /score is answered as :mod:`guard_ops.rewards.wire` says; GET /health with the reward's name.
A request without the token, too large, or malformed is refused before it costs anything.
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import os
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from ..trainer.judging import Judge, RewardError
from ..trainer.policy import Reward
from . import load_reward, wire
from .combine import call
from .remote import TOKEN

LARGEST = 2**28  # bytes of a request
PATIENCE = 30.0  # seconds for a client that sends nothing


class RewardServer(ThreadingHTTPServer):
    """Answers one request at a time, and reads several.

    Args:
        reward: what to answer.
        host, port: where to listen; port 0 is any that is free (``server_port`` then says which).
        token: which every request has to bring, as ``Authorization: Bearer``; empty: none.
        device: of the pixels that the reward is given.
        largest: bytes of a request's body.

    Raises:
        ValueError: other machines could ask without a token.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str = "",
        device: torch.device | str = "cpu",
        largest: int = LARGEST,
    ) -> None:
        if not token and not _only_here(host):
            raise ValueError(
                f"`host` is {host!r}, which other machines reach; it needs a token, in the "
                f"environment variable {TOKEN}"
            )
        self.judge, self.device, self.largest = Judge(reward, retries=0), device, largest
        self.title = getattr(reward, "__name__", None) or getattr(reward, "name", "reward")
        self._token = token.encode()
        self.turn = threading.Lock()
        super().__init__((host, port), _Handler)

    def admits(self, header: str | None) -> bool:
        """Whether a request with this ``Authorization`` is let in."""
        if not self._token:
            return True
        return hmac.compare_digest((header or "").encode(), b"Bearer " + self._token)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server_version = "guard-ops"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path != "/health":
            self._refuse(404, "there are POST /score and GET /health")
        elif self._admitted():
            self._answer(200, {"reward": self.server.title})

    def do_POST(self) -> None:
        if self.path != "/score":
            self._refuse(404, "there are POST /score and GET /health")
            return
        if not self._admitted():
            return
        if "Transfer-Encoding" in self.headers:
            self._refuse(411, "a request needs a Content-Length, and no Transfer-Encoding")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            self._refuse(411, "a request needs a Content-Length")
        elif int(length) > self.server.largest:
            self._refuse(413, f"a request may have {self.server.largest} bytes")
        else:
            self._score(int(length))

    def _score(self, length: int) -> None:
        body = self.rfile.read(length)
        if len(body) < length:
            self._refuse(400, "the request ends before its Content-Length")
            return
        try:
            asked = wire.read_request(body)
        except wire.WireError as error:
            self._refuse(400, str(error))
            return
        with self.server.turn:  # a model's memory is for one batch
            try:
                scores = self.server.judge(
                    asked.pixels.to(self.server.device), asked.prompts, asked.metadata
                )
            except RewardError as error:
                self._refuse(500, str(error))
                return
        self._send(200, wire.write_scores(scores))

    def _admitted(self) -> bool:
        if self.server.admits(self.headers.get("Authorization")):
            return True
        self._refuse(401, "the token is missing or wrong")
        return False

    def _refuse(self, status: int, message: str) -> None:
        """Say why, and read no more from a client whose body was not read to its end."""
        self.close_connection = True
        self._answer(status, {"error": message})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a line a request would drown what matters."""


def _only_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m guard_ops.rewards.server``."""
    parser = argparse.ArgumentParser(
        prog="python -m guard_ops.rewards.server",
        description=f"Serve a reward. The token that clients bring is in ${TOKEN}.",
    )
    parser.add_argument("reward", help="a name, several with + between, or module:function")
    parser.add_argument("options", nargs="*", metavar="name.key=value", help="of the rewards")
    parser.add_argument("--weights", type=float, nargs="+", help="of several rewards")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8600, help="default: 8600")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: cuda where torch has it")
    parser.add_argument(
        "--largest", type=int, default=LARGEST, help="bytes of a request; default: %(default)s"
    )
    given = parser.parse_args(arguments)
    try:
        reward = load_reward(given.reward, given.options, given.weights)
        server = RewardServer(
            reward,
            given.host,
            given.port,
            token=os.environ.get(TOKEN, ""),
            device=given.device,
            largest=given.largest,
        )
        call(reward, "prepare", torch.device(given.device))
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"guard-ops: {error}", file=sys.stderr)
        return 1
    print(f"{server.title} at http://{given.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 130
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
