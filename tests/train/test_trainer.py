import copy
import json
import signal

import pytest
import torch
from tiny import TinyModel
from tolerances import assert_same, tolerance

from nested_learning.data.loader import TokenLoader
from nested_learning.runtime import set_seed
from nested_learning.train.metrics import read_metrics
from nested_learning.train.objective import next_token_loss


def rows(trainer):
    """Metrics without those that measure time."""
    measured = ("tokens_per_second", "memory_gib")
    found = read_metrics(trainer.config.run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in measured} for row in found]


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_the_same_seed_gives_the_same_weights_and_losses(make_trainer):
    first, second = make_trainer("a"), make_trainer("b")
    assert same_weights(first.model, second.model)
    first.fit(), second.fit()
    assert same_weights(first.model, second.model)
    assert rows(first) == rows(second)
    assert rows(first)[-2]["loss"] < rows(first)[0]["loss"]


def test_another_seed_gives_other_batches(make_trainer):
    trainer, train = make_trainer("a"), make_trainer("a").config.train
    other = TokenLoader(trainer.corpus.train, train.seq_len, train.batch_size, trainer.config.seed + 1)
    assert not torch.equal(next(trainer.loader), next(other))


def test_resumed_equals_uninterrupted_bit_for_bit(make_trainer):
    whole = make_trainer("whole")
    whole.fit()
    part = make_trainer("part")
    for _ in range(3):
        part.update(next(part.loader))
    part.save()
    part.update(next(part.loader))  # lost with the process
    set_seed(99)
    resumed = make_trainer("part", resume=part.store.latest())
    assert resumed.step == 3
    resumed.fit()
    assert same_weights(whole.model, resumed.model)
    assert rows(resumed) == [row for row in rows(whole) if row["step"] > 3]
    a, b = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def test_one_step_is_adamw_on_the_mean_cross_entropy(make_trainer):
    trainer = make_trainer()
    reference = copy.deepcopy(trainer.model)
    batch = next(trainer.loader)
    trainer.update(batch)
    loss = next_token_loss(reference(batch[:, :-1])[0], batch[:, 1:])
    loss.backward()
    grads = [p.grad for p in reference.parameters()]
    norm = torch.sqrt(sum(g.double().square().sum() for g in grads))
    for (name, p), g in zip(reference.named_parameters(), grads, strict=True):
        g = g * min(1.0, 1.0 / (norm.item() + 1e-6))
        lr = 1e-2 / 2  # first of two warm-up steps
        decay = 0.1 if name == "head.weight" else 0.0
        expected = p * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)  # Adam's first step, bias-corrected
        torch.testing.assert_close(trainer.model.get_parameter(name), expected, rtol=1e-4, atol=1e-6)


def test_accumulation_does_not_change_the_gradient(make_trainer):
    one = make_trainer("one", model=TinyModel().double())
    two = make_trainer("two", model=copy.deepcopy(one.model), accumulation=2)
    batch = next(one.loader)
    loss_one, loss_two = one._accumulate(batch), two._accumulate(batch)
    rounding = tolerance(4 * 12, torch.float32, factor=1)  # a loss is summed in float32
    assert loss_one.item() == pytest.approx(loss_two.item(), rel=rounding)
    grads = [[p.grad for p in trainer.model.parameters()] for trainer in (one, two)]
    assert_same(*grads, length=4 * 12)


def test_validation_is_the_mean_over_the_held_out_tokens(make_trainer, corpus):
    trainer = make_trainer(eval_batches=None)
    tokens = torch.tensor(corpus.valid.astype("int64"))
    windows = tokens[: len(tokens) // 13 * 13].view(-1, 13)
    windows = windows[: len(windows) // 4 * 4]
    with torch.no_grad():
        logits, _ = trainer.model(windows[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert trainer.evaluate() == pytest.approx(expected.item(), abs=1e-5)
    assert trainer.model.training


def test_bf16_computes_the_head_in_bf16_and_the_loss_in_float32(make_trainer):
    trainer = make_trainer(precision="bf16", steps=2)
    seen = []
    trainer.model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    loss, _ = trainer.update(next(trainer.loader))
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_metrics_file_has_a_row_per_step_and_per_validation(make_trainer):
    trainer = make_trainer()
    result = trainer.fit()
    found = rows(trainer)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in found if "valid_loss" in row] == [4, 8]
    assert found[-1]["valid_loss"] == result.valid_loss
    assert result.bits_per_byte == pytest.approx(result.valid_loss / 0.6931471805599453)
    assert [row["tokens"] for row in found if "loss" in row][-1] == 8 * 4 * 12


def test_rows_after_the_checkpoint_are_dropped_on_resume(make_trainer):
    trainer = make_trainer(steps=6, save_every=3)
    trainer.fit()
    path = trainer.config.run_dir / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 7, "loss": 9.0}) + "\n" + '{"step": 8, "lo')
    make_trainer(steps=6, resume=trainer.store.latest()).fit()
    assert [row["step"] for row in read_metrics(path) if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_puts_handlers_back(make_trainer, number):
    trainer = make_trainer(save_every=100)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer.model.head.register_forward_hook(
        lambda *args: signal.raise_signal(number) if trainer.step == 4 and trainer.model.training else None
    )
    result = trainer.fit()
    assert result.interrupted and result.step == 5
    assert trainer.store.latest().name == "step_00000005"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    whole, resumed = make_trainer("whole"), make_trainer(resume=trainer.store.latest())
    whole.fit(), resumed.fit()
    assert same_weights(whole.model, resumed.model)
