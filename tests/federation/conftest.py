"""Properties are judged by what they compute, never by how long a busy machine takes, and alike on every run."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("fedmira", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fedmira")
