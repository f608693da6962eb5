"""Federated multi-task LoRA fine-tuning of language models.

The public surface, in the order it is used: `load_config`, `run` or `compare`, `read_run` or `read_study`,
`write_report`, `export_clients`, `answer`. Names are looked up when they are first asked for, so that `import fedmira`
costs nothing.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FedmiraError": "fedmira.errors",
    "RunConfig": "fedmira.config.run",
    "answer": "fedmira.export.clients",
    "compare": "fedmira.studies.compare",
    "export_clients": "fedmira.export.clients",
    "load_config": "fedmira.config.file",
    "read_run": "fedmira.report.public",
    "read_study": "fedmira.report.public",
    "run": "fedmira.experiment",
    "write_report": "fedmira.report.page",
}


__all__ = [
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


def embedded_base_path() -> Path:
    """Return the folder of the small language model that ships with fedmira, in Hugging Face format."""
    return Path(__file__).resolve().parent / "assets" / "base"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmira' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
