"""The public surface is short, sorted and pinned."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import fedmira

PUBLIC = [
    "FedmiraError",
    "RunConfig",
    "answer",
    "compare",
    "embedded_base_path",
    "export_clients",
    "load_config",
    "read_run",
    "read_study",
    "run",
    "write_report",
]


def test_the_surface_is_pinned_and_sorted() -> None:
    assert fedmira.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_leads_somewhere_and_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(fedmira, name))
    assert name in dir(fedmira)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, fedmira; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        fedmira.fit  # noqa: B018


def test_the_embedded_base_is_where_the_package_says() -> None:
    assert fedmira.embedded_base_path().parts[-2:] == ("assets", "base")
