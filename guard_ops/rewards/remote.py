"""A reward that another process computes: the client of :mod:`guard_ops.rewards.server`."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..trainer.policy import Scores
from . import wire

TOKEN = "GUARD_OPS_REWARD_TOKEN"  # the variable that holds it, so that no recipe or log does
_MOST_ANSWER = 2**24  # bytes
_PASSING = (429, 500, 502, 503, 504)  # of a server that may answer the next time


class Remote:
    """What a reward server says of the samples, which are sent as 8-bit PNG files.

    A token for the server is read from the environment variable ``GUARD_OPS_REWARD_TOKEN``.

    Args:
        url: of the server, http://host:port or https://...
        timeout: seconds for an answer.
        retries: how often to ask again where the network or the server fails, after 0.5 s, 1 s ...

    Raises:
        ValueError: an argument of no use.
    """

    name = "remote"

    def __init__(self, url: str = "", timeout: float = 120.0, retries: int = 3) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"`url` of the reward remote is {url!r}; it needs http://host:port, of a server "
                "such as `python -m guard_ops.rewards.server pickscore` starts: "
                "reward_options=[remote.url=http://...]"
            )
        if not 0 < timeout < float("inf") or retries < 0:
            raise ValueError(
                f"`timeout` and `retries` of the reward remote are {timeout} and {retries}; they "
                "need to be > 0 and >= 0"
            )
        self._url = url.rstrip("/") + "/score"
        self._timeout, self._retries = timeout, retries

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            ConnectionError: the server does not answer, or refuses; says why.
        """
        body = wire.write_request(pixels, prompts, metadata)
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                return wire.read_scores(self._post(body), len(prompts))
            except urllib.error.HTTPError as error:
                with error:
                    said = _said(error.read(4096))
                if last or error.code not in _PASSING:
                    raise ConnectionError(f"{self._url} answered {error.code}: {said}") from error
            except wire.WireError as error:
                raise ConnectionError(f"{self._url} answered no scores: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                if last:
                    raise ConnectionError(f"{self._url} does not answer: {error}") from error
            time.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self._url, body, headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as answer:
            found: bytes = answer.read(_MOST_ANSWER + 1)
        if len(found) > _MOST_ANSWER:
            raise wire.WireError(f"more than {_MOST_ANSWER} bytes")
        return found


def _said(body: bytes) -> str:
    """The message in a refusal."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
