"""CONTRIBUTING, CITATION, CHANGELOG and what GitHub and pre-commit read say what is so."""

from __future__ import annotations

import re

import pytest

from conftest import ROOT
from deq_phantom_plugin.cli import _parser

yaml = pytest.importorskip("yaml")


def pyproject(key: str) -> str:
    """A string of the project's table, read without a parser of TOML, which Python 3.10 lacks."""
    return re.search(rf'^{key} = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_the_citation_is_that_of_the_project():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["title"] == pyproject("name")
    assert str(found["version"]) == pyproject("version")
    assert found["license"] == pyproject("license")
    assert found["abstract"] == pyproject("description")
    (paper,) = found["references"]
    bibtex = (ROOT / "docs" / "index.md").read_text().partition("```bibtex")[2]
    assert f"{{{paper['title']}}}" in bibtex
    names = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert f"{{{names}}}" in bibtex
    # What version 1.2 of the format demands.
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert {"type", "title", "authors"} <= paper.keys()


def test_the_changelog_has_this_version():
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "Unreleased"
    assert pyproject("version") in heads


def test_contributing_names_every_target_and_none_that_is_not():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    told = set(re.findall(r"make ([a-z][\w-]*)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert told <= targets
    parts = {name for name in targets if name.startswith("test-peers-")}
    assert targets - parts - {"bench-silva", "docs-links", "clean"} == told


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_they_name_are_there(name):
    text = (ROOT / name).read_text()
    paths = re.findall(r"\]\(([^)#:]+)\)", text)
    paths += [p for p in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if not p.startswith(".hosts")]
    assert paths
    for path in paths:
        assert any((base / path).exists() for base in (ROOT, ROOT / "deq_phantom_plugin")), path


def test_pre_commit_runs_the_ruff_that_is_pinned():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo for repo in repos if "ruff" in repo["repo"]]
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert ruff["rev"] == f"v{pinned}"
    hooks = [hook["id"] for repo in repos for hook in repo["hooks"]]
    assert hooks == ["ruff-check", "ruff-format", "mypy"]


def test_the_issue_template_asks_for_what_the_command_prints():
    path = ROOT / ".github" / "ISSUE_TEMPLATE" / "wrong_gradient.yml"
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert fields["doctor"]["validations"]["required"] is True
    label = fields["doctor"]["attributes"]["label"]
    command = re.search(r"`deq-phantom (.+)`", label)[1].split()
    assert _parser().parse_args(command).report is True
