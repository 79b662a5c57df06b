"""Steps as CUDA graphs give what eager steps give.

Without a card, `capture` is replaced by one that runs the function at every replay, over the same tensors. It
then computes on what a graph would have: a batch in one place, gradients in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_no_host_sync import HostReads
from tiny import TinyModel, tiny_config
from torch import Tensor, nn

from nested_learning import graphs
from nested_learning.data.corpus import Corpus
from nested_learning.graphs import Replay
from nested_learning.layers.documents import locate_documents
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec
from nested_learning.models import lm
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import set_seed
from nested_learning.train import captured, trainer
from nested_learning.train.captured import MicroSteps
from nested_learning.train.config import run_config
from nested_learning.train.guard import NonFiniteError, UpdateGuard
from nested_learning.train.metrics import read_metrics
from nested_learning.train.objective import next_token_loss
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer

LEVELS = [{"name": "fast", "chunk_size": 4}, {"name": "mlp"}, {"name": "slow", "chunk_size": 36}]
HOPE = {"vocab_size": 257, "dim": 8, "num_layers": 1, "num_heads": 2, "chunk_size": 4, "seq_len": 12}
ON_A_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pretend(run: Callable[[], Tensor], device: Any, warm_up: Any = None, pool: Any = None) -> Replay:
    """`capture`, with a function that is run again and writes to the same result."""
    if warm_up is not None:
        warm_up()
    kept = run().clone()  # a real capture records this call and does not run it
    return Replay(kept, lambda: kept.copy_(run()), pool or object())


def with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers made from now on run graphs that are replaced by `pretend`."""
    monkeypatch.setattr(captured, "capture", pretend)
    monkeypatch.setattr(trainer, "why_no_graph", lambda *arguments: None)


def make(folder: Path, corpus: Corpus, name: str, resume: Path | None = None, **values: Any) -> Trainer:
    """A trainer of a small HOPE with a fast, a plain and a slow level (which moves at every third step)."""
    plain = tiny_config(
        folder, name, steps=7, level_report=0, eval_batches=1, **values.pop("train", {})
    ).to_dict()
    plain["model"] |= {**HOPE, "levels": LEVELS, "mixer": "linear", **values.pop("model", {})}
    plain["optim"] |= values.pop("optim", {})
    plain["data"]["loader"] |= values.pop("loader", {})
    config = run_config(plain)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    model = HopeLM(config.model)
    return Trainer(config, model, corpus, OneProcess(), resume)


def records(run: Trainer) -> list[dict[str, float]]:
    """What a run logged, without times and memory."""
    path = run.config.run_dir / "metrics.jsonl"
    return [
        {key: row[key] for key in ("step", "loss", "grad_norm", "valid_loss") if key in row}
        for row in read_metrics(path)
    ]


def assert_same_run(one: Trainer, two: Trainer) -> None:
    assert records(one) == records(two) and len(records(one)) > 7
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "values",
    [
        {"optim": {"clip_norm": 0.05}},
        {"train": {"accumulation": 2}, "optim": {"clip_norm": None}},
        pytest.param({"optim": {"name": "m3"}}, marks=pytest.mark.thorough),
        {"loader": {"curriculum": [{"until_step": 4, "seq_len": 4}]}},
        pytest.param(
            {"train": {"accumulation": 2, "precision": "bf16"}, "model": {"mixer": "self_mod"}},
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["clipped", "accumulated", "m3", "two lengths", "bf16 self_mod"],
)
def test_graphs_give_the_losses_and_weights_of_eager_steps(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    eager = make(tmp_path, corpus, "eager", **{key: dict(value) for key, value in values.items()})
    assert eager.graphs is None
    eager.fit()
    with_graphs(monkeypatch)
    run = make(tmp_path, corpus, "graphs", **values)
    assert run.graphs is not None
    run.fit()
    assert len(run.graphs.graphs) == (2 if "loader" in values else 1)
    assert_same_run(eager, run)


def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path, corpus, "whole")
    whole.fit()
    with_graphs(monkeypatch)
    part = make(tmp_path, corpus, "part")
    for _ in range(5):  # in the middle of a window of the slow level
        part.update(next(part.loader))
    part.save()
    part.update(next(part.loader))  # lost with the process
    resumed = make(tmp_path, corpus, "part", resume=part.store.latest())
    resumed.fit()
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_gradients_stay_where_they_are(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_graphs(monkeypatch)
    run = make(tmp_path, corpus, "run", train={"accumulation": 2})
    places = []
    for _ in range(4):  # the slow level moves once
        run.update(next(run.loader))
        run.evaluate(1)
        places.append([(id(p), id(p.grad), p.data_ptr(), p.grad.data_ptr()) for p in run.model.parameters()])
    assert places[0] == places[1] == places[2] == places[3]


class Longer(nn.Module):
    """Uses `far` only where there are more than 4 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.near[tokens].sum() + (self.far[tokens[:, 4:]].sum() if tokens.shape[1] > 4 else 0)


def micro_steps(model: nn.Module, lines: list[str]) -> MicroSteps:
    def step(tokens: Tensor, count: int | Tensor) -> Tensor:
        loss = model(tokens) / count
        loss.backward()
        return loss.detach()

    return MicroSteps(model, step, lines.append)


def test_a_parameter_that_a_batch_does_not_reach_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "capture", pretend)
    model, lines = Longer(), []
    steps = micro_steps(model, lines)
    buffers = {}
    for length in (4, 6, 4, 6, 6):
        tokens = torch.arange(2 * length).view(2, length) % 9
        steps.begin(tokens)
        for _ in range(2):
            steps(tokens, 5)
        expected = torch.bincount(tokens.flatten(), minlength=9) * 2 / 5
        assert torch.equal(model.near.grad, expected)
        buffers.setdefault("near", model.near.grad)
        assert model.near.grad is buffers["near"]
        if length == 4:
            assert model.far.grad is None
        else:
            assert torch.equal(model.far.grad, torch.bincount(tokens[:, 4:].flatten(), minlength=9) * 2 / 5)
            assert model.far.grad is buffers.setdefault("far", model.far.grad)
    assert len(lines) == 2 and lines[0].startswith("a CUDA graph of steps on 2 x 3 tokens was made in ")


def test_gradients_that_share_memory_are_added_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes through views may leave one tensor as the gradient of two parameters."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))

        def forward(self, tokens: Tensor) -> Tensor:
            return (self.one.view(9) + self.two.view(9))[tokens].sum()

    model, tokens = Sum(), torch.tensor([[0, 0, 5]])
    model(tokens).backward()
    assert model.one.grad.data_ptr() == model.two.grad.data_ptr()  # else this test shows nothing
    monkeypatch.setattr(captured, "capture", pretend)
    steps = micro_steps(model, [])
    for _ in range(2):
        steps.begin(tokens)
        for _ in range(2):
            steps(tokens, 1)
        for parameter in model.parameters():
            assert torch.equal(parameter.grad.flatten(), torch.tensor([4.0, 0, 0, 0, 0, 2, 0, 0, 0]))


def test_shapes_beyond_the_first_few_run_without_a_graph_and_one_line_says_so(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"curriculum": [{"until_step": 2, "seq_len": 4}, {"until_step": 4, "seq_len": 6}]}
    eager = make(tmp_path, corpus, "eager", loader=dict(stages))
    eager.fit()
    with_graphs(monkeypatch)
    monkeypatch.setattr(captured, "SHAPES", 1)
    lines: list[str] = []
    monkeypatch.setattr(Trainer, "_tell", lambda self, line: lines.append(line))
    run = make(tmp_path, corpus, "graphs", loader=stages)
    run.fit()
    assert_same_run(eager, run)
    captures, fallen = lines
    assert captures.startswith("a CUDA graph of steps on 12 x 4 tokens")
    assert fallen == "no CUDA graph for batches of 8 x 6 tokens: 1 shapes have one"


@pytest.mark.parametrize("deferred", [False, True])
def test_a_batch_that_is_not_finite_is_named_and_changes_nothing(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, deferred: bool
) -> None:
    with_graphs(monkeypatch)
    run = make_trainer(model=TinyModel(), save_every=2, log_every=3)
    run.guard = UpdateGuard(run.optimizer, run.device, deferred=deferred)
    before = {}

    def update(tokens: Tensor, original: Any = run.update) -> Any:
        if run.step == 3:
            with torch.no_grad():
                run.model.head.bias[3] = torch.inf
            before.update({name: value.clone() for name, value in run.model.state_dict().items()})
        return original(tokens)

    run.update = update
    with pytest.raises(NonFiniteError, match=r"step 4: .* is parameter 'head.bias'; .*step_00000002"):
        run.fit()
    assert run.graphs is None  # diagnosed without them
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())


def test_a_failed_capture_says_how_to_train_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "capture", fails)
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        micro_steps(Longer(), []).begin(torch.zeros(1, 3, dtype=torch.int64))
    assert "train.graphs=false" in caught.value.__notes__[0]


def test_a_capture_inside_of_an_autocast_keeps_no_casts() -> None:
    device = torch.device("cpu")
    with graphs.uncached(device):
        assert torch.is_autocast_cache_enabled() and not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        with graphs.uncached(device):
            assert not torch.is_autocast_cache_enabled()
            assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_of_several_documents_read_nothing_from_the_device(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a step on them could not be captured. (On a CPU, the check of documents itself does read.)"""
    set_seed(0)
    config = HopeConfig(**{**HOPE, "seq_len": None, "num_layers": 1}, mixer=mixer, levels=(LevelSpec(),))
    model, tokens = HopeLM(config), torch.randint(257, (2, 12))
    numbers = torch.tensor([[0] * 12, [0] * 4 + [1] * 8])
    located = locate_documents(numbers, config.alignment)
    monkeypatch.setattr(lm, "locate_documents", lambda numbers, block: located)
    with HostReads() as reads:
        next_token_loss(model(tokens, documents=numbers)[0], tokens, torch.tensor(24)).backward()
    assert reads.seen == []


@ON_A_CARD
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_captured_step_on_a_card_equals_an_eager_one_and_waits_for_nothing(
    tmp_path: Path, corpus: Corpus, accumulation: int
) -> None:
    def run(graphs: str) -> Trainer:
        train = {"accumulation": accumulation, "graphs": graphs, "precision": "fp32", "device": "cuda"}
        values = tiny_config(tmp_path, graphs, **train).to_dict()
        values["model"] |= {**HOPE, "levels": LEVELS, "mixer": "self_mod"}
        config = run_config(values)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        set_seed(config.seed)
        device = torch.device("cuda:0")
        return Trainer(config, HopeLM(config.model).to(device), corpus, OneProcess(device))

    eager, graph = run("false"), run("true")
    losses = []
    for trainer_ in (eager, graph):
        losses.append([trainer_.update(next(trainer_.loader))[0]])  # the graph is made here
        torch.cuda.set_sync_debug_mode("error" if trainer_ is graph else "default")
        try:
            losses[-1] += [trainer_.update(next(trainer_.loader))[0] for _ in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5, atol=0)
    for a, b in zip(eager.model.parameters(), graph.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@ON_A_CARD
def test_experiments_capture_steps_and_forward_passes_on_a_card() -> None:
    device = torch.device("cuda:0")
    model = TinyModel().to(device)
    tokens = torch.randint(257, (2, 7), device=device)
    step = captured.CapturedStep(model, lambda x, y: next_token_loss(model(x)[0], y), (tokens, tokens))
    other = torch.randint(257, (2, 7), device=device)
    found = step((other, tokens)).clone()
    gradient = model.head.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    loss = next_token_loss(model(other)[0], tokens)
    loss.backward()
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradient, model.head.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(captured.CapturedForward(model)(other)[0], model(other)[0])
