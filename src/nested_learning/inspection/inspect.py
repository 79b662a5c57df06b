"""From a model and a text to an `Inspection`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.inspection.measures import effective_rank, joint_norm
from nested_learning.inspection.observe import WATCHES, Seen, observe
from nested_learning.inspection.trace import Inspection, MemoryTrace
from nested_learning.layers.config import ADAPTIVE
from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.models.lm import HopeLM
from nested_learning.models.tokens import check_prompt
from nested_learning.ops.self_modifying.chunk import MEMORY

KINDS = tuple(WATCHES)


@torch.no_grad()
def inspect_memories(model: HopeLM, tokens: Tensor) -> Inspection:
    """Read a text and say what every memory of the model did.

    The model reads the text once; then every layer with memories reads its input again, chunk by chunk.
    The model is left as it was. Results are on the CPU.

    Args:
        model: a language model; nothing is learned but what its memories learn.
        tokens: `[T]` or `[1, T]`, from the start of a context; the first should end a document.

    Raises:
        TypeError: tokens that are no integers.
        ValueError: a model without memories, tokens of more than one sequence or outside of the vocabulary,
            or fewer of them than the shortest chunk.
    """
    whole = tokens[None] if isinstance(tokens, Tensor) and tokens.dim() == 1 else tokens
    check_prompt(whole, model.config.vocab_size)
    if len(whole) != 1:
        raise ValueError(f"tokens must be one sequence, [T] or [1, T], got {list(whole.shape)}")
    layers = memory_layers(model)
    shortest = min(chunk for layer in layers.values() for chunk in chunks_of(layer).values())
    if whole.shape[1] < shortest:
        raise ValueError(
            f"tokens must be at least {shortest}, the shortest chunk of a memory, for one write; "
            f"got {whole.shape[1]}"
        )
    logits, inputs = read_with_inputs(model, layers, whole)
    losses = F.cross_entropy(logits[0, :-1].float(), whole[0, 1:].long(), reduction="none").cpu()
    traces = [
        trace
        for path, layer in layers.items()
        for trace in traces_of(int(path.split(".")[1]), layer, inputs[path])
    ]
    loss = torch.cat([losses.new_full((1,), torch.nan), losses])
    return Inspection(tokens=whole[0].cpu(), loss=loss, memories=tuple(traces))


def memory_layers(model: HopeLM) -> dict[str, nn.Module]:
    """The layers with memories by their path in the model, in the order they are applied.

    Raises:
        ValueError: there are none.
    """
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, KINDS)}
    if not found:
        raise ValueError(
            f"model.mixer = {model.config.mixer} without fast levels has no memory that is written while it "
            "reads; there is nothing to inspect"
        )
    return found


def chunks_of(layer: Any) -> dict[str, int]:
    """Names of a layer's memories, and tokens between two looks at each."""
    if isinstance(layer, SelfModifyingTitans):
        return dict(layer.chunks)
    names = getattr(layer, "memories", None)
    if names is not None:
        held = {name.removeprefix("initial_") for name in names}
        return {name: layer.chunk_size for name in (MEMORY, *ADAPTIVE) if name in held}
    return {f"level:{layer.spec.name}" if hasattr(layer, "spec") else "linear": layer.chunk_size}


def read_with_inputs(
    model: HopeLM, layers: dict[str, nn.Module], tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of `tokens [1, T]`, and what every layer was given `[1, T, D]`."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path, layer in layers.items():

            def keep(_: nn.Module, given: tuple[Any, ...], path: str = path) -> None:
                inputs[path] = given[0]

            hooks.callback(layer.register_forward_pre_hook(keep).remove)
        logits, _ = model(tokens)
    return logits, inputs


def traces_of(block: int, layer: nn.Module, x: Tensor) -> Iterator[MemoryTrace]:
    """A trace for every memory of a layer with input `x [1, T, D]`."""
    seen: dict[str, list[Seen]] = {}
    for one in observe(layer, x):
        seen.setdefault(one.name, []).append(one)
    for name, chunk in chunks_of(layer).items():
        yield make_trace(block, name, chunk, seen[name])


def make_trace(block: int, name: str, chunk: int, seen: list[Seen]) -> MemoryTrace:
    """The numbers of one memory from all that was seen of it."""
    written = [one for one in seen if one.after is not None]
    held = [seen[0].before, *(one.after for one in written if one.after is not None)]
    states = [{m: now[m].cpu() for m in now} for now in held]  # float64, which not every device has
    start = states[0]
    ends, read = [], 0
    for one in written:
        read += one.eta.shape[1]
        ends.append(read)
    changes = [joint_norm([b[m] - a[m] for m in start]) for a, b in pairwise(states)]
    drifts = [joint_norm([now[m] - start[m] for m in start]) for now in states]
    heads = len(seen[0].eta)
    return MemoryTrace(
        block=block,
        name=name,
        chunk=chunk,
        surprise=_tokens([one.surprise for one in seen]),
        eta=_tokens([one.eta for one in seen]),
        alpha=_tokens([one.alpha for one in seen]),
        contribution=_tokens([contributions(one) for one in seen]),
        ends=tuple(ends),
        resets=tuple(one.reset for one in written),
        change=_columns(changes) if changes else torch.zeros(heads, 0),
        norm=_columns([joint_norm(list(now.values())) for now in states]),
        drift=_columns(drifts),
        rank={m: _columns([effective_rank(now[m]) for now in states]) for m in start},
    )


def contributions(seen: Seen) -> Tensor:
    """Norms of what every token has added to the memory `[H, n]`, over all its matrices."""
    if seen.products is None:
        return torch.full_like(seen.eta, torch.nan)
    return torch.stack([part.squares() for part in seen.products.values()]).sum(0).sqrt()


def _tokens(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1).float().cpu()


def _columns(values: list[Tensor]) -> Tensor:
    return torch.stack(values, 1).float().cpu()
