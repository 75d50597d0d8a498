"""examples/minimal_grpo.py learns, and the notebook is the same with pictures."""

import ast
import importlib.util
import json
import statistics

import pages
import pytest
import torch

SCRIPT = pages.ROOT / "examples" / "minimal_grpo.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("minimal_grpo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def code(cells):
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow_suite  # twenty seconds
def test_the_reward_rises(example, capsys):
    """From below -0.5 (a ring that ignores its prompt) by more than 0.5; 1 is the most."""
    torch.manual_seed(0)
    flow = example.Flow()
    example.pretrain(flow, updates=200)
    history = example.train(flow, iterations=15, learning_rate=2e-3)
    first, last = (statistics.fmean(p.reward for p in part) for part in (history[:2], history[-2:]))
    assert first < -0.5
    assert last > first + 0.5
    assert "iteration  14" in capsys.readouterr().out


def test_the_second_update_is_what_the_bound_on_the_norm_is_for(example):
    """On policy nothing is divided by the ratio's spread; afterwards it is, by 0.001 to 0.02."""
    torch.manual_seed(0)
    flow = example.Flow()
    (only,) = example.train(flow, iterations=1)
    first, second = only.grad_norms
    assert second > 10 * first


def test_the_loop_is_short():
    functions = {n.name: n for n in ast.parse(SCRIPT.read_text()).body if hasattr(n, "name")}
    loop = functions["train"]
    assert loop.end_lineno - loop.lineno < 60


def test_the_notebook_has_the_scripts_code(cells):
    """Every definition of the script is a cell, to the letter."""
    text = SCRIPT.read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name != "main":
            definition = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            assert definition in code(cells), node.name


def test_the_notebook_is_kept_with_its_pictures(cells):
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.slow_suite  # twenty seconds
def test_the_notebook_runs(cells):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    namespace = {"__name__": "__main__"}
    try:
        for number, source in enumerate(code(cells)):
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
        history = namespace["history"]
        assert history[0].reward < -0.5
        assert history[-1].reward > 0.9
        assert len(matplotlib.pyplot.get_fignums()) == 4
    finally:
        matplotlib.pyplot.close("all")
