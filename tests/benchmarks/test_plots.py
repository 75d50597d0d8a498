"""What the pictures show of the saved numbers."""

import itertools

import pytest

from benchmarks import plots

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


def row(contender, ratio, dtype="float32", form="mean", **more):
    return {
        "contender": contender, "ratio": ratio, "dtype": dtype, "form": form,
        "workload": "flux_512", "floor_bytes": 2**24, "gigabytes_per_second": 1 / ratio, **more,
    }  # fmt: skip


ROWS = [
    row("cpu", 1.0),
    row("reference", 16.0),
    row("eager", 12.0, form=plots.CHAIN_FORM),
    row("torch.compile", 3.0, form=plots.CHAIN_FORM),
    row(plots.COPY, 0.5),
]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_a_longer_bar_is_faster():
    """Plain PyTorch takes 12 times as long as guard_ops, and 4 times as long as torch.compile."""
    axes = plots.speed_up(pyplot, ROWS).axes[0]
    widths = {c.get_label(): c.patches[0].get_width() for c in axes.containers}
    assert widths == {"guard_ops cpu": 12.0, "torch.compile": 4.0}
    assert "plain PyTorch" in labels(axes)  # the line at 1
    assert "longer is faster" in axes.get_xlabel()


def test_a_dtype_without_torch_compile_says_so():
    rows = [*ROWS, *(r | {"dtype": "bfloat16"} for r in ROWS if r["contender"] != "torch.compile")]
    wide, narrow = plots.speed_up(pyplot, rows).axes
    assert [text.get_text() for text in wide.texts if "only" in text.get_text()] == []
    assert [text.get_text() for text in narrow.texts][
        -1
    ] == "torch.compile is raced in float32 only"


def test_a_memory_copy_is_a_roof_of_each_workload_and_no_line():
    (axes,) = plots.roofline(pyplot, ROWS).axes
    assert not axes.lines
    assert axes.get_xticklabels()[0].get_text() == "FLUX.1-dev\n512\n(16 MiB)"
    assert labels(axes)[0] == "memory copy: the roof"


def accuracy(wrong):
    return [
        {"contender": contender, "dtype": dtype, "drift": drift, "log_ratio_error": 1e-3,
         "wrong_share": dict(zip(("2e-6", "1e-4", "0.2"), wrong, strict=True))}
        for contender, dtype, drift in itertools.product(
            ("plain PyTorch", "guard_ops, mean form"), ("float32", "bfloat16"), (1e-4, 1e-3))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "panels", "said"),
    [
        ((0, 0, 0.25), 4, ["at clip 2e-6 and 1e-4: none of anybody's is wrong"]),
        ((0.1, 0.1, 0.1), 8, []),
        ((0, 0, 0), 2, ["at clip 2e-6 and 1e-4 and 0.2: none of anybody's is wrong"]),
    ],
    ids=["one", "all", "none"],
)
def test_no_panel_is_flat_zero(wrong, panels, said):
    figure = plots.accuracy_over_drift(pyplot, accuracy(wrong))
    assert len(figure.axes) == panels
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == said


def test_a_contender_has_one_colour():
    colours = list(plots.COLOURS.values())
    assert len(set(colours)) == len(colours)
    assert plots.FORM_LOOKS["plain PyTorch"][1] == plots.COLOURS["eager"]
    assert plots.FORM_LOOKS["guard_ops, velocity form"][1] == plots.COLOURS["cpu"]
