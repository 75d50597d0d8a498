"""``pytest benchmarks``: two threads, tables at the end, ``--save-results`` to keep the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import report, results

THREADS = 2
SHOWN = {section: table for place in report.PLACES.values() for section, table in place}
Measured = dict[tuple[str, str], list[results.Row]]  # (section, device)
MEASURED = pytest.StashKey[Measured]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help="write what is measured to benchmarks/results/ (then run python -m benchmarks.report)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}
    config.option.showcapture = "no"  # torch.compile logs hundreds of lines


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(section, row, device="cpu")`` keeps a row of one of the report's sections."""
    measured = request.config.stash[MEASURED]

    def keep(section: str, row: results.Row, device: str = "cpu") -> None:
        measured.setdefault((section, device), []).append(row)

    return keep


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for (section, device), rows in config.stash[MEASURED].items():
        terminalreporter.section(section)
        terminalreporter.write_line(SHOWN[section](rows))
        if config.getoption("--save-results"):
            results.save(section, rows, device=device)
