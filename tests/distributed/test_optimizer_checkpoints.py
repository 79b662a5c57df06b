"""Every optimizer through torch's own checkpoint helpers: resumed runs equal those that never stopped."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nested_learning.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    GeneralizedGradientDescent,
    LearnedRates,
    MultiFrequencyOptimizer,
    build_optimizer,
    setup_optimizers,
)
from nested_learning.optim.config import M3Config, OptimConfig

STEPS = 9
STOPS = (1, 2, 3, 4, 6)  # inside and at the ends of M3's block, and of the slow level's window
BLOCK = M3Config(slow_every=3, ns_dtype="float32")


class Net(nn.Module):
    """Two levels, with matrices, vectors and a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.levels = nn.ModuleDict(
            {
                "fast": nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6)),
                "slow": nn.Sequential(nn.Linear(6, 8), nn.Conv1d(8, 4, 1), nn.Tanh()),
            }
        )

    def forward(self, x):
        fast, (linear, conv, bend) = self.levels["fast"], self.levels["slow"]
        return bend(conv(linear(fast(x))[..., None]))


def by_name(name, is_slow=False, **options):
    def make(model):
        slow = {"slow": (3, [n for n, _ in model.named_parameters() if ".slow." in n])} if is_slow else None
        return build_optimizer(OptimConfig(name=name, lr=0.01, m3=BLOCK, **options), model, slow)

    return make


def slow_rates(model):
    levels = {"slow": list(model.levels["slow"].parameters())}
    inner = LearnedRates(M3(model.parameters(), slow_every=2, ns_dtype="float32"), levels, beta=0.1)
    return MultiFrequencyOptimizer(inner, {"slow": 3}, levels)


def slow_dampened(model):
    """Its first step is unlike its others: dampening leaves it out."""
    levels = {"slow": list(model.levels["slow"].parameters())}
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    return MultiFrequencyOptimizer(inner, {"slow": 3}, levels)


def per_level(model):
    return list(setup_optimizers(model, {"fast": 1, "slow": 1}, 0.01, learn_rates=0.1).values())


SPREAD = {
    "adamw": by_name("adamw"),
    "sgd": by_name("sgd"),
    "muon": by_name("muon"),
    "m3": by_name("m3"),
    "dgd": by_name("dgd"),
    "adamw_slow": by_name("adamw", True),
    "sgd_slow": by_name("sgd", True, momentum=0.0),
    "muon_slow": by_name("muon", True),
    "m3_slow": by_name("m3", True),
    "M3": lambda model: M3(model.parameters(), slow_every=3, accumulation="sum", ns_dtype="float32"),
    "DGD": DeltaGradientDescent,
    "rates_slow": slow_rates,
    "dampened_slow": slow_dampened,
    "per_level": per_level,
}
ALONE = {
    "delta_momentum": by_name("delta_momentum"),
    "deep_momentum": by_name("deep_momentum"),
    "delta_momentum_slow": by_name("delta_momentum", True),
    "deep_momentum_slow": by_name("deep_momentum", True),
    "Delta": lambda m: DeltaMomentum(m.parameters(), delta="normalized", precondition="diagonal", lr=0.01),
    "Deep": lambda m: DeepMomentum(m.parameters(), objective="l2"),
    "GGD": GeneralizedGradientDescent,
}
MAKERS = SPREAD | ALONE
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)


def train(model, optimizer, first, last):
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for step in range(first, last + 1):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum(1).mean().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()


def weights(model):
    return copy.deepcopy(dict(model.named_parameters()))


def goes_on_bit_for_bit(maker, folder, options, spread=lambda model: None, stops=STOPS):
    """Save after each of `stops`, load into fresh optimizers, and go to the end."""

    def fresh():
        model = Net()
        spread(model)
        return model, maker(model)

    model, optimizer = fresh()
    saved, at = {}, {}
    for step in range(1, STEPS + 1):
        train(model, optimizer, step, step)
        if step in stops:
            at[step] = weights(model)
            saved[str(step)] = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    with warnings.catch_warnings(action="ignore"):  # that one process is one process
        dcp.save(saved, checkpoint_id=folder)
    resumed = {step: fresh() for step in stops}
    room = {str(step): get_optimizer_state_dict(*pair, options=options) for step, pair in resumed.items()}
    assert {s: room[s].keys() for s in room} == {s: saved[s].keys() for s in saved}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(room, checkpoint_id=folder)
    end = weights(model)
    for step, (other, its_optimizer) in resumed.items():
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(at[step][name])
        set_optimizer_state_dict(other, its_optimizer, room[str(step)], options=options)
        train(other, its_optimizer, step + 1, STEPS)
        for name, parameter in other.named_parameters():
            assert torch.equal(local(parameter), local(end[name])), (step, name)
            assert not torch.equal(local(parameter), local(at[step][name])), (step, name)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


CASES = [(name, kind) for name in MAKERS for kind in ("nested", "flat")]
CASES += [(name, "full") for name in ("dgd", "m3_slow", "rates_slow", "Deep")]


@pytest.mark.parametrize("name, kind", CASES)
def test_one_process_goes_on_bit_for_bit(name, kind, tmp_path):
    options = {"nested": None, "flat": FLAT, "full": FULL}[kind]
    goes_on_bit_for_bit(MAKERS[name], tmp_path, options)


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"adamw", "sgd"}))  # torch's own notice it
def test_asking_for_the_state_before_the_first_step_changes_nothing(name):
    """torch's helper makes the state by a step with zero gradients and rates."""
    asked, reference, resumed = Net(), Net(), Net()
    optimizer, other = MAKERS[name](asked), MAKERS[name](resumed)
    state = copy.deepcopy(get_optimizer_state_dict(asked, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(asked.parameters(), reference.parameters(), strict=True))
    set_optimizer_state_dict(resumed, other, state)
    train(reference, MAKERS[name](reference), 1, STEPS)
    train(asked, optimizer, 1, STEPS)
    train(resumed, other, 1, STEPS)
    for a, b, c in zip(asked.parameters(), reference.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)


def on_this_rank(folder, names, stops):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for name in names:
        goes_on_bit_for_bit(SPREAD[name], folder / name, FLAT, lambda m: fully_shard(m, mesh=mesh), stops)
    return names


def test_two_ranks_go_on_bit_for_bit(tmp_path):
    """FSDP2; M3's block and a slow level's window at once."""
    assert run_ranks(2, tmp_path, on_this_rank, tmp_path, ["m3_slow"], (2, 4)) == [["m3_slow"]] * 2


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit_with_every_optimizer(tmp_path):
    """All that take sharded parameters, in one start of the processes."""
    assert run_ranks(2, tmp_path, on_this_rank, tmp_path, list(SPREAD), STOPS) == [list(SPREAD)] * 2
