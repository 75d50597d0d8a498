"""benchmarks/device.py, as far as it goes without a GPU."""

import dataclasses
import json

import pytest
import torch

from benchmarks import contenders, device, device_bounds, results
from benchmarks.device import COPIED, Job

SLOW = {"eager": 20.0, "torch.compile": 2.5}
OF = {"triton": (0.85, 12.0), "cuda": (0.90, 8.0)}


def rows(backends=("triton", "cuda"), **changed):
    """Rows that just meet the bounds; ``changed`` maps "triton_share" and the like to numbers."""
    out = []
    for workload in (device.LARGE, device.SMALL):
        for dtype in device.DTYPES:
            for objective in device.OBJECTIVES:
                base = {"workload": workload.name, "dtype": dtype, "objective": objective}
                base |= {"form": "mean", "path": "chosen"}
                for name in backends:
                    share, us = OF[name]
                    us = changed.get(f"{name}_us", us)
                    share = changed.get(f"{name}_share", share)
                    moved = changed.get(f"{name}_moved", share)
                    ours = {"contender": name, "microseconds": us, "share_of_copy": share}
                    ours["moved_share_of_copy"] = moved
                    ours["loss_and_grad_microseconds"] = us
                    out += [base | ours, base | ours | {"path": "forced", "microseconds": us / 9}]
                triton = changed.get("triton_us", 12.0)
                for name, times in SLOW.items():
                    chain = {"contender": name, "microseconds": triton * changed.get(name, times)}
                    out.append({k: x for k, x in (base | chain).items() if k != "path"})
    return out


def test_bounds_that_are_met_say_nothing():
    assert device.bounds(rows()) == []
    assert device.bounds(rows(["triton"]), ["triton"]) == []


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            {"triton_share": 0.8, "triton_moved": 0.85},
            ["on triton, article, one pass: 0.80 of a copy, not 0.85"],
        ),
        (
            {"triton_moved": 0.8},
            ["on triton, article, what has to move: 0.80 of a copy, not 0.85"],
        ),
        (
            {"cuda_share": 0.87, "cuda_moved": 0.9},
            [f"on cuda, {o}, one pass: 0.87 of a copy, not 0.9" for o in device.OBJECTIVES],
        ),
        ({"triton_us": 13.0}, ["on triton: 13.0 microseconds, not 12.0"]),
        ({"cuda_us": 8.5}, ["on cuda: 8.5 microseconds, not 8.0"]),
        ({"eager": 19.0}, ["19.0 times eager (graph replay), not 20"] * 2),
        ({"torch.compile": 2.0}, ["2.0 times torch.compile"] * 2),
        ({"triton_us": 7.5, "cuda_us": 8.0}, ["takes 1.07 of triton's time, not 1.05"] * 8),
    ],
)
def test_a_bound_that_is_missed_is_named(changed, words):
    missed = device.bounds(rows(**changed))
    assert len(missed) == len(words)
    assert all(word in line for word, line in zip(words, missed, strict=True))


def test_what_is_not_measured_is_said_to_be_so():
    assert len(device.bounds([])) == 3 + 4 + 2 * 2 + 8
    assert all("not measured" in line for line in device.bounds([]))
    failed = [
        {k: x for k, x in r.items() if "microseconds" not in k and "share" not in k}
        | {"error": "no"}
        if r["contender"] == "eager"
        else r
        for r in rows()
    ]
    assert device.bounds(failed) == [
        f"{list(w.shape)} bf16 on triton: times eager not measured (asked: 20.0)"
        for w in (device.LARGE, device.SMALL)
    ]
    assert device.bounds([], []) == ["no backend here has kernels for the device"]


def kind(job):
    """What a job is measured for."""
    if job.contender in device.CHAINS:
        return job.contender
    if job.path != "chosen":
        return f"{job.contender} by path"
    return {"mean": "bounded", "velocity": "velocity"}.get(job.form, "noise, seeded")


def test_what_decides_most_is_measured_first():
    todo = device.jobs(["cuda", "triton"])
    assert len(todo) == len(set(todo))
    kinds = [kind(job) for job in todo]
    assert list(dict.fromkeys(kinds)) == [
        "bounded", "eager", "cuda by path", "noise, seeded", "triton by path", "velocity",
        "torch.compile",
    ]  # fmt: skip
    assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index)  # each kind is together
    times = {"microseconds": 1.0, "loss_and_grad_microseconds": 1.0}
    looked_at = ("bounded", "eager", "torch.compile")
    made = [device.row(job, times, copy=1e12) for job in todo if kind(job) in looked_at]
    assert not any("not measured" in line for line in device.bounds(made))
    assert {job.form for job in todo} == {"mean", "velocity", "noise", "seeded"}
    paths = {(job.contender, job.objective, job.path) for job in todo}
    assert ("triton", "article", "one_launch") in paths
    assert ("cuda", "paper", "cluster") in paths
    alone = {("triton", "rows"), ("cuda", "cluster")}
    assert not paths & {(backend, "article", path) for backend, path in alone}


def test_a_row_knows_its_share_of_the_copy():
    job = Job(device.LARGE.name, "bfloat16", "triton", "mean", "article")
    made = device.row(job, {"microseconds": 200.0}, copy=4e12)
    share = device.LARGE.numel / 200e-6 / 4e12
    assert made["share_of_copy"] == pytest.approx(12 * share)
    assert made["moved_share_of_copy"] == pytest.approx(18 * share)
    alone = device.row(job._replace(objective="paper"), {"microseconds": 200.0}, copy=4e12)
    assert alone["moved_share_of_copy"] == pytest.approx(12 * share)
    small = device.row(job._replace(workload=device.SMALL.name), {"microseconds": 9.0}, copy=4e12)
    assert small["moved_share_of_copy"] == small["share_of_copy"]
    assert f"{18 * share:.2f} moved" in device.line(made)
    assert "share_of_copy" not in device.row(job, {"microseconds": 200.0}, copy=None)
    failed = device.row(job, {"error": "RuntimeError: no"}, copy=4e12)
    assert "RuntimeError: no" in device.line(failed)
    assert "path" not in device.row(job._replace(contender="eager"), {}, None)


class FakeWorker:
    """Answers at once, or fails for the contenders it is told."""

    def __init__(self, failing=()):
        self.failing, self.asked = failing, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, job, seconds):
        assert 0 < seconds <= device.JOB_SECONDS.get(job.contender, 20)
        self.asked.append(job)
        if job.contender in self.failing:
            return {"error": "its process ended with -9"}
        if job.path in self.failing:
            return {"error": f"{device.isolated.HUNG} {seconds:.0f} s"}
        return {"bandwidth": 4e12} if job == COPIED else {"microseconds": 7.0}


def test_a_contender_that_only_fails_does_not_stop_the_others():
    todo = device.jobs(["cuda", "triton"])
    worker = FakeWorker(["cuda"])
    got = dict(device.measure_all(todo, worker, deadline=float("inf")))
    assert list(got) == todo
    failed = [answer for job, answer in got.items() if job.contender == "cuda"]
    assert all("ended with -9" in answer["error"] for answer in failed[:3])
    assert all("not tried" in answer["error"] for answer in failed[3:])
    assert sum(job.contender == "cuda" for job in worker.asked) == 3
    assert all("error" not in x for job, x in got.items() if job.contender != "cuda")


def test_what_hangs_once_is_not_tried_again():
    todo = device.jobs(["cuda", "triton"])
    worker = FakeWorker(["cooperative"])
    got = dict(device.measure_all(todo, worker, deadline=float("inf")))
    hung = [answer for job, answer in got.items() if job.path == "cooperative"]
    assert len(hung) == 8
    assert hung[0]["error"] == "no result within 20 s"
    assert all(a["error"] == "not tried: cuda hung by the path cooperative" for a in hung[1:])
    assert [job.path for job in worker.asked].count("cooperative") == 1
    assert all("error" not in answer for job, answer in got.items() if job.path != "cooperative")


def test_what_the_deadline_cut_off_has_not_hung():
    todo = [job for job in device.jobs(["cuda"]) if job.path == "cooperative"][:2]
    deadline = device.time.monotonic() + 5
    worker = FakeWorker(["cooperative"])
    answers = [a["error"] for _, a in device.measure_all(todo, worker, deadline)]
    assert answers == ["no result within 5 s"] * 2


def test_nothing_is_begun_after_the_deadline():
    assert list(device.measure_all(device.jobs(["triton"]), FakeWorker(), deadline=0.0)) == []


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A device that is not there; results go to a folder of the test's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake GPU")
    monkeypatch.setattr(device, "device_backends", lambda: ["cuda", "triton"])
    monkeypatch.setattr(device, "environment", lambda: {"device": "Fake GPU"})
    honest, kept = device.save, device.earlier
    monkeypatch.setattr(device, "save", lambda *given: honest(*given, folder=tmp_path))
    monkeypatch.setattr(device, "earlier", lambda *given: kept(*given, folder=tmp_path))
    return tmp_path


def test_every_number_is_saved_as_soon_as_it_is_there(machine, monkeypatch, capsys):
    class Interrupted(FakeWorker):
        def ask(self, job, seconds):
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().ask(job, seconds)

    (machine / "fake-gpu.json").write_text('{"ops": {"rows": []}}')
    monkeypatch.setattr(device.isolated, "Worker", lambda work: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        device.main([])
    saved = json.loads((machine / "fake-gpu.json").read_text())
    assert set(saved) == {"ops", "device"}
    assert len(saved["device"]["rows"]) == 2
    assert saved["device"]["environment"]["copy_gigabytes_per_second"] == 4000.0
    assert any("not measured" in line for line in saved["device"]["bounds_missed"])


def test_a_second_run_measures_what_the_first_has_not(machine, monkeypatch, capsys):
    workers = []

    class Short(FakeWorker):
        """Time for so many rows; one of them fails."""

        def ask(self, job, seconds):
            if len(self.asked) == 20:
                raise KeyboardInterrupt
            answer = super().ask(job, seconds)
            return {"error": "no"} if len(self.asked) == 5 and len(workers) == 1 else answer

    monkeypatch.setattr(
        device.isolated, "Worker", lambda work: workers.append(Short()) or workers[-1]
    )
    todo, out = device.jobs(["cuda", "triton"]), machine / "out" / "deep"
    for count in (19, 19 + 19 - 1):
        with pytest.raises(KeyboardInterrupt):
            device.main(["--out", str(out)])
        saved = results.load(machine)["fake-gpu"]["device"]["rows"]
        assert len(saved) == count
        assert json.loads((out / "fake-gpu.json").read_text()) == results.load(machine)["fake-gpu"]
    assert "18 of " in capsys.readouterr().out  # the row that failed is not kept
    first, second = (worker.asked[1:] for worker in workers)
    assert first == todo[:19]
    assert second[0] == first[3]
    assert second[1:] == todo[19 : 19 + 18]

    with pytest.raises(KeyboardInterrupt):
        device.main(["--again"])
    assert workers[-1].asked[1:] == todo[:19]
    monkeypatch.setattr(device, "environment", lambda: {"device": "Fake GPU", "sources": "other"})
    with pytest.raises(KeyboardInterrupt):
        device.main([])
    assert workers[-1].asked[1:] == todo[:19]


def test_failures_are_rows_and_the_status_says_what_is_missing(machine, monkeypatch, capsys):
    monkeypatch.setattr(device.isolated, "Worker", lambda work: FakeWorker(["eager"]))
    assert device.main([]) == device.MISSED
    saved = results.load(machine)["fake-gpu"]["device"]["rows"]
    assert {r["contender"] for r in saved if "error" in r} == {"eager"}
    assert len(saved) == len(device.jobs(["cuda", "triton"]))
    text = capsys.readouterr().out
    assert "FAILED its process ended with -9" in text
    assert "MISSED [1, 16, 16, 21, 60, 104] bf16 on triton: times eager not measured" in text


def test_when_the_time_is_up_it_says_how_much_is_missing(machine, monkeypatch, capsys):
    monkeypatch.setattr(device.isolated, "Worker", lambda work: FakeWorker())
    assert device.main(["--seconds", "0"]) == device.MISSED
    count = len(device.jobs(["cuda", "triton"]))
    assert f"{count} of {count} rows not measured: no time left" in capsys.readouterr().out


def test_a_job_is_measured_hot_and_cold_and_as_called(monkeypatch):
    """All that does not need a device: what is called how often on which tensors."""
    job = Job(device.SMALL.name, "bfloat16", "triton", "noise", "paper", "rows")
    made, called, paths = [], [], []
    variable = "GUARD_OPS_TRITON_PATH"
    monkeypatch.setattr(device.gpu_timing, "sets_beyond_cache", lambda nbytes: 3)
    monkeypatch.setattr(device, "rollout", lambda workload, dtype, seed: seed)
    monkeypatch.setattr(device.go, "use_backend", lambda name: device.nullcontext())

    def call_of(job, inputs):
        made.append(inputs)
        return lambda: called.append((inputs, paths.append(device.os.environ[variable])))

    monkeypatch.setattr(device, "call_of", call_of)
    monkeypatch.setattr(device.gpu_timing, "timed", lambda call: call() or 5e-5)
    times = {1: 1e-5, 3: 2e-5}
    monkeypatch.setattr(
        device.gpu_timing, "replayed", lambda calls: [c() for c in calls] and times[len(calls)]
    )
    answer = device.measured(job)
    assert answer == {
        "as_called_microseconds": pytest.approx(50),
        "microseconds": pytest.approx(10),
        "cold_microseconds": pytest.approx(20),
    }
    assert made == [0, 1, 2]
    assert [seed for seed, _ in called] == [0, 0, 0, 1, 2]
    assert set(paths) == {"rows"}
    assert variable not in device.os.environ


@pytest.mark.parametrize(
    "contender, form", [("reference", "mean"), ("reference", "seeded"), ("eager", "mean")]
)
@pytest.mark.parametrize("objective", device.OBJECTIVES)
def test_a_job_computes_the_loss_and_its_gradient(contender, form, objective, monkeypatch):
    """On the CPU, which is all that is made up here."""
    tiny = dataclasses.replace(device.SMALL, latent=(16, 8))
    monkeypatch.setitem(device.WORKLOADS, tiny.name, tiny)
    honest = contenders.make_inputs
    monkeypatch.setattr(
        device.contenders, "make_inputs", lambda *given, device, **more: honest(*given, **more)
    )
    monkeypatch.setattr(device.gpu_timing, "sets_beyond_cache", lambda nbytes: 2)
    monkeypatch.setattr(device.gpu_timing, "timed", lambda call: call() or 1e-6)
    monkeypatch.setattr(device.gpu_timing, "replayed", lambda calls: [c() for c in calls] and 1e-6)
    device.rollout.cache_clear()
    try:
        job = Job(tiny.name, "float32", contender, form, objective)
        assert "error" not in device.measured(job)
        gradients = [device.rollout(tiny.name, "float32", n).model_output.grad for n in range(2)]
    finally:
        device.rollout.cache_clear()
    assert all(grad.abs().max() > 0 for grad in gradients)
    assert not torch.equal(*gradients)


def test_what_was_measured_before_a_failure_is_kept(monkeypatch):
    job = Job(device.SMALL.name, "bfloat16", "eager", "mean", "paper")
    monkeypatch.setattr(device.gpu_timing, "sets_beyond_cache", lambda nbytes: 1)
    monkeypatch.setattr(device, "rollout", lambda *_: None)
    monkeypatch.setattr(device, "call_of", lambda *_: None)
    monkeypatch.setattr(device.gpu_timing, "timed", lambda call: 5e-5)

    def refused(calls):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(device.gpu_timing, "replayed", refused)
    answer = device.measured(job)
    assert answer["as_called_microseconds"] == pytest.approx(50)
    assert answer["error"] == "RuntimeError: operation not permitted"
    assert "microseconds" not in answer


def test_the_bounds_are_those_that_are_asked():
    assert {name: asked[:2] for name, asked in device_bounds.ASKED.items()} == OF
    assert device_bounds.TIMES == SLOW
