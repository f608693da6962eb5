"""The README says what is true: its tree of folders, its commands, its links, its first screen."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import click
import pytest

from fedmira.cli.main import JOURNEY, cli, main

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
NOT_SHOWN = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}


def tree() -> dict[str, str]:
    """Name of each entry of src/fedmira as the README's tree lists it, with its purpose."""
    block = README.split("src/fedmira/\n")[1].split("\nrecipes/")[0]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in block.splitlines())  # type: ignore[misc]


def test_the_tree_names_every_folder_and_module_and_nothing_else() -> None:
    package = REPOSITORY / "src" / "fedmira"
    there = {path.name + ("/" if path.is_dir() else "") for path in package.iterdir() if path.name not in NOT_SHOWN}
    assert set(tree()) == there
    assert all(len(purpose) > 10 for purpose in tree().values())


def test_imports_point_up_the_tree() -> None:
    package = REPOSITORY / "src" / "fedmira"
    place = {name.rstrip("/").removesuffix(".py"): number for number, name in enumerate(tree())}
    down = []
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedmira."):
                other = str(node.module).split(".")[1]
                down += [f"{path.name} imports {other}"] if place[other] > place.get(own, len(place)) else []
    assert not down


def test_the_first_screen_has_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:8])
    assert "make quickstart" in first_screen
    assert "make test" in first_screen
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_table_of_the_first_screen_is_the_one_that_quickstart_prints() -> None:
    """Its columns and methods; the numbers are those of the run that the README was written from."""
    from fedmira.cli.recipes import recipe_path
    from fedmira.config.file import load_config
    from fedmira.report.table import COLUMNS

    block = README.split("<!-- quickstart-output -->\n```\n")[1].split("```")[0]
    header, rule, *rows = block.splitlines()
    assert re.split(r"\s{2,}", header) == ["method", *(column.heading for column in COLUMNS if column.in_text)]
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows] == list(load_config(recipe_path("quickstart")).compare.methods)


def test_the_commands_table_is_the_command_line() -> None:
    table = {m["name"]: m["usage"] for m in re.finditer(r"^\| `fedmira (?P<name>\w+)(?P<usage>[^`]*)`", README, re.M)}
    assert list(table) == [
        "quickstart",
        "init",
        "validate",
        "data",
        "run",
        "compare",
        "report",
        "export",
        "predict",
    ]
    for command in JOURNEY:
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", table[command.name or ""])) <= known


def test_commands_in_code_blocks_parse() -> None:
    """Each `fedmira ...` line of a block names a command and options that exist."""
    commands = {command.name: command for command in JOURNEY}
    lines = re.findall(r"^fedmira (\w+)(.*)$", README, re.MULTILINE)
    assert lines
    for name, rest in lines:
        words = rest.partition("#")[0].split()
        # below the group: a command remembers the help options of the first context it meets
        group = click.Context(cli, **cli.context_settings)
        commands[name].make_context(name, words, parent=group, resilient_parsing=True)
        with click.Context(commands[name], parent=group) as context:
            known = {option for parameter in commands[name].get_params(context) for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, (name, rest)


def test_your_own_data_starts_with_a_config_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "clients").mkdir(parents=True)
    (tmp_path / "data" / "clients" / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert main(["init", "jsonl", "my.yaml"]) == 0
    assert main(["validate", "my.yaml", "training.learning_rate=1e-3", "method.graph.kind=labels"]) == 0


def test_links_lead_somewhere() -> None:
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_exit_codes_are_those_of_the_errors() -> None:
    from fedmira import errors

    for name, code in {
        "UsageError": 2,
        "DataError": 3,
        "SetupError": 4,
        "IntegrityError": 5,
        "ParticipationError": 6,
    }.items():
        assert getattr(errors, name).exit_code == code
        assert re.search(rf"\b{code} \w+", README)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        "data: {source: planted, families: 2, clients_per_family: 1, examples: 12}\n"
        "model: {adapter: {rank: 2, targets: [q_proj]}}\n"
        "training: {local_steps: 1}\n"
        "federation: {rounds: 1}\n"
        "evaluation: {generation: {enabled: false}}\n",
        encoding="utf-8",
    )
    [block] = [b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "import fedmira" in b]
    exec(block, {})
    assert sorted(path.name for path in Path("adapters").iterdir()) == ["family-0-client-0", "family-1-client-0"]
    [page] = Path("runs").glob("run-fedit-seed1-*/report/index.html")
    assert page.stat().st_size > 1000


def test_the_python_block_runs_on_the_config_of_the_block_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmira.cli.recipes import recipe_path

    monkeypatch.chdir(tmp_path)
    text = recipe_path("jsonl").read_text(encoding="utf-8")
    for long, short in (("rounds: 10", "rounds: 1"), ("max_new_tokens: 64", "max_new_tokens: 2")):
        assert long in text
        text = text.replace(long, short)
    Path("my.yaml").write_text(text, encoding="utf-8")
    Path("data/clients").mkdir(parents=True)
    for client in ("anna", "ben"):
        examples = [{"instruction": f"{client} says {number}", "output": "yes"} for number in range(8)]
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        Path(f"data/clients/{client}.jsonl").write_text(lines, encoding="utf-8")
    [block] = re.findall(r"```python\nimport fedmira\n(.*?)```", README, re.DOTALL)
    exec("import fedmira\n" + block, {})
    assert {path.name for path in Path("adapters").iterdir()} == {"anna", "ben"}
    assert len(list(Path("runs").glob("my-run-fedit-seed1-*/report/index.html"))) == 1
