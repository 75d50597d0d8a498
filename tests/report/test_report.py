"""The report of runs: what it says, that it asks no network, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs guard-ops[report]")
pytest.importorskip("scipy", reason="needs guard-ops[report]")
safetensors = pytest.importorskip("safetensors.torch")

from guard_ops import cli  # noqa: E402
from guard_ops.report import figures  # noqa: E402
from guard_ops.report.page import page, write_report  # noqa: E402
from guard_ops.report.runs import groups_of, read_run  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "img", "input", "br"}


def run_folder(root: Path, name: str, *, seed: int = 0, falls: bool = False, **keys: str) -> Path:
    """A run of 6 iterations with a monitor, pictures, ratios and a recipe, as trainers write it."""
    folder = root / name
    (folder / "pictures").mkdir(parents=True)
    (folder / "ratios").mkdir()
    dice = torch.Generator().manual_seed(seed)
    golds = [0.5 + 0.01 * n - (0.2 if falls and n > 3 else 0) for n in range(7)]
    lines, readings = [], []
    for n in range(7):
        gold = (golds[n] + 0.01 * torch.randn(20, generator=dice)).tolist()
        readings.append({"iteration": n, "proxy": float(n), "gold": gold, "diversity": 3.0})
        steps = [0.01 * (k + 1) for k in range(4)]
        lines.append(
            {"iteration": n, "reward": n + 0.1 * seed, "gold": golds[n], "loss": 0.0,
             "reward_part/<b>": 1.0, "clip_fraction_high": steps, "ratio_std": steps,
             "grad_norm": None}
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[1:]))
    (folder / "monitor.jsonl").write_text("".join(json.dumps(x) + "\n" for x in readings))
    recipe = {"kind": "digits", "out": str(folder), "seed": seed, "objective": "article", **keys}
    (folder / "recipe.yaml").write_text("".join(f"{k}: {v}\n" for k, v in recipe.items()))
    image = pytest.importorskip("PIL.Image")
    for n in (3, 6):
        image.new("RGB", (16, 16), (40 * n, 0, 0)).save(
            folder / "pictures" / f"iteration-{n:06d}.png"
        )
        ratio = {
            "log_ratio": 1e-3 * torch.randn(4, 12, generator=dice),
            "excess": torch.randn(4, 12),
        }
        ratio["excess"][0, 0] = float("nan")
        safetensors.save_file(ratio, folder / "ratios" / f"iteration-{n:06d}.safetensors")
    return folder


class Checked(HTMLParser):
    """Tags that close, ids that are of one element, and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_a_runs_page_says_what_happened_and_asks_no_network(tmp_path):
    folder = run_folder(tmp_path, "a <b>run", falls=True)
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    found = Checked(text)
    assert len(set(found.ids)) == len(found.ids)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in found.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    said = " ".join(found.text)
    assert "Over-optimizing since iteration 4: gold is 0.1" in said
    for title in (
        "Reward", "Gold", "Reward: part/<b>", "Above the clip range", "Spread of the raw ratio",
        "Samples: a <b>run", "Ratios by step: a <b>run", "Before RatioNorm: r - 1",
    ):  # fmt: skip
        assert title in found.text
    assert "Gradient norm" not in found.text  # there is none
    assert f"guard-ops train {folder}/recipe.yaml out={folder}-again" in said
    assert "objective: article" in said
    assert text.count("<img data-iteration") == 2


def test_runs_of_one_setting_are_seeds_and_others_are_compared(tmp_path):
    runs = [
        read_run(run_folder(tmp_path, f"{o}-{s}", seed=s, objective=o))
        for o in ("article", "paper")
        for s in (0, 1)
    ]
    groups = groups_of(runs)
    assert [group.label for group in groups] == ["objective article", "objective paper"]
    assert [len(group.runs) for group in groups] == [2, 2]
    text = page(runs)
    Checked(text)
    assert "Over seeds: mean and 95 % t interval." in text
    assert [g.label for g in groups_of(runs[:1])] == ["article-0"]


def test_the_interval_is_students(tmp_path):
    from scipy import stats

    row = [1.0, 2.0, 4.0]
    mean, error = sum(row) / 3, torch.tensor(row).std() / 3**0.5
    low, high = stats.t.interval(0.95, 2, loc=mean, scale=float(error))
    assert figures._half_width(row) == pytest.approx((high - low) / 2, rel=1e-6)
    assert figures._half_width([1.0]) == 0


def test_a_run_that_has_little_is_shown_as_far_as_it_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "reward": 2.0, "loss": null}\n')
    write_report([tmp_path], tmp_path / "new" / "page.html")
    found = Checked((tmp_path / "new" / "page.html").read_text())
    assert "No monitor: gold=... turns it on." in found.text
    assert "The folder does not say." in found.text


@pytest.mark.parametrize(
    "files, words, message",
    [
        ({}, ["run"], "`run` is '{0}/run', which has no metrics.jsonl"),
        ({"metrics.jsonl": ""}, ["run"], "metrics.jsonl is empty; the run has finished no"),
        ({"metrics.jsonl": "{"}, ["run"], "metrics.jsonl cannot be read: "),
        (
            {"metrics.jsonl": '{"iteration": 1}\n', "monitor.jsonl": "{}\n"}, ["run"],
            "monitor.jsonl cannot be read: 'iteration'",
        ),
        ({"metrics.jsonl": '{"iteration": 1}\n'}, ["run", "run"], "`--out` is not given; a report"),
        (
            {"metrics.jsonl": '{"iteration": 1}\n'}, ["run", "run", "--out", "page.html"],
            "`run` has a folder twice",
        ),
        ({"metrics.jsonl": '{"iteration": 1}\n'}, ["run", "--out", "."], "which is a folder; it"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line(files, words, message, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    given = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    assert cli.main(["report", *given]) == 1
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_a_browser_shows_it_at_every_width(tmp_path):
    """Its script has run, and nothing is wider than the window, inside frames of three widths."""
    widths = (360, 800, 1400)
    file = write_report([run_folder(tmp_path, "run", falls=True)], tmp_path / "report.html")
    measure = (
        "<script>addEventListener('load', () => { const film = document.querySelector('.film');"
        "const slider = film.querySelector('input'); slider.value = 0;"
        "slider.dispatchEvent(new Event('input'));"
        "const shown = [...film.querySelectorAll('img')].filter((x) => x.offsetWidth > 0);"
        "parent.postMessage([document.documentElement.dataset.ready,"
        "document.documentElement.scrollWidth - innerWidth, innerWidth, shown.length,"
        "film.querySelector('output').textContent, shown[0].naturalWidth].join(' | '), '*'); });"
        "</script></body>"
    )
    text = file.read_text().replace("</body>", measure)
    quoted = text.replace("&", "&amp;").replace('"', "&quot;")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>addEventListener('message', (e) => { "
        "const said = document.createElement('p'); said.textContent = 'said: ' + e.data; "
        "document.body.append(said); });</script>"
        + "".join(
            f'<iframe width="{width}" height="900" style="border:0" srcdoc="{quoted}"></iframe>'
            for width in widths
        )
    )
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
         "--window-size=1600,1000", outer.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    said = [x.split(" | ") for x in re.findall(r"<p>said: (.*?)</p>", found)]
    assert sorted(int(inner) for _, _, inner, *_ in said) == list(widths)
    for ready, over, _, *film in said:
        assert ready == "yes"
        assert int(over) <= 0
        assert film == ["1", "iteration 3", "16"]  # one picture, that to which the slider moved
