"""The remote reward: the same numbers as here, and a server that refuses what it should."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("PIL.Image", reason="needs guard-ops[rewards]")

from guard_ops.rewards import load_reward, wire
from guard_ops.rewards.remote import TOKEN
from guard_ops.rewards.server import RewardServer
from guard_ops.trainer import Scores

SECRET = "word-0123456789"
PIXELS = (torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def bright(pixels, prompts, metadata):
    if "fail" in prompts:
        raise KeyError("no such prompt")
    own = torch.tensor([float(row.get("n", "nan")) for row in metadata])
    return Scores(pixels.flatten(1).mean(1), {"n": own})


@pytest.fixture
def served(monkeypatch):
    """Starts a server; its address and port."""
    servers = []

    def start(reward=bright, **settings):
        server = RewardServer(reward, token=SECRET, **settings)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    monkeypatch.setenv(TOKEN, SECRET)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(server, **options):
    words = {"url": f"http://127.0.0.1:{server.server_port}", "retries": 0, "timeout": 10}
    return load_reward("remote", [f"remote.{k}={v}" for k, v in (words | options).items()])


def test_scores_and_parts_come_back(served):
    found = client(served())(PIXELS, ["a", "b", "é"], [{"n": 1}, {}, {"n": 3.5}])
    torch.testing.assert_close(found.total, PIXELS.flatten(1).mean(1))
    assert found.parts["n"].nan_to_num(-1).tolist() == [1, -1, 3.5]
    video = client(served())(PIXELS[None], ["a"], [{}])
    torch.testing.assert_close(video.total, PIXELS.mean()[None])


def test_a_fault_of_the_reward_is_told_with_its_prompt(served):
    with pytest.raises(ConnectionError, match=r"answered 500: .*KeyError.*for the prompt 'fail'"):
        client(served())(PIXELS[:1], ["fail"], [{}])


def test_without_the_token_nothing_is_answered(served, monkeypatch):
    server = served()
    for wrong in ("", "other", SECRET + "x"):
        monkeypatch.setenv(TOKEN, wrong)
        with pytest.raises(ConnectionError, match="answered 401: the token is missing or wrong"):
            client(server)(PIXELS[:1], ["a"], [{}])
    assert request(server, "GET", "/health", b"", {})[0] == 401


def test_an_oversize_request_is_refused_unread(served):
    server = served(largest=1000)
    with pytest.raises(ConnectionError, match="answered 413: a request may have 1000 bytes"):
        client(server)(torch.rand(3, 3, 64, 64), ["a"] * 3, [{}] * 3)
    # nothing of the body is awaited
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Length": str(10**15)}
    assert request(server, "POST", "/score", b"", headers)[0] == 413


def test_an_image_that_unpacks_to_too_much_is_refused(served, monkeypatch):
    body = wire.write_request(torch.zeros(2, 3, 100, 100), ["a", "b"], [{}, {}])
    monkeypatch.setattr(wire, "MOST_PIXELS", 15_000)
    with pytest.raises(wire.WireError, match=r"images\[1\] is 100 x 100; a request may have 15000"):
        wire.read_request(body)


def test_other_machines_need_a_token():
    with pytest.raises(ValueError, match=r"`host` is '0\.0\.0\.0', which other machines"):
        RewardServer(bright, "0.0.0.0")
    RewardServer(bright, "127.0.0.1").server_close()


def test_a_passing_fault_of_the_network_is_tried_again(served):
    calls = []

    def once(pixels, prompts, metadata):
        calls.append(1)
        if len(calls) == 1:  # one sample, which the server need not look for
            raise OSError("busy")
        return torch.ones(len(prompts))

    found = client(served(once), retries=1)(PIXELS[:1], ["a"], [{}])
    assert found.total.tolist() == [1]
    assert len(calls) == 2


def test_nobody_there_and_nobody_answering_are_said():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        ask = load_reward(
            "remote",
            [f"remote.url=http://127.0.0.1:{port}", "remote.retries=0", "remote.timeout=0.3"],
        )
        with pytest.raises(ConnectionError, match=r"does not answer: .*refused"):
            ask(PIXELS[:1], ["a"], [{}])
        listening.listen()
        started = time.perf_counter()
        with pytest.raises(ConnectionError, match=r"does not answer: .*timed out"):
            ask(PIXELS[:1], ["a"], [{}])
        assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "no JSON"),
        (b"[]", "it is a list; it needs to be an object"),
        (b'{"scores": [1, 2]}', '"scores" needs to be a list of 1 numbers'),
        (b'{"scores": ["1"]}', "something else than numbers"),
        (b'{"scores": [1], "parts": {"a": []}}', '"parts.a" needs to be a list of 1'),
        (b'{"scores": [1], "parts": []}', '"parts" needs to be an object'),
    ],
)
def test_an_answer_of_another_form_is_named(body, message):
    with pytest.raises(wire.WireError, match=message):
        wire.read_scores(body, 1)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "`url` of the reward remote is ''; it needs http://host:port"),
        (["remote.url=ftp://host"], "it needs http://host:port"),
        (["remote.url=http://host", "remote.timeout=0"], "need to be > 0 and >= 0"),
    ],
)
def test_bad_options_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        load_reward("remote", words)


# ------------------------------------------------------------------------------------- fuzzing

GOOD = json.loads(wire.write_request(PIXELS[:1], ["a"], [{}]))
JUNK = (None, True, -1, 2, 1e999, "", "x" * 50, [], [[]], [None], {}, {"a": {}}, "iVBORw0KGgo=")


def request(server, method, path, body, headers):
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.putrequest(method, path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def mutated(dice: random.Random) -> bytes:
    """A request that is nearly right."""
    body = json.loads(json.dumps(GOOD))
    kind = dice.randrange(5)
    if kind == 0:  # an entry of another kind
        body[dice.choice(list(body))] = dice.choice(JUNK)
    elif kind == 1:  # an image that is broken
        data = bytearray(body["images"][0].encode())
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.choice(b"AZaz09+/=!")
        body["images"] = [data.decode()[: dice.randint(0, len(data))]]
    elif kind == 2:  # an entry fewer
        del body[dice.choice(list(body))]
    elif kind == 3:  # another number of something
        name = dice.choice(["prompts", "metadata", "images"])
        body[name] = body[name] * dice.choice([0, 2, 3])
    text = json.dumps(body).encode()
    if kind == 4:  # bytes that are no JSON
        data = bytearray(text)
        for _ in range(dice.randint(1, 20)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        text = bytes(data[: dice.randint(0, len(data))])
    return text


def test_2000_malformed_requests_are_refused_and_the_server_goes_on(served):
    """None is a fault of the server (500), and none takes it away."""
    asked = []

    def count(pixels, prompts, metadata):
        asked.append(pixels.shape)
        return torch.ones(len(prompts))

    server, dice, statuses = served(count), random.Random(0), {}
    right = {"Authorization": f"Bearer {SECRET}"}
    for n in range(2000):
        body, headers, path = mutated(dice), dict(right), "/score"
        headers["Content-Length"] = str(len(body))
        if n % 10 == 0:
            headers["Authorization"] = dice.choice(["", "Bearer", "Bearer é", "Basic x", "\x00"])
        elif n % 10 == 1:
            headers["Content-Length"] = dice.choice(["-1", "x", "1e3", "", "9" * 30, "0x1"])
        elif n % 10 == 2:
            path = dice.choice(["/", "/score/", "/health", "//", "/score?x"])
        elif n % 10 == 3:
            headers["Transfer-Encoding"] = "chunked"
        try:
            status, answer = request(
                server, "POST", path, body, {k: v.encode() for k, v in headers.items()}
            )
        except (ConnectionError, http.client.HTTPException, ValueError):
            status = None  # it hung up on a body that it does not read, or we could not send it
        else:
            assert ("error" in json.loads(answer)) == (status != 200)
        statuses[status] = statuses.get(status, 0) + 1
    assert not statuses.keys() - {None, 200, 400, 401, 404, 411, 413}, statuses
    assert statuses[400] > 800
    assert statuses[401] > 100
    assert len(asked) == statuses.get(200, 0)  # nothing else has reached the reward
    assert client(server)(PIXELS[:1], ["a"], [{}]).total.tolist() == [1]
