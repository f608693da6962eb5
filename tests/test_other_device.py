"""What a GPU would be asked to do, on a device that is none: see `tests.reference.other_device`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = {
    "engine": ("llama-lora", "gpt2-prompt", "gemma2-lora", "llama-full", "llama-seeds"),
    "run": ("mira", "mira-gram_layers", "fedit", "flora"),
}


@pytest.mark.parametrize("kind", CASES)
def test_another_device_computes_what_the_cpu_does(kind: str) -> None:
    backends = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no place for a device written in Python")
    found = subprocess.run(
        [sys.executable, "-m", "tests.reference.other_device_work", kind, *CASES[kind]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    differences = json.loads(found.stdout.splitlines()[-1])
    assert differences.keys() == set(CASES[kind])
    for case, by_name in differences.items():
        for name, difference in by_name.items():
            assert difference is True or (difference is not False and difference < 1e-9), (case, name, difference)
