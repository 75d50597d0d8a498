"""What CI installs: all that pyproject.toml asks for, in a version that it allows, by hash."""

import itertools
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).parents[1]


def pinned(name="requirements.txt"):
    """(requirement, number of hashes) of each entry."""
    text = (ROOT / ".ci" / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [(Requirement(line.split("--hash")[0]), line.count("--hash=sha256:")) for line in lines]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", ["requirements.txt", "docs.txt"])
def test_every_entry_is_one_version_with_its_hashes(name):
    for requirement, hashes in pinned(name):
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        assert hashes, requirement


def test_whatever_is_asked_for_is_pinned_and_allowed():
    """If this fails after a change of pyproject.toml: python scripts/lock.py."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [*project["build-system"]["requires"], *itertools.chain(*extras.values())]
    locked = {}
    for requirement, _ in (*pinned(), *pinned("docs.txt")):
        locked.setdefault(normal(requirement.name), []).append(requirement)
    for requirement in map(Requirement, asked):
        if requirement.name == "guard-ops":  # its own extras
            continue
        versions = [s.version for r in locked[normal(requirement.name)] for s in r.specifier]
        assert all(requirement.specifier.contains(v) for v in versions), (requirement, versions)


@pytest.mark.parametrize("name", ["requirements.txt", "docs.txt"])
def test_torch_comes_from_elsewhere(name):
    """Its file depends on CUDA, and its libraries would be gigabytes that no CPU has a use for."""
    names = {normal(requirement.name) for requirement, _ in pinned(name)}
    assert "torch" not in names
    assert not [name for name in names if name.startswith("nvidia-")]


def test_a_build_gets_the_same_versions():
    everything = {str(requirement) for requirement, _ in pinned()}
    tools = [requirement for requirement, hashes in pinned("build.txt") if hashes]
    assert {"cmake", "ninja", "pybind11", "setuptools"} <= {r.name for r in tools}
    assert {str(requirement) for requirement in tools} <= everything


def test_a_package_that_cannot_be_looked_up_fails_the_audit():
    (audit,) = re.findall(r"^\t.*/pip-audit (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--strict" in audit.split()
