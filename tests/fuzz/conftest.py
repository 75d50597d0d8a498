"""The fuzzer's summary: how many cases each area had, who ran them, and who is absent."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tally import ASKED, taken

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # its tiny policy


@pytest.fixture(autouse=True)
def _counted(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the machine is shared with other workers
    yield
    torch.set_num_threads(threads)
    request.node.user_properties.append(("fuzz", taken()))


def pytest_terminal_summary(terminalreporter, config):
    counts: Counter[tuple[str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, value in report.user_properties:
                    for area, what, n in value if name == "fuzz" else ():
                        counts[area, what] += n
    if not counts:
        return
    missing = [name for area, name in counts if area == "absent"]
    areas = dict.fromkeys(area for area, _ in counts if area != "absent")
    whole = sum(counts[area, x] for area in areas for x in ("cases", "undecided"))
    source = f"seed {config.getoption('hypothesis_seed')}" if ASKED else "the same ones every time"
    terminalreporter.section(f"fuzz: {whole} cases, {source}")
    for area in areas:
        ran = [f"{name} {n}" for (a, name), n in counts.items() if a == area and name != "cases"]
        terminalreporter.write_line(f"{area}: {counts[area, 'cases']}; {', '.join(ran)}")
    if missing:
        terminalreporter.write_line(f"did not run: {', '.join(sorted(missing))}")
