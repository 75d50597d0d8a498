"""Saved numbers and the tables made from them."""

import json

import pytest

from benchmarks import report, results

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
     "wrong_clips": 4, "batch": 32}
    for drift in (1e-3, 1e-4)
]  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "docs").mkdir()
    for section, rows in (("speed", SPEED), ("memory", MEMORY), ("accuracy", ACCURACY)):
        results.save(section, rows, tmp_path / "results")
    return tmp_path


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


def test_only_what_is_between_the_markers_changes(repository, capsys):
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


def test_every_document_with_the_markers_gets_the_table(repository):
    (repository / "README.md").write_text(marked("speed"))
    (repository / "docs" / "benchmarks.md").write_text("no markers\n")
    run(repository)
    assert "15.2x" in (repository / "README.md").read_text()
    assert (repository / "docs" / "benchmarks.md").read_text() == "no markers\n"


def test_a_marker_without_its_other_half_is_refused():
    with pytest.raises(ValueError, match="must both be in the document or neither"):
        report.fill("<!-- begin:speed -->", {"speed": "x"})


def test_without_results_the_table_says_so():
    assert report.render({}) == {"speed": "No saved results.", "accuracy": "No saved results."}
