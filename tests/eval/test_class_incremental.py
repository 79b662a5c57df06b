"""New classes task by task: files, tasks, each way to learn them, and the whole evaluation."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nested_learning import HopeConfig, HopeLM
from nested_learning.adapt import AdaptConfig, checksum
from nested_learning.eval.arms import Memorize
from nested_learning.eval.class_incremental import (
    ClassIncremental,
    ClassIncrementalSettings,
    Course,
    method_metrics,
)
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.intents import ClassTask, Example, hold_out, read_examples, split_tasks
from nested_learning.eval.learners import (
    QUERY,
    ClassMeans,
    FineTuned,
    FineTuning,
    InContext,
    Memorizing,
    as_line,
    label_scores,
    label_text,
)
from nested_learning.eval.results import wilson
from nested_learning.optim.config import OptimConfig
from nested_learning.train.elastic import anchor, elastic_penalty, penalty_of

TOPICS = {
    "play_music": ["song", "tune", "album", "band"],
    "weather": ["rain", "sun", "snow", "storm"],
    "alarm": ["wake", "clock", "morning", "ring"],
    "bank_balance": ["money", "account", "cash", "savings"],
}


def examples(count: int, seed: int) -> list[Example]:
    rng = random.Random(seed)
    return [
        Example(" ".join(rng.choices(words, k=3)), label)
        for label, words in TOPICS.items()
        for _ in range(count)
    ]


@pytest.fixture
def tasks() -> list[ClassTask]:
    return split_tasks(examples(6, 0), examples(3, 1), 2, seed=0)


def test_files_of_all_kinds(tmp_path: Path) -> None:
    some = examples(1, 0)
    (tmp_path / "a.json").write_text(
        json.dumps({"train": some, "test": some[:1], "oos_test": [["x", "oos"]]})
    )
    (tmp_path / "b.csv").write_text('text,category\n"a, b",weather\nc,alarm\n')
    (tmp_path / "c.jsonl").write_text('{"text": "a", "label": "x", "l2": "y"}\n')
    assert read_examples(tmp_path / "a.json", "train") == some
    assert read_examples(tmp_path / "a.json", "test") == some[:1]
    assert read_examples(tmp_path / "b.csv", "test") == [Example("a, b", "weather"), Example("c", "alarm")]
    assert read_examples(tmp_path / "c.jsonl", "train") == [Example("a", "x")]
    assert read_examples(tmp_path / "c.jsonl", "train", "l2") == [Example("a", "y")]
    with pytest.raises(ValueError, match="must have the fields text and l3, got text, label, l2"):
        read_examples(tmp_path / "c.jsonl", "train", "l3")
    with pytest.raises(ValueError, match="holds no 'val', but train, test, oos_test"):
        read_examples(tmp_path / "a.json", "val")
    with pytest.raises(ValueError, match=r"\.json, \.csv or \.jsonl file"):
        read_examples(tmp_path / "d.txt", "train")


def test_tasks_share_no_class_and_leave_none_out() -> None:
    train, test = examples(6, 0), examples(3, 1)
    made = split_tasks(train, test, 3, seed=1, per_class=(4, 2))
    assert [len(task.classes) for task in made] == [1, 1, 2]
    assert sorted(name for task in made for name in task.classes) == sorted(TOPICS)
    for task in made:
        for part, most, source in ((task.train, 4, train), (task.test, 2, test)):
            assert {example.label for example in part} == set(task.classes)
            assert len(part) == most * len(task.classes) and set(part) <= set(source)
    assert made == split_tasks(train, test, 3, seed=1, per_class=(4, 2))
    assert made != split_tasks(train, test, 3, seed=2, per_class=(4, 2))
    with pytest.raises(ValueError, match="tasks must be from 1 to the 4 classes, got 5"):
        split_tasks(train, test, 5, seed=0)
    with pytest.raises(ValueError, match="'weather' has only one kind"):
        split_tasks(train, [e for e in test if e.label != "weather"], 2, seed=0)


def test_every_fifth_example_of_a_class_is_held_out() -> None:
    train, test = hold_out(examples(10, 0))
    assert (len(train), len(test)) == (32, 8)
    assert [example.label for example in test] == [label for label in TOPICS for _ in range(2)]


def test_scores_are_mean_log_probabilities_of_labels(loaded) -> None:
    """Every candidate read alone, with the query before it, gives the same."""
    names = list(TOPICS)
    scores = label_scores(loaded.model, loaded.tokenizer, "some rain", names)
    for score, name in zip(scores, names, strict=True):
        prompt, label = list(QUERY.format(text="some rain").encode()), list(label_text(name).encode())
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([prompt + label]))[0][0].log_softmax(-1)
        alone = [log_p[len(prompt) - 1 + i, token] for i, token in enumerate(label)]
        assert score == pytest.approx(float(torch.stack(alone).mean()), abs=1e-5)


def optim() -> OptimConfig:
    return OptimConfig(lr=1e-2, weight_decay=0.0, warmup_steps=2)


def accuracy(learner, task: ClassTask, candidates) -> float:
    return sum(learner.predict(text, candidates) == label for text, label in task.test) / len(task.test)


@pytest.mark.thorough
def test_fine_tuning_learns_forgets_and_leaves_the_checkpoint_alone(loaded, tasks) -> None:
    before = checksum(loaded.model)
    how = FineTuning(optim=optim(), epochs=20, batch_size=6)
    learner = FineTuned(loaded, how)
    every = [name for task in tasks for name in task.classes]
    learner.learn(tasks[0].train)
    assert accuracy(learner, tasks[0], tasks[0].classes) > 0.8
    learner.learn(tasks[1].train)
    assert accuracy(learner, tasks[1], every) > 0.8
    assert accuracy(learner, tasks[0], every) < 0.2  # nothing holds it back from the new labels
    replaying = FineTuned(loaded, replace(how, replay=0.5))
    for task in tasks:
        replaying.learn(task.train)
    assert accuracy(replaying, tasks[0], every) > 0.5
    assert checksum(loaded.model) == before


def test_targets_are_the_tokens_of_labels(loaded) -> None:
    learner = FineTuned(loaded, FineTuning(optim=optim()))
    inputs, targets = learner._batch([Example("a", "xy"), Example("longer", "z")])
    for row, target, text, label in zip(inputs, targets, ("a", "longer"), (b" xy", b" z"), strict=True):
        at = (target != -100).nonzero()[:, 0]
        assert bytes(target[at].tolist()) == label
        prompt = QUERY.format(text=text).encode()
        assert bytes(row[: at[0] + 1].tolist()) == prompt and len(at) == at[-1] - at[0] + 1


def test_elastic_penalty_by_hand() -> None:
    """One weight matrix, −log p by autograd on its own: F is the mean of squared gradients of samples."""
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(vocab_size=5, dim=4, num_layers=1, num_heads=1, mixer="attention")).double()
    samples = [
        (torch.tensor([[1, 2, 3]]), torch.tensor([[2, -100, 4]])),
        (torch.tensor([[0]]), torch.tensor([[1]])),
    ]
    expected = torch.zeros_like(model.embedding.weight)
    for inputs, targets in samples:
        log_p = model(inputs)[0].log_softmax(-1)[0]
        total = sum(log_p[i, t] for i, t in enumerate(targets[0].tolist()) if t >= 0)
        (gradient,) = torch.autograd.grad(total, model.embedding.weight)
        expected += gradient**2 / 2
    held = anchor(model, samples)
    torch.testing.assert_close(held.importance["embedding.weight"], expected)
    assert elastic_penalty([held], 3.0, model) == 0
    with torch.no_grad():
        model.embedding.weight += 0.5
    moved = elastic_penalty([held, held], 3.0, model)
    assert moved.item() == pytest.approx(2 * 1.5 * 0.25 * expected.sum().item())
    assert penalty_of([], 3.0) is None and penalty_of([held], 0.0) is None


@pytest.mark.thorough
def test_ewc_holds_the_weights(loaded, tasks) -> None:
    def drift(ewc: float) -> float:
        how = FineTuning(optim=replace(optim(), lr=1e-3), epochs=4, batch_size=6, ewc=ewc)
        learner = FineTuned(loaded, how)
        learner.learn(tasks[0].train)
        held = anchor(learner.model, (learner._batch([one]) for one in tasks[0].train))
        learner.learn(tasks[1].train)
        return elastic_penalty([held], 1.0, learner.model).item()

    assert drift(1e3) < 0.5 * drift(0.0)


def test_class_means_are_discriminant_analysis_whatever_the_order(loaded, tasks) -> None:
    sklearn = pytest.importorskip("sklearn.discriminant_analysis")
    learner = ClassMeans(loaded, shrink=0.2)
    for task in tasks:
        learner.learn(task.train)
    backwards = ClassMeans(loaded, shrink=0.2)
    for task in tasks[::-1]:
        backwards.learn(task.train[::-1])
    torch.testing.assert_close(learner.covariance(), backwards.covariance())
    train = [example for task in tasks for example in task.train]
    x = torch.stack([learner.features(text) for text, _ in train]).numpy()
    y = [label for _, label in train]
    # the same covariance by scikit-learn, up to degrees of freedom; equal priors as in the distance
    joint = sklearn.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=None, priors=[0.25] * 4).fit(x, y)
    within = torch.tensor(joint.covariance_) * len(train) / (len(train) - 4)
    size = within.trace() / len(within)
    expected = 0.8 * within + 0.2 * size * torch.eye(len(within), dtype=within.dtype)
    torch.testing.assert_close(learner.covariance(), expected, atol=1e-9, rtol=1e-6)
    means = {name: torch.tensor(x[[label == name for label in y]]).mean(0) for name in TOPICS}
    inverse = expected.inverse()
    for text, _ in tasks[0].test:
        off = {name: learner.features(text) - mean for name, mean in means.items()}
        nearest = min(TOPICS, key=lambda name: float(off[name] @ inverse @ off[name]))
        assert learner.predict(text, list(TOPICS)) == nearest


def test_features_are_the_mean_of_normed_hidden_states(loaded) -> None:
    with torch.no_grad():
        tokens = torch.tensor([list(b"some rain")])
        logits = loaded.model(tokens)[0][0]
    head = loaded.model.embedding.weight
    found = ClassMeans(loaded).features("some rain")
    torch.testing.assert_close(head.double() @ found, logits.double().mean(0), atol=1e-5, rtol=1e-5)


def test_examples_in_the_context_are_balanced_and_fit(loaded, tasks) -> None:
    learner = InContext(loaded, 200)
    for task in tasks:
        learner.learn(task.train)
        text = bytes(learner._context()).decode()
        assert len(text) <= 200 and text.endswith("\n")
        lines = {as_line(example) for seen in tasks for example in seen.train}
        shown = re.findall(r"Query: .*\nIntent: .*\n", text)
        assert "".join(shown) == text and set(shown) <= lines
    counts = Counter(line.split("Intent: ")[1] for line in shown)
    assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 1
    assert learner._state.position == len(text.encode())


@pytest.mark.slow
def test_memory_is_kept_from_task_to_task_only_without_reset(loaded, tasks) -> None:
    def memory(reset: bool, *order: ClassTask):
        adapt = AdaptConfig(lr=0.5, reset=reset, chunk_size=32)
        learner = Memorizing(loaded, Memorize(adapt=adapt))
        for task in order:
            learner.learn(task.train)
        return torch.cat([tensor.flatten() for tensor in learner._memory.tensors()])

    first, second = tasks
    assert torch.equal(memory(True, first, second), memory(True, second))
    assert not torch.equal(memory(False, first, second), memory(False, second))
    with pytest.raises(ValueError, match="learned anyway"):
        Memorizing(loaded, Memorize(use_correct_answer=True))


class Words:
    """An oracle: remembers which words go with which class."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def learn(self, examples) -> None:
        self.words |= {word: label for text, label in examples for word in text.split()}

    def predict(self, text: str, candidates) -> str:
        label = next(self.words[word] for word in text.split() if word in self.words)
        return label if label in candidates else candidates[0]


class Latest(Words):
    """Knows the classes of the latest task only."""

    def learn(self, examples) -> None:
        self.words = {word: examples[0].label for words in TOPICS.values() for word in words}
        super().learn(examples)


def test_an_oracle_is_right_and_one_that_forgets_is_half_right(tasks) -> None:
    course = Course(tasks, {"oracle": Words, "latest": Latest}, task_aware=False)
    assert all(all(part) for part in course.test(("oracle", 1))["right"])
    first, second = course.test(("latest", 1))["right"]
    assert not any(first) and all(second)
    assert course.test(("latest", 0))["right"] == [[1] * len(tasks[0].test)]  # begins again
    rows = [course.test(("latest", stage))["right"] for stage in (0, 1)]
    named = {(m.task, m.name): m for m in method_metrics("latest", rows, tasks)}
    assert named["4 classes", "latest accuracy"].value == 0.5
    assert named["4 classes", "latest accuracy"].chance == 0.25
    assert named["all tasks", "latest forgetting"].value == 1.0


@pytest.mark.slow
def test_the_whole_evaluation_resumes(loaded, tasks, tmp_path) -> None:
    output, log = tmp_path / "c.json", tmp_path / "c.samples.jsonl"
    learning = Memorize(adapt=AdaptConfig(chunk_size=32))
    settings = ClassIncrementalSettings(epochs=1, batch_size=8, context_tokens=60, memorize=learning)
    result = evaluate(ClassIncremental(loaded, tasks, settings), output)
    assert {metric.name.split()[0] for metric in result.metrics} == {
        *("naive", "replay", "ewc", "means", "in_context", "memorize")
    }
    assert {metric.arm for metric in result.metrics if metric.name == "memorize accuracy"} == {"adapted"}
    first, lines = output.read_bytes(), log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:10])
    evaluate(ClassIncremental(loaded, tasks, settings), output)
    assert output.read_bytes() == first and log.read_text() == "".join(lines)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_a_model_that_knows_nothing_is_at_chance(loaded, tmp_path) -> None:
    """Labels that have nothing to do with the texts: accuracy is chance within its interval."""
    rng = random.Random(5)
    noise = [Example("".join(rng.choices("abcdefgh ", k=12)), f"c{i % 4}") for i in range(400)]
    tasks = split_tasks(noise[:300], noise[300:], 2, seed=0)
    quick = ClassIncrementalSettings(methods=("means",))
    result = evaluate(ClassIncremental(loaded, tasks, quick), tmp_path / "r.json")
    (metric,) = [m for m in result.metrics if m.task == "4 classes"]
    low, high = wilson(round(metric.value * metric.n), metric.n)
    assert low < 0.25 < high and metric.n == 100


def test_values_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match="methods must be of naive, .*, got 'best'"):
        ClassIncrementalSettings(methods=("best",))
    with pytest.raises(ValueError, match=r"replay must be in \[0, 1\)"):
        FineTuning(optim=optim(), replay=1.0)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        FineTuning(optim=optim(), epochs=0)
