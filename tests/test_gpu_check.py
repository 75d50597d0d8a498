"""make gpu-check: who gets how much time, what survives a step that hangs, what fails the check."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import device as gpu
from benchmarks import results

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check(monkeypatch):
    """scripts/gpu_check.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("gpu_check", "bounded"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("gpu_check")
    for name in ("gpu_check", "bounded"):
        sys.modules.pop(name, None)


def python(code):
    return [sys.executable, "-c", code]


def fake(check, name, code="", seconds=30, least=5, required=True, **more):
    return check.Step(name, python(code), seconds, least, required, **more)


def test_the_figures_come_before_what_takes_long(check):
    names = [step.name for step in check.STEPS]
    assert names == ["build", "doctor", "CUDA kernels", "benchmarks", "tests", "sanitizer"]
    assert check.TOTAL_SECONDS <= 600


def test_no_file_of_device_tests_is_left_out(check):
    device = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/device").glob("test_*.py")}
    without_one = {"tests/device/test_unusable_device.py"}
    assert set(check.GPU_TESTS) == device - without_one | {"tests/kernels"}


def test_a_step_leaves_the_others_their_least(check):
    steps = [
        fake(check, "a", seconds=400, least=0),
        fake(check, "b", seconds=300, least=100),
        fake(check, "c", seconds=90, least=50),
    ]
    assert check.limit(steps, 0, 500) == 350
    assert check.limit(steps, 0, 1000) == 400
    assert check.limit(steps, 1, 200) == 150
    assert check.limit(steps, 2, 30) == 30
    assert check.limit(steps, 2, -5) == 1
    # too little for everything: each has its part
    assert check.limit(steps, 0, 79) == 40
    assert check.limit(steps, 1, 39) == 30


def test_steps_that_all_take_all_they_may_end_in_time(check):
    left = check.TOTAL_SECONDS
    for index, step in enumerate(check.STEPS):
        seconds = check.limit(check.STEPS, index, left)
        assert seconds >= step.least
        left -= seconds
    assert left >= 0


def test_a_step_that_hangs_is_ended_with_all_it_started(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check.bounded, "GRACE_SECONDS", 0.5)
    child = (
        "import os, signal, time, pathlib;"
        "signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()));"
        "time.sleep(60)"
    )
    parent = f"import subprocess, sys;subprocess.run([sys.executable, '-c', {child!r}])"
    steps = [
        fake(check, "hangs", parent, seconds=2),
        fake(check, "works", "print('here')"),
    ]
    start = time.monotonic()
    hangs, works = check.run_steps(steps, os.environ)
    assert time.monotonic() - start < 20
    assert hangs.text == "FAILED: more than 2 s"
    assert hangs.failed
    assert works.text == "passed"
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("ignored", [False, True])  # as in a shell's background job
def test_a_step_may_say_what_it_has_when_it_is_interrupted(ignored):
    code = (
        "import sys, time\n"
        "try:\n    print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('so far: 3 passed')"
    )
    caller = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import bounded
signal.signal(signal.SIGINT, signal.SIG_IGN if {ignored} else signal.default_int_handler)
print(bounded.run({python(code)!r}, 2, ".", os.environ, output=subprocess.PIPE))
"""
    done = subprocess.run(python(caller), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr((None, "begun\nso far: 3 passed\n"))


def test_a_step_has_an_environment_and_a_grace_of_its_own(check, capfd, monkeypatch):
    monkeypatch.setattr(check.bounded, "GRACE_SECONDS", 0.5)
    code = (
        "import os, time\n"
        "print(os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1.5); print('late', flush=True)"
    )
    step = fake(check, "x", code, seconds=2, variables={"OMP_NUM_THREADS": "3"}, grace=20.0)
    (outcome,) = check.run_steps([step], {**os.environ, "OMP_NUM_THREADS": "1"})
    assert outcome.text == "FAILED: more than 2 s"
    assert "3\nlate" in capfd.readouterr().out


def test_an_interrupted_check_leaves_no_step_behind(tmp_path):
    pid = tmp_path / "pid"
    hangs = f"import os,time;open({str(pid)!r},'w').write(str(os.getpid()));time.sleep(60)"
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import gpu_check
gpu_check.without_a_gpu = gpu_check.architecture = gpu_check.passed_earlier = lambda: ""
gpu_check.STEPS = [gpu_check.Step("x", [sys.executable, "-c", {hangs!r}], 60, 5, True)]
gpu_check.main()
"""
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"terminated" in text
    assert not alive(int(pid.read_text()))


def test_outcomes_say_what_failed_and_what_counts(check):
    steps = [
        fake(check, "fails", "raise SystemExit(3)", required=False),
        fake(check, "counts", "raise SystemExit(4)"),
        fake(check, "means something", "raise SystemExit(5)", meaning={5: "too slow"}),
        fake(check, "left out", "raise SystemExit(5)", wanted=lambda: "no compiler"),
        fake(check, "refused", "raise SystemExit(6)", not_run={6: "no device"}),
        check.Step("knows", [*python("import sys; sys.exit(sys.argv[1:] != ['15', '--a', 'b'])"),
                             check.SECONDS, check.OPTIONS], 30, 5, True),
    ]  # fmt: skip
    outcomes = check.run_steps(steps, os.environ, options=["--a", "b"])
    assert [(o.text, o.failed) for o in outcomes] == [
        ("FAILED: exit status 3", False),
        ("FAILED: exit status 4", True),
        ("FAILED: too slow", True),
        ("not run: no compiler", False),
        ("not run: no device", False),
        ("passed", False),
    ]


def test_a_later_step_may_use_what_an_earlier_one_left(check, monkeypatch):
    steps = [fake(check, "a", seconds=4, least=0), fake(check, "b", seconds=100, least=3)]
    limits = []
    run = lambda command, seconds, *_, grace: limits.append(seconds) or (0, "")  # noqa: E731
    monkeypatch.setattr(check.bounded, "run", run)
    check.run_steps(steps, os.environ, total=7)
    assert limits == [pytest.approx(4, abs=0.1), pytest.approx(7, abs=0.1)]


@pytest.mark.parametrize(
    "available, build, words, failed",
    [
        (["cuda", "triton"], "passed", ["available", "available"], False),
        (["triton"], "passed", ["available", "MISSING: the build passed but has no cuda"], False),
        (["triton"], "not run: no nvcc", ["available", "missing, build not run: no nvcc"], False),
        (["cpu"], "passed", ["FAILED: torch sees a GPU but guard_ops has no triton"], True),
        ([], "passed", ["FAILED: torch sees a GPU"], True),
    ],
)
def test_a_backend_that_is_missing_is_said_to_be(available, build, words, failed, check):
    outcomes = check.judge_backends(available, {"triton": "not installed", "cuda": "none"}, build)
    assert [outcome.step for outcome in outcomes] == ["backend triton", "backend cuda"]
    for word, outcome in zip(words, outcomes, strict=False):
        assert word in outcome.text
    assert any(outcome.failed for outcome in outcomes) is failed


@pytest.mark.slow_suite  # which imports torch
def test_backends_are_asked_of_a_new_process(check, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    available, unavailable = check.backends(environment)
    assert "reference" in available
    assert set(available) | set(unavailable) == {"cuda", "triton", "cpu", "reference"}
    monkeypatch.setattr(check, "PYTHON", "/bin/false")
    assert check.backends(environment) == ([], {"triton": "guard_ops: ", "cuda": "guard_ops: "})
    monkeypatch.setattr(check.bounded, "run", lambda *_, **__: (None, "importing\n"))
    assert check.backends(environment)[1]["triton"] == "guard_ops: importing"


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU by name only, and where its results go."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100/80")
    monkeypatch.setattr(results.put, "__defaults__", (tmp_path, "cpu", None))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "sources", lambda: "these")
    return tmp_path / "nvidia-h100-80.json"


def test_outcomes_are_saved_whatever_becomes_of_guard_ops(check, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "guard_ops", None)
    monkeypatch.setitem(sys.modules, "benchmarks.measure", None)
    device.write_text('{"device": {"rows": [1]}}')
    rows = [check.Outcome("a", "passed", 1.0, False), check.Outcome("b", "FAILED: x", 2.0, True)]
    assert check.save(rows) == "benchmarks/results/nvidia-h100-80.json"
    saved = json.loads(device.read_text())
    assert saved["device"] == {"rows": [1]}
    assert saved["gpu_check"]["rows"] == [row._asdict() for row in rows]
    assert saved["gpu_check"]["environment"]["device"] == "NVIDIA H100/80"
    device.write_text("{")
    assert check.save(rows).startswith("no file: ")


def test_every_step_is_saved_before_the_next_and_the_clock_is_the_process_s(
    check, device, monkeypatch, capsys
):
    code = f"import json; print(json.load(open({str(device)!r}))['gpu_check']['rows'][0]['text'])"
    steps = [fake(check, "a", "pass"), fake(check, "b", code), fake(check, "c", "1/0")]
    monkeypatch.setattr(check, "STEPS", steps)
    monkeypatch.setattr(check, "without_a_gpu", lambda: "")
    monkeypatch.setattr(check, "architecture", lambda: "90-real")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(check, "BEGAN", time.monotonic() - 50)
    assert check.main(["--seconds", "90"]) == 1
    saved = json.loads(device.read_text())["gpu_check"]["rows"]
    assert [row["text"] for row in saved] == ["passed", "passed", "FAILED: exit status 1"]
    # 90 - 50 - END_SECONDS, less the least of the others
    assert "gpu-check: a, at most 15 s" in capsys.readouterr().out


class Workshop:
    """A fake device: what each step's command does there, in this process and at once."""

    def __init__(self, check, rows):
        self.check, self.rows, self.ran = check, rows, []

    def run(self, command, seconds, *_, **__):
        step = next(s for s in self.check.STEPS if s.command[:3] == list(command)[:3])
        if step.name == "CUDA kernels" and "-n" in command:
            step = next(s for s in self.check.STEPS if s.name == "tests")
        self.ran.append(step.name)
        if step.name == "benchmarks":
            return self.benchmarks(list(command)[3:]), ""
        statuses = {"tests": None, "sanitizer": self.check.sanitize.NOT_RUN}
        return statuses.get(step.name, 0), ""

    def benchmarks(self, arguments):
        """Measures so many rows before the time is up."""
        left = iter(range(self.rows + 1))  # and the copy

        class Worker:
            __enter__ = __exit__ = lambda self, *_: self

            def ask(self, job, seconds):
                if next(left) == 0:
                    return {"bandwidth": 4e12}
                return {"microseconds": 7.0, "loss_and_grad_microseconds": 7.0}

        def within(todo, worker, deadline):
            for n, job in enumerate(todo):
                if n > self.rows:
                    return
                yield job, worker.ask(job, 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu.isolated, "Worker", lambda work: Worker())
            patch.setattr(gpu, "measure_all", within)
            patch.setattr(gpu, "device_backends", lambda: ["cuda", "triton"])
            patch.setattr(gpu, "environment", lambda: {"device": "fake", "sources": "these"})
            patch.setattr(torch.cuda, "is_available", lambda: True)
            for function in (gpu.save, gpu.earlier):
                defaults = function.__defaults__[:-1]
                patch.setattr(function, "__defaults__", (*defaults, results.FOLDER))
            return gpu.main(arguments)


def test_two_runs_do_everything_once_and_lose_nothing(check, device, monkeypatch, tmp_path, capsys):
    total = len(gpu.jobs(["cuda", "triton"]))
    workshop = Workshop(check, total - 10)
    monkeypatch.setattr(check.bounded, "run", workshop.run)
    monkeypatch.setattr(check, "without_a_gpu", lambda: "")
    monkeypatch.setattr(check, "architecture", lambda: "90-real")
    monkeypatch.setattr(check, "backends", lambda _: (["cuda", "triton"], {}))
    for name in ("no_build", "no_cuda_kernels"):
        step = next(s for s in check.STEPS if s.wanted is getattr(check, name))
        check.STEPS[check.STEPS.index(step)] = step._replace(wanted=lambda: "")
    sanitizer = check.STEPS[-1]
    check.STEPS[-1] = sanitizer._replace(wanted=lambda: "")
    monkeypatch.setattr(check, "PYTHON", "/bin/false")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = tmp_path / "out"

    assert check.main(["--out", str(out), "--seconds", "100000"]) == 1
    assert workshop.ran == [
        "build", "doctor", "CUDA kernels", "benchmarks", "tests", "sanitizer"
    ]  # fmt: skip
    saved = json.loads(device.read_text())
    assert json.loads((out / device.name).read_text()) == saved
    assert len(saved["device"]["rows"]) == total - 10
    texts = {row["step"]: row["text"] for row in saved["gpu_check"]["rows"]}
    assert texts["CUDA kernels"] == "passed"
    assert texts["benchmarks"] == "FAILED: a bound is missed, or was not measured"
    assert texts["tests"].startswith("FAILED: more than")
    assert texts["sanitizer"].startswith("not run: compute-sanitizer is refused the device")

    workshop.ran.clear()
    assert check.main(["--out", str(out), "--seconds", "100000"]) == 1
    assert workshop.ran == ["build", "doctor", "benchmarks", "tests", "sanitizer"]
    saved = json.loads(device.read_text())
    assert len(saved["device"]["rows"]) == total
    texts = {row["step"]: row["text"] for row in saved["gpu_check"]["rows"]}
    assert texts["CUDA kernels"] == "passed in an earlier run"
    assert f"{total - 10} of {total} rows are kept from an earlier run" in capsys.readouterr().out

    workshop.ran.clear()
    assert check.main(["--again", "--seconds", "100000"]) == 1
    assert "CUDA kernels" in workshop.ran
    workshop.ran.clear()
    monkeypatch.setattr(results, "sources", lambda: "others")
    assert check.main(["--seconds", "100000"]) == 1
    assert "CUDA kernels" in workshop.ran


def test_what_it_and_its_steps_print_is_in_the_folder_too(tmp_path):
    log = tmp_path / "deep" / "gpu-check.log"
    code = f"""
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "scripts")!r})
import gpu_check
with gpu_check.printed_too(Path({str(log)!r})):
    print("of its own")
    subprocess.run(["sh", "-c", "echo of a step; echo of its errors >&2"])
print("after", flush=True)
"""
    for count in (1, 2):  # a second run adds to what the first has
        done = subprocess.run(python(code), capture_output=True, text=True, check=True)
        lines = {"of its own", "of a step", "of its errors"}
        assert set(done.stdout.splitlines()) == lines | {"after"}
        assert sorted(log.read_text().splitlines()) == sorted([*lines] * count)


def test_other_sources_have_another_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "benchmarks" / "results")
    (tmp_path / "csrc").mkdir()
    first = results.sources()
    (tmp_path / "csrc" / "a.cu").write_text("1")
    second = results.sources()
    (tmp_path / "csrc" / "a.cu").write_text("2")
    (tmp_path / "csrc" / "notes.md").write_text("3")
    assert len({first, second, results.sources()}) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gpu_check": 3}'])
def test_a_file_that_cannot_be_read_has_no_earlier_run(check, device, text):
    device.write_text(text)
    assert check.passed_earlier(device.parent) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the check itself")
def test_without_a_gpu_it_says_what_it_did_not_run():
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for step in ("build", "doctor", "CUDA kernels", "tests", "benchmarks", "sanitizer"):
        assert f"  {step}: python" in done.stdout
