"""What a stranger finds in the repository: two commands, pinned versions, a licence, a package that is complete."""

from __future__ import annotations

import os
import re
import tomllib
import zlib
from pathlib import Path

import pytest
import yaml
from tools.oldest_versions import oldest_versions

import fedmira

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
PINNED = dict(
    line.lower().replace("_", "-").split("==")
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def package_name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def test_everything_the_project_installs_is_pinned() -> None:
    optional = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(one for extra in optional for one in extra)]
    assert {package_name(one) for one in wanted} <= PINNED.keys()
    assert PINNED["torch"] == "2.13.0", "the release with a small CPU build"
    assert not [name for name in PINNED if name.startswith(("nvidia", "cuda", "triton"))]


def test_pinned_versions_satisfy_the_package() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    for line in PROJECT["project"]["dependencies"]:
        requirement = packaging.Requirement(line)
        pinned = PINNED[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pinned), f"{line} refuses {pinned}"


def test_the_oldest_versions_are_the_lower_bounds_of_the_package() -> None:
    oldest = {package_name(line): line.partition("==")[2] for line in oldest_versions()}
    assert {package_name(line) for line in PROJECT["project"]["dependencies"]} <= oldest.keys()
    assert (oldest["torch"], oldest["scipy"]) == ("2.6", "1.15")


def test_make_test_checks_everything_offline() -> None:
    recipe = MAKEFILE.split("\ncheck:")[1].split("\n\n")[0] + MAKEFILE.split("\ntest:")[1].split("\n\n")[0]
    for step in ("ruff format --check", "ruff check", "mypy", "lint-imports", "pytest"):
        assert step in recipe
    for variable in ("HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "HF_DATASETS_OFFLINE=1"):
        assert variable in MAKEFILE


def test_continuous_integration_calls_make_test() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    assert "chromium" in script.read_text(encoding="utf-8")


def test_licence_citation_and_changelog_agree() -> None:
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert len(licence) > 9000, "the whole text"
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    assert citation["version"] == PROJECT["project"]["version"] == fedmira.__version__
    assert {"cff-version", "title", "authors", "message"} <= citation.keys()
    assert f"## {fedmira.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_contributing_says_how_to_add_a_method_a_source_and_a_graph() -> None:
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"a **{thing}**" in guide for thing in ("method", "data source", "graph"))
    headings = re.findall(r"^## (.*)$", (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8"), re.M)
    assert {"A method", "A data source", "A graph"} <= set(headings)


def test_the_base_model_takes_less_than_16_megabytes_of_the_wheel() -> None:
    """A wheel is a zip: what counts is the compressed size."""
    files = [path for path in fedmira.embedded_base_path().rglob("*") if path.is_file()]
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 16_000_000


def test_files_keep_to_their_limits() -> None:
    """House rule: 500 lines a file, 90 a method."""
    package = REPOSITORY / "src" / "fedmira"
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in package.rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > 500} == {}
    methods = {path: lines for path, lines in lengths.items() if path.parent.name == "methods"}
    assert len(methods) >= 5
    assert {str(path): lines for path, lines in methods.items() if lines > 90} == {}


def test_nothing_executes_what_it_loads() -> None:
    """No pickle, no torch.load, no eval in the package."""
    forbidden = re.compile(
        r"\bimport pickle\b|\btorch\.(load|save)\b|\beval\(|\bexec\(|allow_pickle=True|trust_remote_code=True"
    )
    for path in (REPOSITORY / "src" / "fedmira").rglob("*.py"):
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if forbidden.search(line)]
        assert [line for line in found if ".eval()" not in line] == [], path
