"""A run that was prolonged, stopped or never begun, whose place cannot be written, or whose onlookers leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedmira.cli.main import main
from fedmira.config.file import load_config
from fedmira.errors import Interrupted
from fedmira.experiment import SilentDisplay
from fedmira.experiment import run as run_experiment
from fedmira.export import clients
from fedmira.export.clients import export_clients
from fedmira.runs.store import RunStore

CONFIG = """
name: small
data: {source: planted, families: 2, clients_per_family: 1, examples: 12, max_length: 64}
model: {adapter: {rank: 2, targets: [q_proj]}}
method: {name: fedit}
training: {local_steps: 1, batch_size: 2}
federation: {rounds: 2}
evaluation: {generation: {enabled: false, max_new_tokens: 2}}
"""
CLIENT = "family-1-client-0"
NEW = "nothing to resume; this is a new run: no run small-fedit-seed0 has begun in runs"
UNFINISHED = "this run has finished 1 of 2 rounds; the adapter is that of round 1"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def log_of_the_run() -> str:
    [path] = Path("runs").glob("*/run.log")
    return path.read_text(encoding="utf-8")


class StopsAfterARound(SilentDisplay):
    def round(self, round_: int, line: str) -> None:
        signal.raise_signal(signal.SIGHUP)


def stopped_run() -> Path:
    with pytest.raises(Interrupted) as stopped:
        run_experiment(load_config(Path("c.yaml"), ()), display=StopsAfterARound())
    assert stopped.value.exit_code == 129
    [path] = Path("runs").iterdir()
    return path


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_run_that_was_prolonged_says_with_which_rounds_it_goes_on(fedmira) -> None:
    assert fedmira("run", "c.yaml").code == 0
    assert fedmira("run", "c.yaml", "--resume", "federation.rounds=3").code == 0
    resumed, anew = fedmira("run", "c.yaml", "--resume"), fedmira("run", "c.yaml")
    assert (resumed.code, anew.code) == (5, 2)
    for outcome in (resumed, anew):
        assert "prolonged to 3 rounds" in outcome.err
        assert "write federation.rounds=3, also in the file" in outcome.err
    assert "leave out --resume" not in resumed.err
    followed = fedmira("run", "c.yaml", "--resume", "federation.rounds=3")
    assert followed.code == 0
    assert "nothing to do" in followed.out


@pytest.mark.parametrize("options", [[], ["--quiet"], ["--json"]])
def test_a_resume_that_finds_nothing_says_so_at_once(fedmira, options: list[str]) -> None:
    """A typo in the name or the seed would cost a whole run."""
    outcome = fedmira("run", "c.yaml", "--resume", *options)
    assert outcome.code == 0
    assert outcome.err.splitlines()[0] == f"warning: {NEW}"
    assert NEW in log_of_the_run().splitlines()[0]
    again = fedmira("run", "c.yaml", "--resume", *options)
    assert "nothing to resume" not in again.err


# ------------------------------------------------------------------------------------------------ before it is finished


def test_what_an_unfinished_run_exports_says_so(fedmira) -> None:
    run = stopped_run()
    assert "stopped by SIGHUP in round 1; everything is saved" in log_of_the_run()
    outcome = fedmira("export", run, "--client", CLIENT, "--out", "adapter", "--json")
    assert outcome.err == f"warning: {UNFINISHED}\n"
    assert json.loads(outcome.out)["warnings"] == [UNFINISHED]
    assert "- rounds: 1 of 2\n" in Path("adapter/README.md").read_text()
    assert fedmira("run", "c.yaml", "--resume").code == 0
    outcome = fedmira("export", run, "--client", CLIENT, "--out", "finished", "--json")
    assert (outcome.err, json.loads(outcome.out)["warnings"]) == ("", [])
    assert "- rounds: 2\n" in Path("finished/README.md").read_text()


def test_from_python_it_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=UNFINISHED):
        export_clients(stopped_run(), CLIENT, Path("adapter"))


def test_an_answer_says_what_it_is_made_from(fedmira) -> None:
    run = stopped_run()
    outcome = fedmira("predict", run, "--client", CLIENT, "encode: kemo")
    assert outcome.err == f"warning: {UNFINISHED}\n"
    long = fedmira("predict", run, "--client", CLIENT, "word " * 1500, "--json")
    told = json.loads(long.out)["warnings"]
    assert long.err == "".join(f"warning: {line}\n" for line in told)
    assert told[0] == UNFINISHED
    assert "tokens of the question were left out" in told[1]
    assert told[1].endswith("data.max_length of this run is 64")


def test_a_question_that_is_no_text_is_said_to_be_none(fedmira) -> None:
    # as Latin-1 arrives on the command line
    outcome = fedmira("predict", stopped_run(), "--client", CLIENT, b"gr\xfc\xdfe".decode("utf-8", "surrogateescape"))
    assert outcome.code == 2
    assert "the question is not valid UTF-8" in outcome.err


def test_a_config_may_come_through_a_pipe(fedmira, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = CONFIG.replace("name:", "# as written\nname:", 1)
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert fedmira("run", pipe, "federation.rounds=1").code == 0
    writer.join()
    [run] = Path("runs").iterdir()
    assert (run / "config.yaml").read_text() == text


def test_the_room_that_the_base_has_for_a_question_is_named(fedmira) -> None:
    Path("c.yaml").write_text(CONFIG.replace("max_length: 64", "max_length: 4096"), encoding="utf-8")
    assert fedmira("run", "c.yaml", "federation.rounds=1").code == 0
    [run] = Path("runs").iterdir()
    outcome = fedmira("predict", run, "--client", CLIENT, "word " * 3000)
    assert outcome.err.endswith("the base model has room for 2,046 beside 2 new ones\n")


# ----------------------------------------------------------------------------------------------------- where it is kept


def test_a_place_that_cannot_be_written_is_known_before_anything_is_loaded(fedmira) -> None:
    Path("file").write_text("mine")
    for options in ([], ["--resume"]):
        outcome = fedmira("run", "c.yaml", "output.directory=file", *options)
        assert outcome.code == 4
        assert "Not a directory (ENOTDIR); a part of this path is a file: choose another folder" in outcome.err
        assert outcome.out == ""
    estimate = fedmira("run", "c.yaml", "output.directory=file", "--dry-run", "--json")
    assert estimate.code == 0
    assert "could not write to" in json.loads(estimate.out)["warnings"][-1]
    assert fedmira("run", "c.yaml").code == 0
    [run] = Path("runs").iterdir()
    assert fedmira("export", run, "--client", CLIENT, "--out", "file/adapter").code == 4
    (run / "report").write_text("mine")
    assert fedmira("report", run).code == 4


@pytest.mark.parametrize("mistake", ["model.adapter.targets=[nothing]", "model.path=nowhere"])
def test_a_run_that_cannot_be_set_up_leaves_only_what_was_there(fedmira, mistake: str) -> None:
    assert fedmira("run", "c.yaml", mistake).code in (2, 4)
    assert os.listdir("runs") == []
    RunStore.create(load_config(Path("c.yaml"), [mistake]), None).close()
    assert fedmira("run", "c.yaml", mistake).code in (2, 4)
    assert len(os.listdir("runs")) == 1


def test_a_run_that_fails_in_its_first_round_keeps_its_folder(fedmira) -> None:
    outcome = fedmira("run", "c.yaml", "training.learning_rate=1e38")
    assert outcome.code == 1, outcome.err
    assert len(os.listdir("runs")) == 1


# --------------------------------------------------------------------------------------------------------- who looks on


def test_a_run_goes_on_when_the_reader_of_its_progress_leaves() -> None:
    """`fedmira run c.yaml | head -1`."""
    command = [sys.executable, "-m", "fedmira", "run", "c.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("Loading the base model")
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 0
    line = "warning: progress can no longer be shown (Broken pipe); the work goes on without"
    assert told == f"{line}\n"
    assert log_of_the_run().count(line) == 1
    [run] = Path("runs").iterdir()
    assert RunStore.open(run).events()[-1]["event"] == "final"


CLOSES_THE_TERMINAL = """
import os, pty, re, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "fedmira", "run", "c.yaml", "federation.rounds=500"])
seen = b""
while not re.search(rb"round +[0-9]+/500", seen):
    seen += os.read(terminal, 65536)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_closed_terminal_stops_a_run_after_a_checkpoint() -> None:
    """As when an SSH session closes: SIGHUP comes, and nothing can be written any more."""
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", CLOSES_THE_TERMINAL], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "129\n"
    assert "stopped by SIGHUP" in log_of_the_run()
    [run] = Path("runs").iterdir()
    assert list((run / "checkpoints").iterdir())


def test_an_error_that_nobody_can_read_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            raise OSError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["init", "flann", "--json"]) == 2


def test_a_client_called_as_the_folder_of_the_base_is_named(fedmira, monkeypatch: pytest.MonkeyPatch) -> None:
    run, original = stopped_run(), clients.load_trained

    def renamed(path: Path) -> clients.Trained:
        trained = original(path)
        return trained._replace(names=("Base", *trained.names[1:]))

    monkeypatch.setattr(clients, "load_trained", renamed)
    outcome = fedmira("export", run, "--all", "--with-base", "--out", "all")
    assert outcome.code == 2
    assert "the client 'Base' would lie where --with-base puts the model" in outcome.err
    assert not Path("all").exists()
    assert fedmira("export", run, "--all", "--out", "all").code == 0
