import pytest
import torch
from torch import nn

from nested_learning.config import load_config
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim import build_optimizer, group_names, param_groups
from nested_learning.optim.config import OptimConfig


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.initial_w = nn.Parameter(torch.ones(2, 3, 3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.RMSNorm(4)
        self.conv = nn.Conv1d(4, 4, 3, groups=4)
        self.memory = Memory()
        self.linear = nn.Linear(4, 5)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_kinds_of_parameters():
    assert group_names(Model()) == {
        "matrix": ["linear.weight"],
        "head": [],
        "vector": ["norm.weight", "conv.weight", "conv.bias", "linear.bias"],
        "embedding": ["embedding.weight"],
        "memory": ["memory.initial_w"],
    }


@pytest.mark.parametrize(
    "mixer", ["self_mod", "self_mod_linear", "titans", "linear", "attention", "sliding_attention"]
)
def test_every_parameter_of_a_model_is_claimed_once(mixer):
    model = HopeLM(load_config("pilot_smoke", [f"model.mixer={mixer}"]).model)
    claimed = [id(p) for group in param_groups(model, 0.1) for p in group["params"]]
    assert sorted(claimed) == sorted(id(p) for p in model.parameters())
    names = group_names(model)
    assert names["memory"] and all(".initial_" in name for name in names["memory"])
    assert names["embedding"] == ["embedding.weight"]
    assert all(name.endswith(".weight") for name in names["matrix"])


def test_a_head_of_its_own_is_no_matrix_but_decays():
    model = HopeLM(HopeConfig(vocab_size=16, dim=16, num_layers=1, num_heads=2, tie_embeddings=False))
    assert group_names(model)["head"] == ["head.weight"]
    decays = {group["name"]: group["weight_decay"] for group in param_groups(model, 0.1)}
    assert decays == {"matrix": 0.1, "head": 0.1, "vector": 0.0, "embedding": 0.0, "memory": 0.0}


def test_only_matrices_decay():
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name == "linear.weight" else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_sgd_with_momentum_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.0), model)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert model.weight.item() == pytest.approx(1 - 0.1 - 0.1 * 1.5)


def test_errors():
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.ReLU(), 0.1)
    config = OptimConfig()
    config.name = "lion"
    with pytest.raises(ValueError, match=r"optim\.name must be one of adamw, sgd, muon, .*, got 'lion'"):
        build_optimizer(config, nn.Linear(1, 1))
