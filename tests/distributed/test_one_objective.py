"""The same objective everywhere: losses, gradient norms and logits do not depend on how a run is spread."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tolerances import assert_same
from work import losses, tiny_overrides, train, write_shards

GOLDEN = json.loads((Path(__file__).parent / "golden_pilot_smoke.json").read_text())
PILOT = [
    *("train.steps=20", "train.log_every=1", "train.eval_every=20", "train.save_every=20"),
    *("train.eval_batches=1", "train.sample_tokens=0", "train.device=cpu", "logging.progress=false"),
]
MACHINE = 1e-4  # golden losses come from one CPU; another one rounds in another order


def pilot(folder, strategy, count):
    run_ranks(count, folder, train, [*PILOT, f"train.output_dir={folder}", f"name={strategy}"], strategy)
    return losses(folder / strategy), losses(folder / strategy, "grad_norm")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Losses and gradient norms of `pilot_smoke` in one process."""
    return pilot(tmp_path_factory.mktemp("single"), "single", 1)


def test_pilot_smoke_gives_the_golden_losses(single):
    assert list(single[0]) == list(range(1, 21))
    assert list(single[0].values()) == pytest.approx(GOLDEN["losses"], rel=MACHINE)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(tmp_path, single, strategy):
    found = pilot(tmp_path, strategy, 2)
    assert list(found[0].values()) == pytest.approx(list(single[0].values()), rel=1e-5)
    assert list(found[1].values()) == pytest.approx(list(single[1].values()), rel=1e-3)
    assert list(found[0].values()) == pytest.approx(GOLDEN["losses"], rel=MACHINE)


VARIANTS = {
    "accumulation": {"train.accumulation": 2},
    "checkpointing": {"parallel.activation_checkpointing": "true"},
    "slow_level": {"levels": "fast", "model.levels.1.chunk_size": 48},  # every third step
    "attention": {"model.mixer": "attention", "levels": "mlp"},
    "packing": {"data.loader.crossing": "false", "data.loader.packing": "true", "train.seq_len": 64},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_alike(tmp_path, variant):
    more = {"train.steps": 7, **VARIANTS[variant]}
    if more.get("levels") == "mlp":
        more["model.levels.0.chunk_size"] = "null"
    if variant == "packing":
        more["data.shards"] = write_shards(tmp_path / "shards")
    expected = None
    for strategy, count in (("single", 1), ("ddp", 2), ("fsdp", 2)):
        run_ranks(count, tmp_path, train, tiny_overrides(tmp_path, strategy, **more), strategy)
        found = list(losses(tmp_path / strategy).values())
        expected = expected or found
        assert len(found) == 7 and found == pytest.approx(expected, rel=1e-5)


def logits_of(strategy, other_rows):
    """Logits of this rank's row, when the row of rank 1 is as usual or another one; then the state's sums."""
    from functools import partial

    from nested_learning.config import load_config
    from nested_learning.models.lm import HopeLM
    from nested_learning.optim import build_optimizer
    from nested_learning.runtime import set_seed
    from nested_learning.train.strategy import build_strategy

    levels = "model.levels=[{name: fast, chunk_size: 4},{name: mlp}]"
    sizes = ["model.dim=32", "model.num_heads=2", "model.num_layers=2", "model.chunk_size=4"]
    config = load_config("pilot_smoke", ["data=bytes", "train.device=cpu", levels, *sizes])
    spread = build_strategy(strategy, config)
    set_seed(0)
    model, _ = spread.prepare(HopeLM(config.model), partial(build_optimizer, config.optim))
    rows = torch.arange(2 * 24).view(2, 24)
    if other_rows:
        rows[1] = 200
    count = spread.world_size
    kept, state = [], None
    with torch.no_grad():
        for part in rows.chunk(count)[spread.rank].split(12, 1):  # the memory is carried from part to part
            logits, state = model(part, state) if state is not None else model(part)
            state = state.map(torch.clone)  # of its own: parameters are freed after a sharded forward pass
            kept.append(logits)
    spread.close()
    return torch.cat(kept, 1).numpy()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_rows_of_other_ranks_have_no_influence(tmp_path, strategy):
    usual = run_ranks(2, tmp_path, logits_of, strategy, False)
    other = run_ranks(2, tmp_path, logits_of, strategy, True)
    alone = run_ranks(1, tmp_path, logits_of, "single", False)[0]
    assert (usual[0] == other[0]).all()
    assert abs(usual[1] - other[1]).max() > 0.1
    for rank in range(2):
        found, expected = torch.from_numpy(usual[rank][0]), torch.from_numpy(alone[rank])
        assert_same(found, expected, length=2 * 24 * 32, factor=1)


def collectives(strategy, accumulation):
    """How often each collective is called in one update."""
    import tempfile

    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    from nested_learning.config import load_config
    from nested_learning.data.corpus import Corpus
    from nested_learning.data.tokenizer import ByteTokenizer
    from nested_learning.models.lm import HopeLM
    from nested_learning.runtime import set_seed
    from nested_learning.train.strategy import build_strategy
    from nested_learning.train.trainer import Trainer

    folder = Path(tempfile.mkdtemp())
    overrides = tiny_overrides(folder, "x", **{"train.accumulation": accumulation})
    config = load_config("pilot_smoke", overrides)
    tokens = np.arange(2000, dtype=np.uint16) % 256
    corpus = Corpus(
        train=tokens,
        valid=tokens,
        tokenizer=ByteTokenizer(),
        unigram_entropy=1.0,
        bytes_per_token=1.0,
        provenance={},
    )
    spread = build_strategy(strategy, config)
    set_seed(0)
    trainer = Trainer(config, HopeLM(config.model), corpus, spread)
    trainer.update(next(trainer.loader))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        trainer.update(next(trainer.loader))
    spread.close()
    return {event.key: event.count for event in seen.key_averages() if event.key.startswith("c10d::")}


@pytest.mark.parametrize("strategy, operation", [("ddp", "allreduce_"), ("fsdp", "_reduce_scatter_base_")])
def test_accumulation_reduces_gradients_once(tmp_path, strategy, operation):
    one, two = (run_ranks(2, tmp_path, collectives, strategy, count)[0] for count in (1, 2))
    assert one[f"c10d::{operation}"] == two[f"c10d::{operation}"] > 0, (one, two)


def test_learning_online_is_the_same_on_two_ranks(tmp_path):
    more = {"train.inner": "online", "adapt.lr": 0.1, "adapt.chunk_size": 8, "train.steps": 5}
    for strategy, count in (("single", 1), ("ddp", 2)):
        run_ranks(count, tmp_path, train, tiny_overrides(tmp_path, strategy, **more), strategy)
    alone, spread = (list(losses(tmp_path / name).values()) for name in ("single", "ddp"))
    assert len(alone) == 5 and spread == pytest.approx(alone, rel=1e-5)
    with pytest.raises(AssertionError, match="train.inner = online needs whole parameters on every rank"):
        run_ranks(2, tmp_path, train, tiny_overrides(tmp_path, "fsdp", **more), "fsdp")
