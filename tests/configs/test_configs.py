import re
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException

from nested_learning.config import load_config
from nested_learning.layers.mixer import MIXERS
from nested_learning.models.lm import HopeLM
from nested_learning.train.config import RunConfig, run_config

ROOT = Path(__file__).parents[2] / "configs"
ENTRIES = ["pilot_smoke", "mid_smoke", "pilot", "mid", "target", "byte_bar"]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiment").glob("*.yaml"))
NOT_CHOICES = ["continual_segments_sample"]  # read by scripts/eval/continual.py, at a path that users know
GROUPS = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(ROOT.glob("*/*.yaml"))
    if path.parent.name != "experiment" and path.stem not in NOT_CHOICES
]
MILLIONS = {"pilot": 168, "mid": 780, "target": 1340, "byte_bar": 36}


def parameters(config):
    with torch.device("meta"):
        model = HopeLM(config.model)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_composes_and_builds(entry):
    config = load_config(entry)
    assert config.name == entry
    assert config.model.vocab_size == config.data.tokenizer.vocab_size
    count = parameters(config)
    if entry in MILLIONS:
        assert config.model.vocab_size == (257 if entry == "byte_bar" else 32000)
        assert count == pytest.approx(MILLIONS[entry] * 1e6, rel=0.05)
    else:
        assert count < 2e6


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_and_builds(experiment):
    config = load_config("pilot_smoke", [f"experiment={experiment}"])
    assert config.name == experiment
    assert config.optim.lr == load_config("pilot_smoke").optim.lr
    parameters(config)


@pytest.mark.parametrize("choice", GROUPS)
def test_every_group_choice_composes(choice):
    load_config("pilot_smoke", [choice])


def test_the_named_experiments_are_there():
    mixers = {f"mixer_{m}" for m in MIXERS}
    changes = ["full", "no_delta", "no_momentum", "no_retention", "no_cms", "slow_k", "slow_v", "slow_q"]
    assert mixers | {f"ablation_{change}" for change in changes} <= set(EXPERIMENTS)


@pytest.mark.parametrize(
    "experiment", [e for e in EXPERIMENTS if e.startswith("ablation_") and "full" not in e]
)
def test_an_ablation_changes_one_thing(experiment):
    full = flat(load_config("pilot_smoke", ["experiment=ablation_full"]).to_dict())
    ablated = flat(load_config("pilot_smoke", [f"experiment={experiment}"]).to_dict())
    assert len([key for key in full if full[key] != ablated[key] and key != "name"]) == 1


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e.startswith("mixer_")])
def test_a_mixer_experiment_changes_the_mixer_only(experiment):
    base = flat(load_config("pilot_smoke").to_dict())
    other = flat(load_config("pilot_smoke", [f"experiment={experiment}"]).to_dict())
    allowed = {"name", "model.mixer"}
    if experiment == "mixer_self_mod_linear":  # what its gain forgets comes back in no other way
        allowed.add("model.memory.retention_target")
    assert {key for key in base if base[key] != other[key]} <= allowed
    assert other["model.mixer"] == experiment.removeprefix("mixer_")


def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}").items()}
    return {prefix.lstrip("."): value}


@pytest.mark.parametrize(
    "override, named",
    [
        ("optim.lrr=1", "optim.lrr"),
        ("+optim.lrr=1", "'optim.lrr'; did you mean optim.lr?; allowed there: name, lr"),
        ("model.memory.dleta=true", "model.memory.dleta"),
        ("nonsense=1", "nonsense"),
        ("optim.lr=abc", "optim.lr"),
        ("experiment=nothing", "experiment/nothing"),
    ],
)
def test_unknown_key_or_wrong_type_on_the_command_line(override, named):
    with pytest.raises((HydraException, ValueError), match=re.escape(named)):
        load_config("pilot_smoke", [override])


@pytest.mark.parametrize(
    "text, named",
    [
        ("optim: {lrr: 1}", "lrr"),
        ("model: {levels: [{name: a, chunk: 3}]}", "chunk"),
        ("trian: {steps: 3}", "trian"),
        ("train: {steps: many}", "steps"),
    ],
)
def test_unknown_key_or_wrong_type_in_yaml(tmp_path, text, named):
    (tmp_path / "mine.yaml").write_text(f"defaults: [run_schema, _self_]\n{text}\n")
    with pytest.raises((HydraException, ValueError), match=named):
        load_config(tmp_path / "mine.yaml")


def test_a_file_of_ones_own(tmp_path):
    text = "defaults: [run_schema, _self_]\nmodel: {dim: 32, levels: [{name: a, chunk_size: 3}, {name: b}]}\n"
    (tmp_path / "mine.yaml").write_text(text + "data: {tokenizer: {vocab_size: 600}}\n")
    config = load_config(tmp_path / "mine.yaml", ["optim.betas=[0.5,0.6]"])
    assert [(level.name, level.chunk_size) for level in config.model.levels] == [("a", 3), ("b", None)]
    assert config.model.vocab_size == 600
    assert config.optim.betas == (0.5, 0.6)
    with pytest.raises(FileNotFoundError, match="no configuration 'nowhere'"):
        load_config("nowhere")


def test_the_choice_train_smoke_is_the_default_of_the_schema():
    assert load_config("pilot_smoke", ["train=smoke"]).train == RunConfig().train


def test_a_file_that_is_no_run_is_one_line():
    with pytest.raises(ValueError, match=r"^unknown key 'scheduler'; did you mean") as error:
        load_config("default_config")
    assert "\n" not in str(error.value)


def test_dictionary_round_trip():
    config = load_config("mid_smoke", ["optim.clip_norm=null", "data.files=[a.txt,b.txt]"])
    assert run_config(config.to_dict()) == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lr=-1", "optim.lr must be positive, got -1.0"),
        (
            "optim.name=lion",
            "optim.name must be one of adamw, sgd, muon, m3, dgd, delta_momentum, deep_momentum, got 'lion'",
        ),
        ("optim.min_lr_ratio=2", "optim.min_lr_ratio must be in [0, 1], got 2.0"),
        ("optim.clip_norm=0", "optim.clip_norm must be positive, got 0.0"),
        ("train.steps=0", "train.steps must be at least 1, got 0"),
        ("train.accumulation=3", "train.accumulation must divide train.batch_size = 8, got 3"),
        ("train.device=gpu", "train.device must be auto, cpu, cuda, cuda:NUMBER or mps, got 'gpu'"),
        ("seed=-1", "seed must be in [0, 9223372036854775808), got -1"),
        ("train.precision=fp8", "train.precision must be one of auto, fp32, bf16, got 'fp8'"),
        ("data.valid_fraction=1", "data.valid_fraction must be in (0, 1), got 1.0"),
        ("data.tokenizer.kind=byte", "data.tokenizer.vocab_size must be 257"),
        ("logging.wandb=yes", "logging.wandb must be one of none, offline, online, got 'yes'"),
        ("model.num_heads=5", "model.num_heads must divide model.dim = 128, got 5"),
    ],
)
def test_bad_value_is_named(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("pilot_smoke", [override])
