"""M3 against NumPy, against torch's Muon and AdamW, and what it costs and keeps."""

from __future__ import annotations

import io

import naive_optimizers as naive
import pytest
import torch
from tolerances import assert_same, tolerance
from torch import nn

from nested_learning.optim import M3, m3
from nested_learning.optim.config import M3Config

LENGTH = 20 * 5 * 6  # operations in a row: steps, iterations of Newton-Schulz, width
SHAPES = [(6, 4), (4, 6), (5, 5), (6, 4)]


def weights(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype)) for s in shapes]


def gradients(steps, shapes=SHAPES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes] for _ in range(steps)]


def run(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


VARIANTS = [
    {},
    {"second_moment": False},
    {"slow_weight": 0.0},
    {"slow_weight": -0.7},
    {"accumulation": "sum", "adjust": "none"},
    {"accumulation": "sum", "adjust": "none", "second_moment": False, "polynomial": "cubic"},
    {"eps_inside": False, "eps": 0.1, "adjust": "none"},
    {"eps_inside": True, "eps": 0.1, "adjust": "none"},
    {"nesterov": True, "adjust": "original", "ns_steps": 3},
    {"adjust": "match_rms_adamw", "betas": (0.5, 0.8, 0.6), "slow_every": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_naive_loop_for_20_steps(options):
    options = {"slow_every": 4, "ns_dtype": "param", **options}
    params, grads = weights(), gradients(20)
    start = [p.detach().numpy().copy() for p in params]
    run(M3(params, lr=0.03, weight_decay=0.1, **options), params, grads)
    for i, p in enumerate(params):
        expected = naive.m3(start[i], [g[i].numpy() for g in grads], 0.03, M3Config(**options), 0.1)
        assert_same(p.detach(), torch.from_numpy(expected), LENGTH)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_without_slow_memory_and_second_moment_it_is_muon(adjust, nesterov):
    shapes = [(24, 16), (16, 40), (24, 16)]
    mine, theirs, grads = (
        weights(torch.float32, shapes),
        weights(torch.float32, shapes),
        gradients(20, shapes),
    )
    start = [p.detach().clone() for p in mine]
    options = {"slow_weight": 0.0, "second_moment": False, "adjust": adjust, "nesterov": nesterov}
    run(M3(mine, lr=0.02, weight_decay=0.1, betas=(0.9, 0.9, 0.9), **options), mine, grads)
    muon = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust
    )
    run(muon, theirs, grads)
    rounding = tolerance(5, torch.bfloat16, factor=1)  # five iterations of products rounded to bfloat16
    for a, b, before in zip(mine, theirs, start, strict=True):
        assert (a - b).norm() < rounding * (b - before).norm()


def test_vectors_and_groups_marked_adamw_are_updated_by_adamw():
    shapes = [(6,), (4, 6), (2, 3, 4)]
    mine, theirs, grads = weights(shapes=shapes), weights(shapes=shapes), gradients(20, shapes)
    groups = [{"params": [mine[0], mine[2]]}, {"params": [mine[1]], "adamw": True, "lr": 0.01}]
    run(M3(groups, lr=0.03, weight_decay=0.1, adamw_betas=(0.8, 0.9), adamw_eps=1e-6), mine, grads)
    expected = [{"params": [theirs[0], theirs[2]]}, {"params": [theirs[1]], "lr": 0.01}]
    run(torch.optim.AdamW(expected, lr=0.03, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6), theirs, grads)
    assert_same(mine, theirs, LENGTH)


def test_slow_newton_schulz_runs_once_per_block(monkeypatch):
    counts = []
    original = m3.newton_schulz_all

    def counting(matrices, *rest):
        counts[-1] += 1
        return original(matrices, *rest)

    monkeypatch.setattr(m3, "newton_schulz_all", counting)
    params = weights()
    optimizer = M3(params, slow_every=4)
    for step in gradients(9):
        counts.append(0)
        run(optimizer, params, [step])
    assert counts == [1, 1, 1, 1, 2, 1, 1, 1, 2]


def test_no_state_is_kept_that_nothing_reads():
    params = weights()
    run(M3(params, slow_weight=0.0, second_moment=False), params, gradients(1))
    optimizer = M3(params, slow_weight=0.0, second_moment=False)
    run(optimizer, params, gradients(1))
    assert set(optimizer.state[params[0]]) == {"step", "fast"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_saved_in_the_middle_of_a_block_goes_on_bit_for_bit(dtype):
    grads = gradients(12)
    whole = weights(dtype)
    run(M3(whole, slow_every=4), whole, grads)
    first, file = weights(dtype), io.BytesIO()
    before = M3(first, slow_every=4)
    run(before, first, grads[:6])
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = M3(first, slow_every=4)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert after.state[first[0]]["fast"].dtype == torch.float32
    assert after.state[first[0]]["slow_output"].dtype == torch.bfloat16
    run(after, first, grads[6:])
    for a, b in zip(first, whole, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_that_misses_a_step_keeps_its_own_clock():
    params, alone = weights(shapes=[(4, 6), (5, 5)]), weights(shapes=[(4, 6), (5, 5)])
    grads = gradients(10, [(4, 6), (5, 5)])
    optimizer = M3(params, slow_every=2, ns_dtype="param")
    for i, (a, b) in enumerate(grads):
        params[0].grad, params[1].grad = a, b if i % 2 else None
        optimizer.step()
    run(M3(alone[1:], slow_every=2, ns_dtype="param"), alone[1:], [g[1:] for g in grads[1::2]])
    assert optimizer.state[params[1]]["step"] == 5
    assert_same(params[1], alone[1], LENGTH)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"betas": (0.9, 1.5, 0.9)}, r"m3\.betas must be in \[0, 1\), got 1\.5"),
        ({"slow_every": 0}, r"m3\.slow_every must be at least 1, got 0"),
        ({"accumulation": "mean"}, r"m3\.accumulation must be one of ema, sum, got 'mean'"),
        ({"adjust": "rsm"}, r"m3\.adjust must be one of rms, .*, got 'rsm'"),
        ({"nesterov": True, "accumulation": "sum"}, r"m3\.nesterov needs m3\.accumulation = ema"),
        ({"ns_dtype": "fp8"}, r"m3\.ns_dtype must be one of bfloat16, float32, param, got 'fp8'"),
        ({"eps": 0.0}, r"m3\.eps must be positive, got 0\.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        M3(weights(), **options)
    with pytest.raises(ValueError, match=message):  # in a group just as well
        M3([{"params": weights(), **options}])
