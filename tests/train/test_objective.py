import math

import pytest
import torch
from tolerances import tolerance

from nested_learning.train.objective import next_token_loss


def naive(logits, targets):
    total, count = 0.0, 0
    for row, target_row in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, target in zip(row, target_row, strict=True):
            if target != -100:
                total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
                count += 1
    return total / count


def test_equals_a_sum_over_tokens_that_are_not_ignored():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (2, 5))
    targets[0, :3] = -100
    assert next_token_loss(logits, targets).item() == pytest.approx(
        naive(logits, targets), rel=tolerance(10 * 7)
    )


def test_count_is_the_divisor_of_the_whole_step():
    logits, targets = torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]])
    assert next_token_loss(logits, targets, 10).item() == pytest.approx(2 * math.log(8) / 10)
    assert torch.equal(next_token_loss(logits, targets, 7), next_token_loss(logits, targets, torch.tensor(7)))
    nothing = torch.full_like(targets, -100)
    assert next_token_loss(logits, nothing, torch.tensor(0)) == next_token_loss(logits, nothing, 0) == 0


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 64, 50).bfloat16(), torch.randint(50, (1, 64))
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        naive(logits.double(), targets), rel=tolerance(64 * 50, torch.float32, factor=0.1)
    )


def test_no_target_at_all_is_zero():
    assert next_token_loss(torch.randn(1, 2, 3), torch.full((1, 2), -100)).item() == 0
