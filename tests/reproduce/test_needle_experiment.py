"""The needle experiment: its runs, its counting, and that its cells are the runs' numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nested_learning.commands.reproduce import parser
from nested_learning.data.synthetic.needle import ANSWER, WORDS, decode_words, encode_words, needle_sample
from nested_learning.eval.results import wilson
from nested_learning.layers.config import MemoryConfig
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.reproduce import needle


def options(line: str = "") -> Any:
    return parser().parse_args(["needle", *line.split()])


def test_rows_are_the_models_asked_for() -> None:
    given = options("--models hope transformer --length 128 --depths 3 --seeds 4 5")
    plan = given.experiment.prepare(given)
    assert list(plan) == ["HOPE", "Transformer"]
    first, second = plan["Transformer"]
    assert (first.seed, second.seed) == (4, 5) and first.model.mixer == "attention"
    assert (first.length, first.model.window, first.model.vocab_size) == (128, 128, len(WORDS))
    assert first.depths == (0.0, 0.5, 1.0) and first.multiples == (1, 2, 4, 8)


def test_lengths_without_room_are_refused() -> None:
    given = options("--length 64 --needles 4")
    with pytest.raises(ValueError, match="length must be at least"):
        given.experiment.prepare(given)


class Reader(HopeLM):
    """Answers from the words of the prompt; every fourth answer has a wrong last digit."""

    def __init__(self) -> None:
        super().__init__(HopeConfig(vocab_size=len(WORDS), dim=4, num_layers=1, num_heads=1))
        self.asked = 0

    def generate(self, tokens: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, **_: Any) -> Any:
        assert max_new_tokens == ANSWER and temperature == 0
        rows = []
        for row in tokens.tolist():
            words = decode_words(row)
            key = words.split()[-3]
            digits = words.split(f"for {key} is : ")[1].split()[:ANSWER]
            self.asked += 1
            if self.asked % 4 == 0:
                digits[-1] = str((int(digits[-1]) + 1) % 10)
            rows.append(row + encode_words(" ".join(digits)))
        return torch.tensor(rows)


@pytest.mark.parametrize("needles", [1, 3])
def test_an_answer_counts_if_all_its_digits_are_right(needles: int) -> None:
    assert needle.retrieved(Reader(), 200, None, 40, needles, random.Random(0)) == 30


def test_a_model_that_knows_nothing_finds_nothing() -> None:
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(vocab_size=len(WORDS), dim=16, num_layers=1, num_heads=2, chunk_size=8))
    right = needle.retrieved(model, 64, None, 200, 1, random.Random(0))
    low, high = wilson(right, 200)
    assert low <= 0.001 <= high


def test_cells_add_up_over_depths_and_seeds() -> None:
    given = options("--models titans --depths 2 --samples 10 --multiples 1 2 --seeds 0 1")
    rights = {0: [[10, 9], [5, 4]], 1: [[10, 10], [3, 2]]}
    result = {"parameters": 1234, "moved": {"memory": [0.5, 1.25], "k": [0.125, 0.25]}}
    outcome = {
        label: [(run, {**result, "right": rights[run.seed], "steps": 50 + run.seed}) for run in runs]
        for label, runs in given.experiment.prepare(given).items()
    }
    report = needle.report(given, outcome)
    low, high = wilson(39, 40)
    assert report.header[3:5] == ["64 tokens", "128 tokens"]
    assert report.rows[0][:4] == ["Titans", "1,234", "50, 51", f"0.975 ({low:.3f}–{high:.3f})"]
    assert report.rows[0][4].startswith("0.350 ") and report.rows[0][5] == "0.250"
    assert report.numbers[0]["map"] == [[1.0, 0.95], [0.4, 0.3]]
    assert report.numbers[0]["right_by_seed"] == [[19, 9], [20, 5]]
    assert report.notes[2].startswith("Runs below 0.95 at the training length: none.")
    assert report.notes[-1] == "Titans: M_memory 0.50, 1.25; M_k 0.12, 0.25"
    assert report.numbers[0]["moved"] == result["moved"]


def test_the_command_writes_table_and_maps(tmp_path: Path) -> None:
    given = options(f"--quick --models titans --jobs 1 --output {tmp_path}")
    plan = given.experiment.prepare(given)
    report = given.experiment.run(given, plan)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "runs.jsonl").read_text()
    assert given.experiment.run(given, plan).markdown() == report.markdown()
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_rows_may_change_options_of_a_contender() -> None:
    given = options("--stop-at 2")
    given.models = ["hope memory.adaptive=[k]", "hope"]
    plan = given.experiment.prepare(given)
    assert list(plan) == ["HOPE memory.adaptive=[k]", "HOPE"]
    (one, *_), (other, *_) = plan.values()
    assert one.model.memory.adaptive == ("k",) and other.model.memory.adaptive == MemoryConfig().adaptive
    assert one.stop_at == 2
    given.models = ["mamba"]
    with pytest.raises(ValueError, match="got 'mamba'"):
        given.experiment.prepare(given)


def test_memories_move_as_far_as_their_weights_do() -> None:
    config = HopeConfig(vocab_size=len(WORDS), dim=8, num_layers=2, num_heads=2, chunk_size=8)
    torch.manual_seed(0)
    model = HopeLM(config).double()
    far = needle.moved(model, [96, 64], random.Random(3), rows=2)
    assert list(far) == ["memory", "k", "v", "eta", "alpha"]
    rng = random.Random(3)
    tokens = torch.tensor([needle_sample(96 + ANSWER, rng)[0] for _ in range(2)])
    for at, length in enumerate((64, 96)):
        _, state = model(tokens[:, :length])
        shares = []
        for block, layer in zip(model.blocks, state.layers, strict=True):
            memory = block.mixer.memories["v"]  # the second of full width in the bank of projections
            _, bank = layer.mixer.banks
            for row in range(2):
                now = torch.cat([bank.w2[row, :, 1].flatten(), bank.w1[0][row, :, 1].flatten()])
                then = torch.cat([memory.initial_w2.flatten(), memory.initial_w1.flatten()])
                shares.append(((now - then).norm() / then.norm()).item())
        assert far["v"][at] == pytest.approx(sum(shares) / len(shares)) and far["v"][at] > 0.001


def test_models_without_such_memories_move_nothing() -> None:
    config = HopeConfig(vocab_size=len(WORDS), dim=8, num_layers=1, num_heads=2, mixer="attention")
    assert needle.moved(HopeLM(config), [64], random.Random(0)) == {}


@pytest.mark.slow
def test_memories_learn_to_retrieve(tmp_path: Path) -> None:
    given = options(f"--models hope titans --seeds 0 --multiples 1 --output {tmp_path}")
    report = given.experiment.run(given, given.experiment.prepare(given))
    for row in report.numbers:
        assert row["right"][0][0] >= 0.95 * row["right"][0][1], row
