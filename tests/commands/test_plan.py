import re

import pytest
import torch

from nested_learning.commands import nl
from nested_learning.config import load_config
from nested_learning.models.lm import HopeLM
from nested_learning.train.plan import Hardware, count_block, count_blocks, make_plan, optimizer_numbers

SMALL = ["model.dim=32", "model.num_heads=2", "model.chunk_size=8", "train.seq_len=64", "train.batch_size=8"]
H100 = {"memory_gb": 80, "peak_tflops": 989, "mfu": 0.2, "sharded": True}


def test_a_block_is_counted_as_it_is():
    config = load_config("pilot_smoke", SMALL)
    block = count_block(config)
    model = HopeLM(config.model)
    assert block.parameters == sum(p.numel() for p in model.blocks[0].parameters())
    assert block.fast * config.model.num_layers == model.init_state(1).numel()
    kept = {}
    x = torch.zeros(1, 64, 32, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.blocks[0](x)
    assert block.kept == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.05)


def test_adamw_keeps_two_numbers_per_parameter_and_sgd_one():
    assert optimizer_numbers(load_config("pilot_smoke")) == pytest.approx(2, rel=1e-3)
    assert optimizer_numbers(load_config("pilot_smoke", ["optim=sgd"])) == pytest.approx(1, rel=1e-3)


def test_flops_of_attention_are_those_of_the_formula():
    overrides = ["experiment=mixer_attention", "levels=mlp", "model.levels.0.chunk_size=null", *SMALL]
    config = load_config("pilot_smoke", overrides)
    hidden = config.model.levels[0].expansion or 8 / 3
    width = HopeLM(config.model).blocks[0].memory.levels[0].w_out.weight.shape[1]
    assert width >= hidden * 32
    dense = 2 * 64 * 32 * (4 * 32 + 3 * width)
    scores = 2 * 2 * 64 * 64 * 32
    assert count_block(config).flops == pytest.approx(dense + scores, rel=0.01)


def test_memory_shrinks_with_gpus_and_grows_with_rows():
    config = load_config("pilot_smoke", SMALL)
    blocks = count_blocks(config)
    one = make_plan(config, blocks, 2, Hardware(gpus=1, **H100))
    eight = make_plan(config, blocks, 2, Hardware(gpus=8, **H100))
    whole = make_plan(config, blocks, 2, Hardware(gpus=8, **{**H100, "sharded": False}))
    assert (one.rows, one.accumulation, eight.rows) == (8, 1, 1)
    assert one.optimizer == pytest.approx(8 * eight.optimizer) == pytest.approx(whole.optimizer)
    assert one.activations == 8 * eight.activations and one.fast == 8 * eight.fast
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    tight = Hardware(gpus=1, **{**H100, "memory_gb": (one.memory - one.activations / 4) / 2**30})
    assert make_plan(config, blocks, 2, tight).accumulation == 2
    with pytest.raises(ValueError, match=r"--gpus must divide train\.batch_size = 8, got 3"):
        make_plan(config, blocks, 2, Hardware(gpus=3, **H100))


def test_the_command(capsys):
    assert nl.main(["plan", "--config-name", "pilot_smoke", "--gpus", "1,8", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^\| 8 \| 1 x 1 \|", printed, re.M)
    for options, message in [
        (["--gpus", "0"], "--gpus must be whole numbers"),
        (["--mfu", "2"], "--mfu must be in"),
        (["--memory-gb", "-1"], "--memory-gb must be positive"),
    ]:
        assert nl.main(["plan", "--config-name", "pilot_smoke", *options]) == 2
        assert message in capsys.readouterr().err
