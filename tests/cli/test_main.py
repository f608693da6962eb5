"""The first minute: help that answers at once, errors that say what to do, exit codes that scripts can trust."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from fedmira.cli import main as main_module
from fedmira.cli import process
from fedmira.cli.main import JOURNEY, cli
from fedmira.cli.session import printable
from fedmira.errors import (
    DataError,
    FedmiraError,
    IntegrityError,
    Interrupted,
    ParticipationError,
    SetupError,
    UsageError,
)

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "help"
HEAVY = ("torch", "transformers", "numpy", "datasets", "peft", "rich", "pydantic", "yaml")


def imported_by(*arguments: str) -> set[str]:
    """Heavy packages that a call of the command line imports, in a process of its own."""
    program = (
        "import sys; from fedmira.cli.main import main; code = main(sys.argv[1:]); "
        f"print('MODULES', *(m for m in {HEAVY!r} if m in sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("--help") == set()


@pytest.mark.parametrize("command", [command.name for command in JOURNEY])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    assert imported_by(command, "--help") == set()


def test_validate_and_init_import_neither_torch_nor_transformers(recipe: Path) -> None:
    assert not imported_by("validate", str(recipe)) & {"torch", "transformers", "datasets", "peft"}
    assert not imported_by("init") & {"torch", "transformers", "pydantic"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "quickstart.yaml"
    path.write_text((Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml").read_text("utf-8"), "utf-8")
    return path


def cpu_seconds(*arguments: str) -> float:
    """CPU time of one call of the command line as a program; wall time would measure what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fedmira", *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_less_than_a_fifth_of_a_second() -> None:
    assert min(cpu_seconds("--help") for _ in range(5)) < 0.2


def test_validate_takes_less_than_a_second(recipe: Path) -> None:
    assert min(cpu_seconds("validate", str(recipe)) for _ in range(3)) < 1.0


@pytest.mark.parametrize("name", ["", *(command.name or "" for command in JOURNEY)])
def test_help_texts(fedmira, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Help is part of the interface. FEDMIRA_WRITE_GOLDEN=1 rewrites the files after a wanted change."""
    monkeypatch.setenv("COLUMNS", "80")
    text = fedmira(*([name] if name else []), "--help").out
    path = GOLDEN / f"{name or 'fedmira'}.txt"
    if os.environ.get("FEDMIRA_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_version(fedmira) -> None:
    import fedmira as package

    outcome = fedmira("--version")
    assert (outcome.code, outcome.out.split()[-1]) == (0, package.__version__)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FedmiraError("it broke"), 1),
        (UsageError("it broke"), 2),
        (DataError("it broke"), 3),
        (SetupError("it broke"), 4),
        (IntegrityError("it broke"), 5),
        (ParticipationError("it broke"), 6),
        (Interrupted("it broke", 1), 129),
        (Interrupted("it broke", 2), 130),
        (Interrupted("it broke", 15), 143),
    ],
)
def test_an_error_is_one_message_and_its_exit_code(fedmira, monkeypatch, error: FedmiraError, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedmira.cli.init.recipe_names", fail)
    outcome = fedmira("init")
    assert outcome == (code, "", "Error: it broke\n")


def test_errors_with_json_are_one_object_on_standard_output(fedmira) -> None:
    outcome = fedmira("init", "quickstrat", "--json")
    told = json.loads(outcome.out)
    assert outcome.code == told["exit_code"] == 2
    assert told["error"].endswith("did you mean 'quickstart'?")
    assert "quickstrat" in outcome.err


def test_an_unexpected_error_hints_at_debug_and_debug_shows_where(fedmira, monkeypatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("fedmira.cli.init.recipe_names", fail)
    plain, with_traceback = fedmira("init"), fedmira("init", "--debug")
    assert plain.code == with_traceback.code == 1
    assert "ZeroDivisionError: surprise" in plain.err
    assert "--debug" in plain.err
    assert "Traceback" not in plain.err
    assert "Traceback" in with_traceback.err
    assert fedmira("--debug", "init").err.count("Traceback") == 1


def _of_the_cpu() -> None:
    torch.empty(2**60)


def _of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")


def _of_python() -> None:
    raise MemoryError


@pytest.mark.parametrize("ask", [_of_the_cpu, _of_a_gpu, _of_python])
def test_memory_that_runs_out_is_no_fault_but_says_what_to_lower(fedmira, monkeypatch, ask) -> None:
    monkeypatch.setattr("fedmira.cli.init.recipe_names", ask)
    outcome = fedmira("init")
    assert outcome.code == 4
    assert outcome.err.startswith("Error: memory ran out (")
    assert "training.cohort_size" in outcome.err
    assert "fault in fedmira" not in outcome.err
    assert "()" not in outcome.err
    assert "More" not in outcome.err


@pytest.mark.parametrize("arguments", [("init", "--colour"), ("run",), ("rum",)])
def test_a_command_that_is_wrong_with_json_is_one_object_too(fedmira, arguments: tuple[str, ...]) -> None:
    outcome = fedmira(*arguments, "--json")
    told = json.loads(outcome.out)
    assert outcome.code == told["exit_code"] == 2
    assert told["error"]
    assert told["error"] in outcome.err
    assert fedmira(*arguments).out == ""


def test_usage_errors_exit_with_2(fedmira) -> None:
    assert fedmira("rum").code == 2
    assert fedmira("init", "--colour").code == 2
    assert fedmira("run").code == 2
    assert "rum" in fedmira("rum").err


def test_ctrl_c_exits_with_130(fedmira, monkeypatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmira.cli.init.recipe_names", interrupt)
    assert fedmira("init").code == 130


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m fedmira init | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_a_result_that_cannot_be_printed_is_no_fault_of_fedmira() -> None:
    command = f"{sys.executable} -m fedmira init"
    done = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert (
        done.stderr == "Error: the result could not be printed: No space left on device; what the command did stands\n"
    )


def test_a_path_that_the_output_cannot_encode_is_written_out(tmp_path: Path) -> None:
    name = "\u0434\u0430.yaml"
    command = [sys.executable, "-m", "fedmira", "init", "quickstart", name]
    for encoding, shown in (
        ("latin-1", b"\\u0434\\u0430.yaml"),
        ("latin-1:replace", b"??.yaml"),
        ("utf-8", name.encode()),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        assert b"Wrote " + shown in done.stdout


def test_errors_have_no_colour_where_nobody_wants_it(fedmira, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("fedmira.cli.main.tell", seen.append)
    fedmira("validate", "nowhere.yaml")
    monkeypatch.setenv("NO_COLOR", "1")
    fedmira("validate", "nowhere.yaml")
    assert ["\x1b" in line for line in seen] == [True, False]


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[31mb\r\n\tc\x00 d\u202e") == "a\\x1b[31mb\\r\n\tc\\x00 d\\u202e"


def test_every_command_can_speak_json_and_be_debugged() -> None:
    for command in JOURNEY:
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--debug", "--quiet"} <= options, command.name
    assert main_module.cli.list_commands(click.Context(cli)) == [command.name for command in JOURNEY]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, ("1000", None)),
        ({"GOMP_SPINCOUNT": "7"}, ("7", None)),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, (None, "ACTIVE")),
    ],
)
def test_waiting_threads_soon_sleep_unless_told_otherwise(
    given: dict[str, str], used: tuple[str | None, str | None]
) -> None:
    """On two shared cores a round took 175 s with spinning threads and 6 s with sleeping ones."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    program = (
        f"import os; from fedmira.cli.main import main; main(['init', '--quiet']); print(*map(os.environ.get, {names}))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**environment, **given}
    )
    assert done.stdout.splitlines()[-1].split() == [str(value) for value in used]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept_unless_the_user_set_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Libc:
        def mallopt(self, name: int, value: int) -> None:
            calls.append((name, value))

    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    process.prepare_process()
    assert [name for name, _ in calls] == [-3, -1]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    process.prepare_process()
    assert len(calls) == 2
