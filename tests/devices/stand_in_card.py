"""Backward passes on a device that only pretends: fake tensors on "card", PyTorch's spare device.

Automatic differentiation asks a real CUDA device for its context, so fake CUDA tensors cannot have a backward
pass. The spare device ("PrivateUse1") may be made in Python, and this one is made of nothing. It is not CUDA:
what is written for `device.type == "cuda"` does not run here, which `fake_cuda` covers.

The device belongs to the whole process, so this is a program of its own. It prints a JSON object: by case,
the error, or "" if there was none.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from on_cuda import BLOCK, FAST, LENGTH, MEMORIES, MLP, SLOW, devices_of, small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from nested_learning.adapt import AdaptConfig, memorize
from nested_learning.adapt.config import PATHS
from nested_learning.adapt.learn import Learner
from nested_learning.adapt.memorize import split_chunks
from nested_learning.adapt.paths import learning_names, start
from nested_learning.layers.mixer import MIXERS
from nested_learning.models.lm import HopeLM
from nested_learning.models.nested_mlp import NestedModel
from nested_learning.optim.build import MATRIX_OPTIMIZERS, OPTIMIZERS, build_optimizer
from nested_learning.optim.config import OptimConfig
from nested_learning.optim.delta_gd import GeneralizedGradientDescent
from nested_learning.train.elastic import anchor
from nested_learning.train.objective import next_token_loss
from nested_learning.train.online import online_loss
from nested_learning.train.strategy.base import OneProcess

NAME = "card"
Module = TypeVar("Module", bound=nn.Module)


class Backend:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        """It is there."""
        return True

    @staticmethod
    def is_initialized() -> bool:
        """It needs no start."""
        return True

    @staticmethod
    def device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def current_device() -> int:
        """The only one."""
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        """For autocast."""
        return [torch.bfloat16]


def on_card(module: Module) -> Module:
    """The module with all its parameters on the card, where `torch.tensor` cannot make any."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=NAME))
    return module


def new_tensor(like: Tensor, value: float) -> Tensor:
    """`like.new_tensor(value)`, which would copy to a real device."""
    return like.new_full((), value)


def model(**changes: Any) -> HopeLM:
    """A small model on the card."""
    return on_card(HopeLM(small(**{"levels": (FAST, SLOW, MLP), "seq_len": 32, **changes})))


def tokens(length: int = LENGTH + 1) -> Tensor:
    """Tokens `[2, length]` on the card."""
    return torch.zeros(2, length, dtype=torch.int64, device=NAME)


def step(net: HopeLM, optimizer: Any = None, apart: bool = False) -> None:
    """One training step: forward, backward, clipping and update."""
    batch = tokens()
    documents = (torch.arange(LENGTH, device=NAME) >= BLOCK).long().expand(2, -1) if apart else None
    logits, state = net(batch[:, :-1], documents=documents)
    loss = next_token_loss(logits, batch[:, 1:], count=2 * LENGTH)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = OneProcess(torch.device(NAME)).clip(net, 1.0)
    grads = [p.grad for p in net.parameters()]
    assert all(grad is not None for grad in grads)
    if optimizer is not None:
        optimizer.step()
    held = [
        value for entries in (optimizer.state if optimizer else {}).values() for value in entries.values()
    ]
    own = [value for value in held if not isinstance(value, Tensor) or value.dim()]  # without counters
    assert devices_of(grads, state, norm, own, list(net.parameters())) == {NAME}


def trained(name: str) -> None:
    """A step of an optimizer, with the inputs that it catches."""
    net = model()
    step(net, build_optimizer(OptimConfig(name=name), net))


def generalized() -> None:
    """A step of generalised gradient descent, which differentiates inside."""
    layer = on_card(nn.Linear(4, 3))
    optimizer = GeneralizedGradientDescent(layer)
    layer(torch.zeros(5, 4, device=NAME)).square().mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert devices_of(list(layer.parameters())) == {NAME}


def adapted(paths: str, graph: Any, steps: int = 1) -> None:
    """A chunk that is learned from, as in training."""
    net, config = model(mixer="titans"), AdaptConfig(paths=paths, chunk_size=4, steps=steps, surprise="l2")
    state = start(net, 2, config)
    names = learning_names(net, state, config)
    learner = Learner(model=net, config=config, names=names, initial=state, graph=graph)
    inputs, targets = split_chunks(tokens(), 4)[0]
    chunk = learner.read(inputs, targets, state)
    assert devices_of(chunk.losses, chunk.surprise, chunk.wrote, chunk.state) == {NAME}


def memorized() -> None:
    """A text that is learned from, as in evaluation: whether its first step is kept is answered by yes."""
    net = model(mixer="titans", levels=(FAST, MLP))
    asked, torch.Tensor.__bool__ = torch.Tensor.__bool__, lambda tensor: True  # type: ignore[method-assign]
    try:
        report, state = memorize(net, tokens(), config=AdaptConfig(paths="all", chunk_size=4))
    finally:
        torch.Tensor.__bool__ = asked  # type: ignore[method-assign]
    assert devices_of(report, state) == {NAME}


def online(through: bool) -> None:
    """The loss of a model that learns while it reads, and its gradient."""
    net = model(mixer="linear", levels=(FAST, MLP))
    online_loss(net, tokens(), AdaptConfig(chunk_size=4), through).backward()  # type: ignore[no-untyped-call]
    assert devices_of([p.grad for p in net.parameters() if p.grad is not None]) == {NAME}


def consolidated() -> None:
    """The anchor of elastic weight consolidation."""
    net, batch = model(), tokens()
    found = anchor(net, [(batch[:1, :-1], batch[:1, 1:])])
    assert devices_of(found.weights, found.importance) == {NAME}


def nested() -> None:
    """The smallest nested model without its LSTM, for which the card has no kernel."""
    net = on_card(NestedModel(4, 6))
    y = net.levels["level3_slow"](net.levels["level2_medium"](torch.zeros(2, 3, 4, device=NAME)))
    y.sum().backward()
    assert devices_of([p.grad for p in net.parameters() if p.grad is not None]) == {NAME}


def forgotten() -> None:
    """A tensor of the CPU in a backward pass, which must be found."""

    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.ones(grad.shape)

    x = torch.zeros(3, device=NAME, requires_grad=True)
    Forgetful.apply(x).sum().backward()


CASES: dict[str, Callable[[], None]] = {
    "forgotten": forgotten,
    **{f"mixer {name}": partial(lambda name: step(model(mixer=name)), name) for name in MIXERS},
    "documents": lambda: step(model(mixer="self_mod_linear"), None, True),
    **{
        f"self_mod {name}": partial(lambda name: step(model(mixer="self_mod", memory=MEMORIES[name])), name)
        for name in (
            "momentum and start",
            "short projections",
            "error limit",
            "outside targets",
            "keep every",
        )
    },
    "linear keep every": lambda: step(model(mixer="linear", memory=MEMORIES["keep every"])),
    "attention conv": lambda: step(model(mixer="sliding_attention", conv_window=4), None, True),
    **{f"optimizer {name}": partial(trained, name) for name in (*OPTIMIZERS, *MATRIX_OPTIMIZERS)},
    "optimizer generalized": generalized,
    **{f"adapt {paths}": partial(adapted, paths, "first_order") for paths in PATHS},
    "adapt cut": memorized,
    "adapt through": partial(adapted, "cms", "through", 2),
    "online first order": partial(online, False),
    "online through": partial(online, True),
    "elastic": consolidated,
    "nested": nested,
}


def main() -> None:
    """Run the cases that are named, or all."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend)
    torch.Tensor.new_tensor = new_tensor  # type: ignore[method-assign, assignment]
    found = {}
    for name in sys.argv[1:] or CASES:
        try:
            with FakeTensorMode(allow_non_fake_inputs=False):
                CASES[name]()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            print(name, traceback.format_exc(), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
