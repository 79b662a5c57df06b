"""States are pytrees: torch's own tools see every tensor of them, and nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

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
        for other in (again, moved, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            assert type(other) is type(state) and other.position == state.position
            assert torch.equal(model(tokens[:, length:], other)[0], model(tokens[:, length:], state)[0])


def test_paths_name_the_fields() -> None:
    model = HopeLM(hope("linear", LEVELS, vocab_size=11, dim=8, num_layers=1, num_heads=2, chunk_size=4))
    state = model(torch.zeros(1, 5, dtype=torch.int64))[1]
    paths, _ = pytree.tree_flatten_with_path(state)
    named = {pytree.keystr(path).replace("[", ".").replace("]", "").lstrip(".") for path, _ in paths}
    assert named >= set(state.named_tensors())


def read_back(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.thorough
@pytest.mark.parametrize(("mixer", "length"), [*((mixer, 1) for mixer in MIXERS), ("self_mod", 4)])
def test_a_model_is_exported_with_its_state(mixer: str, length: int) -> None:
    """`torch.export`: tokens and a state in, logits and a state out; the program does what the model does."""
    torch.manual_seed(0)
    model = HopeLM(hope(mixer, LEVELS, vocab_size=11, dim=8, num_layers=1, num_heads=2, chunk_size=4)).eval()
    tokens = torch.randint(11, (2, 8 + length))
    with torch.no_grad():
        state = model(tokens[:, :8])[1]
        program = torch.export.export(model, (tokens[:, :length], state))
        expected, after = model(tokens[:, 8:], state)
        run: Callable[..., tuple[torch.Tensor, object]] = read_back(program).module()
        logits, found = run(tokens[:, 8:], state)
    assert type(found) is type(after) and found.position == after.position
    torch.testing.assert_close([logits, *found.tensors()], [expected, *after.tensors()])
