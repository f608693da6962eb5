"""Where an exported folder may lie, and what is left of one that was not finished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmira.errors import SetupError, UsageError
from fedmira.export.peft import new_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from fedmira.export.peft import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(out: Path, word: str = "done") -> None:
    with new_folder(out) as folder:
        (folder / "file").write_text(word)


@pytest.mark.parametrize("beyond", ["x", "x/y", "../x"])
def test_links_on_the_way_are_followed(tmp_path: Path, beyond: str) -> None:
    (tmp_path / "real" / "place").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "place")
    out = tmp_path / "link" / beyond
    write(out)
    # as the system itself reads the path
    assert (out / "file").read_text() == "done"
    assert (tmp_path / "real" / "place" / beyond / "file").is_file()


@pytest.mark.parametrize("target", ["empty", "nothing"])
def test_a_link_in_the_place_itself_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match="link exists and is not an empty folder"):
        write(tmp_path / "link")


@pytest.mark.parametrize("name", ["n" * 240, "n" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_longer_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"File name too long \(ENAMETOOLONG\)"), new_folder(tmp_path / ("n" * 256)):
        pytest.fail("too late")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_process_left_is_no_obstacle_and_is_removed(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == -9
    [left] = (out if there else tmp_path).iterdir()
    assert (left / "half").is_file()
    write(tmp_path / "other")
    assert left.is_dir()
    write(out)
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
    assert os.listdir(out) == ["file"]


def test_what_a_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UsageError, match="not an empty folder"):
            write(out, "second")
    assert os.listdir(out) == ["file"]
    assert (out / "file").read_text() == "first"
