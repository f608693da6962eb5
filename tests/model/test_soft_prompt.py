"""Soft prompts begin where words are, in every family."""

from __future__ import annotations

import pytest
import torch
from tests.reference.tiny_models import FAMILIES, VOCABULARY, layout_of_kind, tiny_base

from fedmira.model.kinds import initial_adapters


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_virtual_tokens_begin_as_words_are_embedded(family: str) -> None:
    base = tiny_base(family)
    layout = layout_of_kind(base, "prompt")
    arena = initial_adapters(base, layout, 1, seed=0)
    words_Vd = base.model.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    [spec] = layout.specs
    distance = torch.cdist(arena.view(spec)[0].double(), words_Vd.double()).min(dim=1).values
    assert float(distance.max()) < 1e-5
