"""Workflows, templates, citation and Dockerfile say what the Makefile and the package say."""

import re

import pages
import pytest

import guard_ops.version

yaml = pytest.importorskip("yaml")
GITHUB = pages.ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config")


def makefile_targets():
    text = (pages.ROOT / "Makefile").read_text().replace("\\\n", " ")
    return set(re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)[1].split())


def jobs(workflow):
    return yaml.safe_load(workflow.read_text())["jobs"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_of_the_makefile(workflow):
    called = set()
    for job in jobs(workflow).values():
        values = job.get("strategy", {}).get("matrix", {}).get("target", [])
        runs = " ; ".join(step["run"] for step in job["steps"] if "run" in step)
        runs = runs.replace("make ${{ matrix.target }}", "".join(f"make {v} ; " for v in values))
        called |= set(re.findall(r"\bmake (\S+)", runs))
    assert called
    assert called <= makefile_targets()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_reads_only_and_ends(workflow):
    """What may write is one job that says so; no job can hang for GitHub's six hours unasked."""
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(workflow).items():
        assert "timeout-minutes" in job or name == "publish", name
        assert "permissions" not in job or name == "publish", name


def test_the_makefile_lists_every_target():
    text = (pages.ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z][a-z -]*):(?![=:])", text, re.MULTILINE)
    assert {target for rule in rules for target in rule.split()} <= makefile_targets()


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"]
    assert content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text())
    assert citation["version"] == guard_ops.version.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    papers = re.findall(r"https://arxiv\.org/abs/[\d.]+", (pages.ROOT / "README.md").read_text())
    assert {reference["url"] for reference in citation["references"]} == set(papers)


def test_the_dockerfile_builds_with_the_tools_and_the_torch_of_the_makefile():
    docker, make = ((pages.ROOT / name).read_text() for name in ("Dockerfile", "Makefile"))
    assert re.search(r"ARG TORCH=(\S+)", docker)[1] == re.search(r"^TORCH \?= (\S+)", make, re.M)[1]
    tools = re.search(r'"setuptools.*$', make, re.MULTILINE)[0].split()
    assert all(tool in docker for tool in tools)
    image = re.search(r"ARG CUDA_IMAGE=(\S+)", docker)[1]
    assert image.startswith(re.search(r"ARG CUDA=(\S+)", docker)[1] + ".")
