"""Evaluations and experiments compute on CUDA up to the place where they read their numbers.

A fake tensor has no value, so a function that gives plain numbers must end in the error that says so: then
everything before was on the right device.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from on_cuda import FAST, MLP, devices_of, made_on_cuda, small, tokens
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from nested_learning.adapt import AdaptConfig
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.eval.answer import Answerer
from nested_learning.eval.arms import Memorize, Memorizer
from nested_learning.eval.continual import Continual, SegmentBatch
from nested_learning.eval.held_out import HeldOut, HeldOutBytes
from nested_learning.eval.learners import ClassMeans, Example, FineTuned, FineTuning
from nested_learning.eval.loading import Loaded
from nested_learning.eval.perplexity import LongPerplexity, LongTexts
from nested_learning.eval.reader import TextReader
from nested_learning.eval.scorer import Sampling, Scorer, read_losses
from nested_learning.models.lm import HopeLM
from nested_learning.optim.config import OptimConfig
from nested_learning.reproduce.context import loss_after
from nested_learning.reproduce.continual import ContinualRun
from nested_learning.reproduce.formal import all_right
from nested_learning.reproduce.needle import moved, retrieved, weights_by_memory
from nested_learning.reproduce.tasks import loss_by_position
from nested_learning.train.config import RunConfig

pytestmark = pytest.mark.usefixtures("fake_cuda")
ASKED = (DataDependentOutputException, DynamicOutputShapeException)
"""What a fake tensor raises that is asked for a value, or for a shape that depends on values."""


def loaded(**changes: Any) -> Loaded:
    """A checkpoint on CUDA that knows bytes."""
    config = RunConfig()
    config.model = small(**{"vocab_size": 257, "levels": (FAST, MLP), **changes})
    model = made_on_cuda(lambda: HopeLM(config.model))
    return Loaded(model=model, tokenizer=ByteTokenizer(), config=config, sha256="", path=Path("fake"))


def test_losses_of_a_text() -> None:
    given = loaded()
    found = [
        read_losses(given.model, tokens(length=12), size=5),
        TextReader(given.model, None).losses(tokens()),
    ]
    assert devices_of(found) == {"cuda"}


def test_learning_from_a_text_at_a_rate_of_zero() -> None:
    """Other rates take gradients: `test_stand_in_card.py`."""
    how = Memorize(adapt=AdaptConfig(lr=0.0, chunk_size=4))
    memorizer = Memorizer(loaded().model, how)
    state = memorizer.read(tokens())
    assert devices_of(state, memorizer.memory(state), memorizer.losses(tokens())) == {"cuda"}


class Chance:
    """A generator, which on CUDA would ask for a card."""

    made: ClassVar[list[torch.device]] = []

    def __init__(self, device: torch.device) -> None:
        self.made.append(device)

    def manual_seed(self, seed: int) -> None:
        """Draws are fake anyway: None, torch's own generator."""


@pytest.mark.thorough
def test_scores_and_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", Chance)
    given = loaded()
    scorer = Scorer(given.model, given.tokenizer, device=given.device)
    state = scorer.read([[1, 2, 3], [4, 5, 6]], None)
    assert devices_of(state, scorer._pad([[1], [2, 3]], 0)) == {"cuda"}
    with pytest.raises(ASKED):
        scorer.loglikelihood([("a", "b"), ("a", "c")])
    with pytest.raises(ASKED):
        list(scorer.rolling(["text"]))
    with pytest.raises(ASKED):
        scorer.write([[1], [2]], state, Sampling(max_new_tokens=2, temperature=1.0, top_k=3))
    with pytest.raises(ASKED):
        Answerer(given, None, 2).answer("question", "")
    assert {device.type for device in Chance.made} == {"cuda"}
    scorer.start = scorer.read([[1]], None)
    assert devices_of(scorer._begin(3)) == {"cuda"}


def test_evaluations() -> None:
    given = loaded()
    with pytest.raises(ASKED):
        of(HeldOut, given, HeldOutBytes(length=4), tokens=np.zeros(20, np.uint16)).score([0, 5])
    long = of(LongPerplexity, given, LongTexts(length=4))
    long.reader = TextReader(given.model, None)
    assert devices_of(long._tokens([[1, 2], [3, 4]])) == {"cuda"}
    with pytest.raises(ASKED):
        long.score([[1, 2, 3, 4]])


def test_the_continual_evaluation() -> None:
    given = loaded()
    reader = SimpleNamespace(loaded=lambda number: given, reader=lambda number: TextReader(given.model, None))
    item = SegmentBatch(checkpoint=0, segment=0, tokens=torch.zeros(2, 9, dtype=torch.int64))
    evaluation = of(Continual, given, None, checkpoints=reader)
    assert devices_of(evaluation._tokens(item)) == {"cuda"}
    with pytest.raises(ASKED):
        evaluation.score([item])


def of(kind: Any, given: Loaded, settings: Any, **fields: Any) -> Any:
    """An evaluation without its files."""
    made = kind.__new__(kind)
    made.loaded, made.given = given, settings
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_means_of_classes() -> None:
    learner = ClassMeans(loaded())
    learner.learn([Example(text="one", label="a"), Example(text="two", label="b")])
    assert devices_of(learner.covariance(), learner.features("one")) == {"cuda"}
    with pytest.raises(ASKED):
        learner.predict("one", ["a", "b"])


def test_examples_of_classes() -> None:
    learner = FineTuned.__new__(FineTuned)
    given = loaded()
    learner.model, learner.tokenizer = given.model, given.tokenizer
    learner.how = FineTuning(optim=OptimConfig())
    assert devices_of(learner._batch([Example(text="one", label="a")])) == {"cuda"}


@pytest.mark.thorough
def test_experiments_evaluate_where_their_model_is() -> None:
    model = loaded(mixer="titans").model
    rows = torch.zeros(2, 9, dtype=torch.int64)  # data are made on the CPU
    for read in (
        lambda: loss_after(model, rows, 4, 2),
        lambda: retrieved(model, 40, None, 2, 1, random.Random(0)),
        lambda: moved(model, [40], random.Random(0)),
    ):
        with pytest.raises(ASKED):
            read()
    assert devices_of(weights_by_memory(model.init_state(2))) == {"cuda"}
    assert devices_of(loss_by_position(model, [rows]), all_right(model, rows, rows)) == {"cpu"}


def test_the_continual_experiment_evaluates_where_its_model_is() -> None:
    run = ContinualRun.__new__(ContinualRun)
    for name, value in {"seq_len": 8, "eval_batches": 1}.items():
        object.__setattr__(run, name, value)
    with pytest.raises(ASKED):
        run._losses(loaded().model, [np.zeros(32 * 9, np.uint8)])
