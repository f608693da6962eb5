"""What one more client of a cohort costs in memory, as a section."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.client_memory import measure_client_memory
from benchmarks.options import Options
from benchmarks.results import Section
from fedmira.config.run import TrainingConfig

OVER_FLOOR = "bytes over 16 per parameter"


def measure_memory(name: str, options: Options, say: Callable[[str], None]) -> Section:
    """Bytes that one more client adds to the peak of a round, beside the starting adapter that the caller holds."""
    found = measure_client_memory(options.device, TrainingConfig(local_steps=2, batch_size=1))
    over = "bfloat16" if options.device.startswith("cuda") else "float32"
    section = Section(
        name, f"One more client in a cohort, adapters of {found.parameters:,} parameters, AdamW, over a base in {over}"
    )
    section.facts = {"parameters": found.parameters, "bytes_per_client": found.bytes_per_client}
    section.measures[OVER_FLOOR] = found.over_floor
    say(f"  {found.bytes_per_client / found.parameters:.2f} bytes per parameter")
    return section
