"""Saved numbers and the tables made from them."""

import json

import pytest
from matplotlib.image import imread

from benchmarks import console, report, results, tables

CASE = {"case": "mean form, fp32", "spread": 0.1, "noise": 0.05, "rounds": 60, "shape": [8, 64]}
TIMES = {"guard_ops": (1.0, 1.0), "eager": (15.0, 15.2), "memory copy": (1.02, 1.03)}
SPEED = [
    {**CASE, "contender": name, "milliseconds": ms, "times_ours": ratio}
    for name, (ms, ratio) in TIMES.items()
]
MEMORY = [
    {
        "case": CASE["case"],
        "peak_bytes": 8 * 2**20,
        "eager_peak_bytes": 64 * 2**20,
        "bytes_per_element": 20,
        "eager_operators": 117,
        "eager_whole_latent_operators": 27,
        "eager_bytes_per_element": 220,
    }
]
ACCURACY = [
    {"contender": "plain", "dtype": "float32", "drift": drift, "max_error": 0.25,
     "wrong_clips": 4, "batch": 32, "log_ratio_error": 1e-3,
     "wrong_share": {"2e-6": 0.0, "1e-4": 0.03125, "0.2": 0.125}}
    for drift in (1e-3, 1e-4)
]  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "docs").mkdir()
    for section, rows in (
        ("speed", SPEED),
        ("memory", MEMORY),
        ("accuracy", ACCURACY),
        ("workloads", WORKLOADS),
        ("ops", OPS),
        ("share", SHARE),
    ):
        results.save(section, rows, tmp_path / "results")
    return tmp_path


def kernel(contender, form, milliseconds, ratio, dtype="float32", **more):
    return {
        "case": f"{more.get('stage', 'both')} {dtype}", "workload": "flux_512",
        "shape": [2, 3, 8, 64], "recipe_shape": [5, 3, 8, 64], "op": "guard_loss",
        "stage": "both", "form": form, "objective": "flow_grpo", "dtype": dtype,
        "contender": contender, "base": ratio == 1,
        "milliseconds": milliseconds, "spread": 0.1, "ratio": ratio, "noise": 0.05, "scatter": 0.04,
        "rounds": 6, "floor_bytes": 20 * 3072, "gigabytes_per_second": 20.0,
        "percent_of_copy": 91.6, "peak_bytes": 2**20, **more,
    }  # fmt: skip


WORKLOADS = [
    kernel(contender, form, ms, ratio, dtype)
    for dtype in ("float32", "bfloat16")
    for contender, form, ms, ratio in (
        ("cpu", "mean", 0.4, 1),
        ("reference", "mean", 8.0, 20.0),
        ("cpu", "noise", 0.39, 0.97),
        ("eager", "log-prob", 6.0, 15.1),
        ("memory copy", "-", 0.3, 0.76),
    )
    if (contender, dtype) != ("eager", "bfloat16")
]
OPS = [
    kernel("cpu", "mean", 0.4, 1),
    kernel("memory copy", "-", 0.3, 0.75),
    kernel("cpu", "mean", 0.001, 1, stage="backward", floor_bytes=0, peak_bytes=None),
]
SHARE = [
    {
        "model": "SD3.5-M", "shape": [1, 2, 16, 32, 32], "parameters": 4, "full_parameters": 400,
        "note": "all 24 layers", "noise": 0.02, "step_before_ms": 101.0, "loss_before_ms": 1.0,
        "step_after_ms": 100.1, "loss_after_ms": 0.1, "peak_before_bytes": 2**27,
        "peak_after_bytes": 2**26, "loss_peak_before_bytes": 2**20, "loss_peak_after_bytes": 2**17,
    },
    {"model": "FLUX.1-dev", "skipped": "diffusers is not installed"},
]  # fmt: skip


def run(repository, *arguments):
    return report.main(arguments, root=repository, saved=repository / "results")


def marked(name):
    return f"before\n<!-- begin:{name} -->\nold\n<!-- end:{name} -->\nafter\n"


def test_a_section_is_saved_beside_the_others(tmp_path):
    results.save("speed", SPEED, tmp_path)
    results.save("accuracy", ACCURACY, tmp_path)
    path = results.save("speed", SPEED[:1], tmp_path)
    saved = json.loads(path.read_text())
    assert path.name == f"{results.machine_label()}.json"
    assert saved["speed"]["rows"] == SPEED[:1]
    assert saved["accuracy"]["rows"] == ACCURACY
    assert saved["speed"]["environment"]["torch"]


def test_tables_show_the_saved_numbers(repository):
    tables = report.render(results.load(repository / "results"))
    assert "| mean form, fp32 | 1.00 ms | 15.00 ms (15.2x) | 1.02 ms (tie) |" in tables["speed"]
    assert "| mean form, fp32 | 20 | 220 | 27 of 117 | 8.0 MiB | 64.0 MiB |" in tables["speed"]
    assert "| float32 | 1e-03 | 2.5e-01 (4) |" in tables["accuracy"]


@pytest.fixture
def no_plots(monkeypatch):
    """Tables alone: drawing takes seconds."""
    monkeypatch.setattr(report.plots, "draw", lambda *_: [])


def test_only_what_is_between_the_markers_changes(repository, no_plots, capsys):
    document = repository / "docs" / "benchmarks.md"
    document.write_text(marked("speed") + marked("accuracy"))
    assert run(repository, "--check") == 1
    assert document.read_text() == marked("speed") + marked("accuracy")
    assert run(repository) == 0
    text = document.read_text()
    assert text.count("before\n") == text.count("after\n") == 2
    assert "old" not in text
    assert "15.2x" in text
    assert run(repository, "--check") == 0
    output = capsys.readouterr().out
    assert "docs/benchmarks.md: out of date; run python -m benchmarks.report" in output
    assert "README.md: absent, skipped" in output


def test_every_document_with_the_markers_gets_the_table(repository, no_plots):
    (repository / "README.md").write_text(marked("speed"))
    (repository / "docs" / "benchmarks.md").write_text("no markers\n")
    run(repository)
    assert "15.2x" in (repository / "README.md").read_text()
    assert (repository / "docs" / "benchmarks.md").read_text() == "no markers\n"


def test_a_marker_without_its_other_half_is_refused():
    with pytest.raises(ValueError, match="must both be in the document or neither"):
        report.fill("<!-- begin:speed -->", {"speed": "x"})


def test_without_results_the_table_says_so():
    rendered = report.render({})
    assert rendered.pop("machines").startswith("No saved results. GPU results are missing")
    assert set(rendered.values()) == {"No saved results."}


def test_missing_gpu_results_are_said_to_be_missing(repository):
    saved = results.load(repository / "results")
    (label,) = saved
    text = report.render(saved)["machines"]
    assert text == f"Results of: {label}. GPU results are missing: none has been measured."
    saved["h100"] = {"ops": {"environment": {"device": "NVIDIA H100"}, "rows": OPS}}
    assert report._machines(saved) == f"Results of: {label}, h100."


def test_a_gpu_check_is_a_table_with_its_failures_and_what_is_not_as_asked():
    base = {"workload": "sd35_512_step", "shape": [1, 8, 16, 64, 64], "dtype": "bfloat16"}
    base |= {"form": "mean", "objective": "article"}
    ours = {"path": "chosen", "microseconds": 9.04, "cold_microseconds": 11.0, "ran": "cluster"}
    ours |= {"loss_and_grad_microseconds": 7.04, "share_of_copy": 0.3, "moved_share_of_copy": 0.45}
    rows = [
        {**base, "contender": "cuda", **ours, "as_called_microseconds": 60.0},
        {**base, "contender": "eager", "error": "RuntimeError: a|b"},
    ]
    machine = {
        "environment": {
            "device": "NVIDIA H100", "cpu": "x", "cores": 16, "threads": 16, "isa": "avx512",
            "driver": "580", "triton": "3.6.0", "torch": "2.11", "commit": "abc", "date": "today",
            "copy_gigabytes_per_second": 2800.0,
        },
        "rows": rows,
    }  # fmt: skip
    text = report.render({"h100": {"device": machine}})["device"]
    assert "**h100**: NVIDIA H100, driver 580, triton 3.6.0, a copy 2800 GB/s, torch 2.11" in text
    assert "(`make gpu-check`)" in text
    assert "**[1, 8, 16, 64, 64], bfloat16**" in text
    times = "9.0 us | 7.0 us | 11.0 us | 60.0 us"
    assert f"| cuda | mean | article | chosen: cluster | {times} | 30% | 45% |" in text
    assert "| eager | mean | article |  | failed: RuntimeError: a/b |  |  |  |  |  |" in text
    missing = "[1, 16, 16, 21, 60, 104] bf16 on cuda, article, one pass: share of a copy not"
    assert f"- Not as asked: {missing} measured" in text
    assert "triton" not in text.partition("Not as asked")[2]


def test_a_workload_is_a_table_of_contenders(repository):
    text = report.render(results.load(repository / "results"))["workloads"]
    assert "**flux_512, latents [2, 3, 8, 64], flow_grpo**" in text
    assert "| cpu, mean form | 0.4 ms | 1 | 92% | 1.0 MiB | 0.4 ms | 1 | 92% | 1.0 MiB |" in text
    assert "| eager | 6 ms | 15.1x | 92% | 1.0 MiB |  |  |  |  |" in text
    assert "| cpu, noise form | 0.39 ms | tie |" in text  # 3 % apart, noise 5 %
    assert "Shrunk to this machine's budget: the recipe trains [5, 3, 8, 64]." in text
    label = results.machine_label()
    assert f"![speed up, {label}](benchmarks/{label}-speed_up.svg)" in text


def test_an_op_shows_its_bytes_and_what_is_left_of_a_backward(repository):
    text = report.render(results.load(repository / "results"))["ops"]
    assert "**guard_loss, float32, latents [2, 3, 8, 64]**" in text
    assert "| both, mean, flow_grpo | 0.4 ms | 20 | 92% | 1.0 MiB |" in text
    assert "| backward, mean, flow_grpo | 0.001 ms | none left |  |  |" in text


def test_rows_of_a_gpu_show_its_own_time_too():
    more = {"gpu_milliseconds": 0.2, "gpu_percent_of_copy": 88.0}
    on_gpu = [{**row, **more} if row["contender"] == "cpu" else row for row in WORKLOADS]
    text = report.markdown("workloads")(on_gpu)
    assert "| contender | float32 | times | GPU time | of copy | peak memory |" in text
    assert "| cpu, mean form | 0.4 ms | 1 | 0.2 ms | 88% | 1.0 MiB |" in text
    assert "| eager | 6 ms | 15.1x |  | 92% | 1.0 MiB |  |  |  |  |  |" in text
    text = report.markdown("ops")([{**row, **more} for row in OPS])
    assert "| both, mean, flow_grpo | 0.4 ms | 0.2 ms | 20 | 88% | 1.0 MiB |" in text


def test_accuracy_details_show_every_clip(repository):
    text = report.render(results.load(repository / "results"))["accuracy_details"]
    assert "share of 32 clip decisions that are wrong, at 2e-6, 1e-4, 0.2" in text
    assert "| float32 | 1e-03 | 0%, 3%, 12% |" in text


def test_share_of_a_step_is_measured_and_estimated_and_a_skip_says_why(repository):
    text = report.render(results.load(repository / "results"))["share"]
    assert "1 of 101 ms (0.99%)" in text
    assert "0.1 of 100 ms (0.10%)" in text
    assert "| 1.0 -> 0.1 MiB | 128.0 -> 64.0 MiB |" in text
    # 100 times the parameters: 1 ms of 10,001 ms, 0.1 of 10,000.1
    assert "about 0.01% -> about 0.001%" in text
    assert "FLUX.1-dev: skipped, diffusers is not installed." in text


def test_the_report_draws_every_plot_as_png_and_svg(repository):
    run(repository)
    folder, label = repository / "docs" / "benchmarks", results.machine_label()
    assert {path.name for path in folder.iterdir()} == {
        f"{label}-{name}.{kind}"
        for name in ("roofline", "speed_up", "accuracy")
        for kind in ("png", "svg")
    }
    for path in folder.glob("*.png"):
        height, width, _ = imread(path).shape
        assert width >= 1000
        assert height >= 600
    roofline = (folder / f"{label}-roofline.svg").read_text()
    assert all(name in roofline for name in ("cpu, mean form", "plain PyTorch", "memory copy"))
    run(repository)  # the same numbers give the same file
    assert (folder / f"{label}-roofline.svg").read_text() == roofline


def test_the_terminal_shows_every_section(repository, capsys):
    (machine,) = results.load(repository / "results").values()
    console.show({name: machine[name] for name in tables.TABLES})
    text = capsys.readouterr().out
    assert "flux_512, latents [2, 3, 8, 64], flow_grpo" in text
    assert "15.1x" in text
    assert "none left" in text
    assert "skipped, diffusers is not installed" in text
    assert max(map(len, text.splitlines())) <= console.WIDTH
