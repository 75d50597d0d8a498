"""The fuzzer's summary: how many cases of each area each contender ran, and who is absent."""

from __future__ import annotations

from collections import Counter
import sys
from pathlib import Path

import pytest
from contenders import absent
from tally import CASES, taken

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # its tiny policy


@pytest.fixture(autouse=True)
def _counted(request):
    yield
    request.node.user_properties.append(("fuzz", taken()))


def pytest_terminal_summary(terminalreporter):
    counts: Counter[tuple[str, str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, value in report.user_properties:
                    for *key, n in value if name == "fuzz" else ():
                        counts[tuple(key)] += n
    if not counts:
        return
    terminalreporter.section("fuzz" if CASES else "fuzz: the same cases every time; make fuzz for more")
    for area in dict.fromkeys(area for area, _, _ in counts):
        parts = []
        for contender in dict.fromkeys(c for a, c, _ in counts if a == area):
            decided, undecided = (counts[area, contender, x] for x in ("cases", "undecided"))
            parts.append(f"{contender} {decided}" + (f" (+{undecided} undecided)" if undecided else ""))
        terminalreporter.write_line(f"{area}: {', '.join(parts)}")
