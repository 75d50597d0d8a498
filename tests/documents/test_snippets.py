"""Every Python snippet of the documents runs, or takes from guard_ops only what is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from typing import Any

import pages
import pytest
from given import NOT_RUN, given

SNIPPETS = [
    (page, fence)
    for page in pages.PAGES
    for fence in pages.fences(page)
    if fence.language == "python"
]
READ = {"guard_ops.integrations.diffusers"}  # read and not imported: diffusers takes seconds


def reason(page: Any, fence: pages.Fence) -> str | None:
    """Why a snippet is not run."""
    return fence.not_run or NOT_RUN.get(pages.name(page))


RUN = list(dict.fromkeys(page for page, fence in SNIPPETS if not reason(page, fence)))


@pytest.mark.parametrize("page", RUN, ids=pages.name)
def test_snippets_run_in_the_order_of_their_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = given(pages.name(page))
    for fence in (f for p, f in SNIPPETS if p == page and not reason(page, f)):
        # The file's own line numbers, so that a traceback points into the page.
        code = compile("\n" * (fence.line - 1) + fence.code, str(page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize(
    ("page", "fence"), SNIPPETS, ids=[f"{pages.name(p)}:{f.line}" for p, f in SNIPPETS]
)
def test_a_snippet_names_what_guard_ops_has(page, fence):
    assert problems(fence.code) == []


DIFFS = [
    (page, fence)
    for page in pages.PAGES
    for fence in pages.fences(page)
    if fence.language == "diff"
]


@pytest.mark.parametrize(
    ("page", "fence"), DIFFS, ids=[f"{pages.name(p)}:{f.line}" for p, f in DIFFS]
)
def test_a_diff_imports_what_guard_ops_has(page, fence):
    added = (line[1:].strip() for line in fence.code.splitlines() if line.startswith("+"))
    imports = [line for line in added if line.startswith(("from guard_ops", "import guard_ops"))]
    assert [found for line in imports for found in problems(line)] == []


def problems(code: str) -> list[str]:
    """What the code takes from guard_ops, or from an installed package, that is not there.

    Looked up are imports, attributes of modules, and the keywords of calls of what was found.
    """
    tree = ast.parse(code)
    known: dict[str, Any] = {}
    found: list[str] = []
    if not any(isinstance(node, ast.Import) and node.names[0].asname == "go"
               for node in ast.walk(tree)):  # fmt: skip
        known["go"] = importlib.import_module("guard_ops")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                module = _module(name.name, found)
                if module is not None:
                    first = importlib.import_module(name.name.split(".")[0])
                    known[name.asname or name.name.split(".")[0]] = module if name.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module in READ:
            found += [f"{node.module} has no {n.name}" for n in node.names
                      if n.name not in _written(node.module)]  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            module = _module(str(node.module), found)
            for name in node.names if module is not None else ():
                try:
                    known[name.asname or name.name] = _member(module, name.name)
                except AttributeError:
                    found.append(f"{node.module} has no {name.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolve(node, known, found)
        elif isinstance(node, ast.Call):
            function = _resolve(node.func, known, [])
            if function is not None and _ours(function):
                found += _bad_keywords(function, node)
    return found


def _module(name: str, found: list[str]) -> Any:
    """The module; None where it is not ours and not installed."""
    root = name.split(".")[0]
    if root != "guard_ops" and importlib.util.find_spec(root) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if root == "guard_ops" and getattr(error, "name", "") not in (None, name):
            return None  # what it needs is not installed
        found.append(f"no module {name}: {error}")
        return None


def _written(module: str) -> set[str]:
    """The classes and functions in a module's source."""
    path = pages.ROOT / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _member(module: Any, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        try:
            return importlib.import_module(f"{module.__name__}.{name}")
        except ImportError:
            raise AttributeError(name) from None


def _resolve(node: ast.expr, known: dict[str, Any], found: list[str]) -> Any:
    """The object that a dotted name means; None if that is not known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _resolve(node.value, known, found)
    if not (inspect.ismodule(owner) or inspect.isclass(owner)):
        return None
    try:
        return _member(owner, node.attr) if inspect.ismodule(owner) else getattr(owner, node.attr)
    except AttributeError:
        found.append(f"{owner.__name__} has no {node.attr}")
        return None


def _ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("guard_ops")


def _bad_keywords(function: Any, call: ast.Call) -> list[str]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [
        f"{function.__name__} has no {keyword.arg}="
        for keyword in call.keywords
        if keyword.arg and keyword.arg not in parameters
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import guard_ops as go\ngo.guard_los(v)", ["guard_ops has no guard_los"]),
        ("go.guard_loss(v, advantage=A)", ["guard_loss has no advantage="]),
        ("go.GuardConfig.article(clip=1)", []),  # takes **overrides
        ("go.SdeSchedule(s, noise=1)", ["SdeSchedule has no noise="]),
        ("from guard_ops.trainer import Trainr", ["guard_ops.trainer has no Trainr"]),
        ("from guard_ops.integrations.diffusers import FlowMatchSdeScheduler", []),
        (
            "from guard_ops.integrations.diffusers import A",
            ["guard_ops.integrations.diffusers has"],
        ),
        ("import guard_ops.nothing", ["no module guard_ops.nothing: "]),
        ("import no_such_framework.part", []),
        ("import torch\ntorch.randm(3)", ["torch has no randm"]),
        ("import guard_ops.integrations\nguard_ops.integrations.apply('x')", []),
    ],
)
def test_what_is_not_there_is_found(code, message):
    found = problems(code)
    assert len(found) == len(message)
    assert all(f.startswith(m) for f, m in zip(found, message, strict=True))
