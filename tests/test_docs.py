"""The docs are executed: code blocks run, the generated page is current, what is named exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
import torch
from pydantic import BaseModel
from tests.tools import tool

import fedmira.config.data
import fedmira.config.exchange
import fedmira.config.graph
import fedmira.config.method
import fedmira.config.mira
import fedmira.config.run
from fedmira.config.basics import Section
from fedmira.config.graph import GraphConfig
from fedmira.config.method_section import MethodSection
from fedmira.data.partition import partition
from fedmira.federation.registry import METHODS
from fedmira.types import Arena, Clients, Layout, Participants, Results, TensorSpec

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"


def test_the_configuration_page_is_current() -> None:
    """If this fails: python tools/configuration_page.py."""
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == tool("configuration_page").page()


def test_the_configuration_page_has_every_section() -> None:
    plain = {BaseModel, Section, MethodSection, fedmira.config.data._Source, fedmira.config.run.RunConfig}
    sections = {
        value
        for module in (
            fedmira.config.run,
            fedmira.config.method,
            fedmira.config.mira,
            fedmira.config.graph,
            fedmira.config.data,
            fedmira.config.exchange,
        )
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, BaseModel)
    } - plain
    assert {section for _, section in tool("configuration_page").SECTIONS} == sections


def test_every_method_and_graph_has_its_row() -> None:
    first_cells = re.findall(r"^\| (`.*?) \|", (DOCS / "papers.md").read_text("utf-8"), re.M)
    rows = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    graphs = get_args(GraphConfig.model_fields["kind"].annotation)
    assert set(METHODS) | set(graphs) <= rows


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / "extending.md").read_text("utf-8"), re.M | re.S)


def defined_in(block: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(block, "extending.md", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(scope="module")
def examples() -> tuple[dict[str, Any], ...]:
    return tuple(defined_in(block) for block in blocks("python"))


def test_the_method_of_the_docs_moves_clients_half_way(examples: tuple[dict[str, Any], ...]) -> None:
    made, settings, registry, *_ = examples
    config = settings["HalfWayConfig"].model_validate({"name": "half_way"})
    with pytest.raises(ValueError, match="wya"):
        settings["HalfWayConfig"].model_validate({"name": "half_way", "wya": 0.3})
    registry["half_way"] = SimpleNamespace(build=made["build"])
    layout = Layout(
        (TensorSpec("q.lora_a", "lora_a", "q", (1, 2), 0), TensorSpec("q.lora_b", "lora_b", "q", (2, 1), 2))
    )
    clients = Clients(("a", "b"), (3, 3), ("", ""), seed=0)
    method = registry["METHODS"]["half_way"](config, clients, None, None)
    state = method.init(Arena(layout, torch.zeros(2, 4)), clients)
    participants = Participants(1, (0, 1))
    job = method.plan(state, participants)
    assert job.start_SP.shape == (2, 4)
    trained_SP = torch.tensor([[0.0, 0.0, 0.0, 4.0], [8.0, 0.0, 0.0, 0.0]])
    state, info = method.merge(state, participants, Results((0, 1), trained_SP, (), 0, 0, 0.0, 0))
    expected = torch.tensor([[2.0, 0.0, 0.0, 3.0], [6.0, 0.0, 0.0, 1.0]])
    assert torch.equal(method.personalise(state).values_KP, expected)
    assert state.last_round_K == (1, 1)
    assert info.numbers["returned"] == 2
    nobody = Results((), torch.zeros(0, 4), (), 0, 0, 0.0, 0)
    assert torch.equal(method.merge(state, participants, nobody)[0].adapters.values_KP, expected)


def test_the_source_of_the_docs_becomes_clients(examples: tuple[dict[str, Any], ...]) -> None:
    source = examples[3]["load"](None, 0)
    federation = partition(source, fedmira.config.data.PartitionConfig(by="task"), seed=0)
    assert len(federation.clients) == 4
    assert all(client.train and client.validation and client.test for client in federation.clients)


def test_the_graph_of_the_docs_is_a_ring(examples: tuple[dict[str, Any], ...]) -> None:
    graph = examples[4]["ring"](5)
    assert graph.adjacency_KK.sum(axis=1).tolist() == [2.0] * 5


def test_the_graph_file_of_the_docs_is_accepted(tmp_path: Path) -> None:
    from fedmira.assembly import read_graph

    path = tmp_path / "graph.json"
    path.write_text(blocks("json")[0], encoding="utf-8")
    adjacency_KK = read_graph(GraphConfig(kind="given", path=str(path)), ("ben", "anna", "cleo"))
    assert adjacency_KK is not None
    assert adjacency_KK.tolist() == [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]


def test_files_and_names_that_the_docs_mention_exist() -> None:
    for page in (DOCS / "extending.md", REPOSITORY / "CONTRIBUTING.md", DOCS / "concepts.md"):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:src|tests|docs|tools)/[\w./]+)`", text):
            known_example = path.endswith("half_way.py")
            assert known_example or (REPOSITORY / path).exists(), f"{page.name}: {path}"
    from fedmira.data import sources
    from fedmira.federation import mixing, registry

    assert hasattr(registry, "METHODS")
    assert hasattr(sources, "LOADERS")
    for name in ("keep", "average", "linear", "laplacian_explicit", "laplacian_implicit", "by_group", "chain"):
        assert callable(getattr(mixing, name))


def test_the_picture_is_valid_and_self_contained() -> None:
    text = (DOCS / "concepts.svg").read_text(encoding="ascii")
    ElementTree.fromstring(text)
    assert "href" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_prose_is_ascii() -> None:
    for page in (*DOCS.glob("*.md"), *REPOSITORY.glob("*.md"), *(REPOSITORY / "recipes").glob("*.yaml")):
        assert page.read_text(encoding="utf-8").isascii(), page.name


def test_every_key_of_a_config_is_described() -> None:
    assert "|  |\n" not in (DOCS / "configuration.md").read_text(encoding="utf-8")
