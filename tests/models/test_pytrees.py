"""States are pytrees: torch's own tools see every tensor of them, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import hope
from torch.utils import _pytree as pytree

from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models.lm import HopeLM

LEVELS = (LevelSpec(name="fast", chunk_size=4), LevelSpec())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [8, 10])  # at a boundary, and inside a chunk
def test_a_state_is_a_pytree_of_its_tensors(mixer: str, length: int) -> None:
    torch.manual_seed(0)
    model = HopeLM(hope(mixer, LEVELS, vocab_size=11, dim=8, num_layers=2, num_heads=2, chunk_size=4)).eval()
    tokens = torch.randint(11, (2, length + 3))
    with torch.no_grad():
        state = model(tokens[:, :length])[1]
        leaves, structure = pytree.tree_flatten(state)
        seen = {id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
        assert seen == {id(tensor) for tensor in state.named_tensors().values()}
        again = pytree.tree_unflatten(leaves, structure)
        moved = pytree.tree_map_only(torch.Tensor, torch.clone, state)
        for other in (again, moved, copy.deepcopy(state)):
            assert type(other) is type(state) and other.position == state.position
            assert torch.equal(model(tokens[:, length:], other)[0], model(tokens[:, length:], state)[0])
