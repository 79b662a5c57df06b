"""A layer against its token loop: outputs, final state and every gradient; in one call and in several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from naive_cms import naive_cms
from naive_linear import naive_linear
from naive_self_modifying import naive_self_modifying
from naive_self_modifying_linear import naive_self_modifying_linear
from tolerances import assert_same
from torch import Tensor, nn

from nested_learning.layers.cms import CMS, CMSState, FastLevelState
from nested_learning.layers.config import ADAPTIVE
from nested_learning.layers.linear import GatedDeltaRule, LinearState
from nested_learning.layers.memory import MemoryState
from nested_learning.layers.self_modifying import SelfModifyingTitans, SelfModState
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear, SelfModLinearState
from nested_learning.ops.self_modifying.chunk import MEMORY
from nested_learning.state import State

SMALL = (
    1e-3  # gradients below this share of the largest one are measured by it: some are zero but for rounding
)

MATRICES = tuple(f"initial_{name}" for name in (MEMORY, *ADAPTIVE))
"""Initial memories of `SelfModifyingLinear`."""


def liven(layer: nn.Module) -> None:
    """Parameters that start small or at zero, made large enough for every path to matter."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("initial_w1", "rates.weight", "shares")):
                parameter.normal_()
            if name.endswith(MATRICES):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def run_loop(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a layer's token loop, and its last fast weights in the order of `fast_weights`."""
    if isinstance(layer, GatedDeltaRule):
        y, finals = naive_linear(layer, x)
        return y, list(finals)
    if isinstance(layer, CMS):
        return naive_cms(layer, x)
    if isinstance(layer, SelfModifyingLinear):
        y, memories = naive_self_modifying_linear(layer, x)
        return y, [tensor for held in memories.values() for tensor in held]
    assert isinstance(layer, SelfModifyingTitans)
    y, memories = naive_self_modifying(layer, x)
    return y, [tensor for name, _ in layer.chunks for tensor in memories[name]]


def fast_weights(layer: nn.Module, state: State) -> list[Tensor]:
    """The weights and momenta of a state, memory by memory: W₁, W₂, then S₁, S₂."""
    if isinstance(layer, SelfModifyingLinear):
        assert isinstance(state, SelfModLinearState)
        gains = [state.gain] if state.momentum is None else [state.gain, state.momentum]
        return [initial @ gain for initial in layer.memories.values() for gain in gains]
    if isinstance(state, LinearState):
        return [state.weights] if state.momentum is None else [state.weights, state.momentum]
    if isinstance(state, CMSState):
        levels = [level for level in state.levels if isinstance(level, FastLevelState)]
        return [tensor[:, 0] for level in levels for tensor in unstack(level.memory)]
    assert isinstance(state, SelfModState)
    return [tensor for bank in state.banks for tensor in unstack(bank)]


def unstack(memories: MemoryState) -> list[Tensor]:
    """The tensors of a stack `[B, H, …]`, memory by memory."""
    first = memories.w2.unbind(2)
    second = [w for group in memories.w1 for w in group.unbind(2)]
    parts = [second, first]
    if memories.s2 is not None and memories.s1 is not None:
        parts += [[s for group in memories.s1 for s in group.unbind(2)], memories.s2.unbind(2)]
    return [tensor for memory in zip(*parts, strict=True) for tensor in memory]


def in_pieces(layer: nn.Module, x: Tensor, cuts: Sequence[int]) -> tuple[Tensor, State]:
    """`layer` called on x up to every cut, with the state of the call before."""
    state, parts = None, []
    for first, end in pairwise([0, *cuts, x.shape[1]]):
        y, state = layer(x[:, first:end], state)
        parts.append(y)
    assert state is not None
    return torch.cat(parts, 1), state


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients at `inputs` of one random projection of the outputs."""
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in outputs]
    loss = sum((y * probe).sum() for y, probe in zip(outputs, probes, strict=True))
    return list(torch.autograd.grad(loss, list(inputs), allow_unused=True, materialize_grads=True))


def assert_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor], length: int) -> None:
    """`assert_same`, where what is below `SMALL` of the largest tensor is measured by that: some of them are
    zero but for rounding."""
    sizes = [float(tensor.detach().abs().max()) if tensor.numel() else 0.0 for tensor in expected]
    for one, other, size in zip(actual, expected, sizes, strict=True):
        assert_same(one, other, length, scale=max(size, SMALL * max(sizes)))


def assert_equals_loop(layer: nn.Module, x: Tensor, cuts: Sequence[int], length: int) -> None:
    """Compare a layer with its token loop: outputs, final weights and the gradients of both at x and at every
    parameter; and the same in pieces, with the whole state.

    Args:
        layer: in float64.
        x: `[B, T, D]`.
        cuts: where the calls of the comparison in pieces end, but for the last; none = no such comparison.
        length: operations in a row, see `tolerances`.
    """
    x = x.detach().requires_grad_()
    inputs = [x, *layer.parameters()]
    expected, finals = run_loop(layer, x)
    wanted = gradients([expected, *finals], inputs)
    whole, state = layer(x)
    calls = [(whole, state), in_pieces(layer, x, cuts)] if cuts else [(whole, state)]
    for y, after in calls:
        weights = fast_weights(layer, after)
        assert_all_same([y, *weights], [expected, *finals], length)
        assert_all_same(gradients([y, *weights], inputs), wanted, length)
        assert_all_same(after.tensors(), state.tensors(), length)
