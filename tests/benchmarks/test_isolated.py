"""Work in another process: what becomes of it when it fails, dies or hangs."""

import os
import time

from benchmarks.isolated import Worker, first_line


def work(job):
    """In the other process."""
    if job == "raise":
        raise ValueError("no such thing\nand more")
    if job == "die":
        os._exit(7)
    if job == "hang":
        time.sleep(60)
    if job == "half":
        return {"first": 1, "error": "the second failed"}
    return {"process": os.getpid(), "job": job}


def test_one_process_answers_until_it_fails_and_another_goes_on():
    with Worker(work) as worker:
        first = worker.ask("a", 60)
        again = worker.ask("b", 60)
        assert first["process"] == again["process"] != os.getpid()
        assert again["job"] == "b"
        assert worker.ask("raise", 60) == {"error": "ValueError: no such thing"}
        other = worker.ask("c", 60)["process"]
        assert other != first["process"]
        assert worker.ask("die", 60) == {"error": "its process ended with 7"}
        assert worker.ask("half", 60) == {"first": 1, "error": "the second failed"}
        start = time.monotonic()
        assert worker.ask("hang", 0.5) == {"error": "no result within 0 s"}
        assert time.monotonic() - start < 30
        assert worker.ask("d", 60)["job"] == "d"


def test_a_message_is_its_first_line():
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError: "
    assert len(first_line(ValueError("x" * 1000))) == 200
