import sys

import pytest

from guard_ops.trainer import progress
from guard_ops.trainer.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_at_first_every_half_minute_and_at_the_end(
    clock, capsys
):
    with progress_bar("training", 100, done=40) as update:
        for done in range(41, 101):
            clock[0] += 5
            update(done, f"reward {done}")
        update(100, "reward 100")
    text = capsys.readouterr().out
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "training: 41/100 5 s reward 41"
    assert lines[1] == "training: 47/100 35 s reward 47"
    assert lines[-1] == "training: 100/100 300 s reward 100"
    assert len(lines) == 1 + 300 // 30


def test_what_is_done_already_prints_nothing(capsys):
    with progress_bar("pretraining", 100, done=100) as update:
        update(100, "")
    assert capsys.readouterr().out == ""


def test_in_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("training", 4) as update:
        update(4, "reward 1")
    text = capsys.readouterr().out
    assert "━" in text
    assert "4/4" in text


def test_a_step_that_takes_long_has_a_line_every_half_minute_too(clock, capsys):
    with progress_bar("training", 2) as update:
        for n in range(13):
            update(0, f"rollout {n}/13")
            clock[0] += 10
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"training: 0/2 {10 * n} s rollout {n}/13" for n in (0, 3, 6, 9, 12)]
