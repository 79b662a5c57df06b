"""Models for transformers equal our own: logits, states, generated tokens, losses, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import hope
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from nested_learning.commands import nl
from nested_learning.data.tokenizer import ByteTokenizer, train_sentencepiece
from nested_learning.eval.loading import Loaded
from nested_learning.hf import (
    HopeForCausalLM,
    HopeForCausalLMConfig,
    HopeTokenizer,
    StateCache,
    export_folder,
)
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mixer import MIXERS
from nested_learning.levels import LevelSpec

FAST = (LevelSpec(name="fast", chunk_size=4, layers=(0,)), LevelSpec())
WILD = "Grüße, 日本語 🙂👍🏽!\n\n  two  spaces </s> <12> \ttab é"


def make(mixer: str = "self_mod", **changes: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 23, "dim": 16, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    config = HopeForCausalLMConfig(
        hope=hope(mixer, **{**sizes, "levels": FAST, **changes}), eos_token_id=None
    )
    return HopeForCausalLM(config).double().eval()


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_saved_model_comes_back(mixer: str, tie_embeddings: bool, tmp_path: Path) -> None:
    model = make(mixer, tie_embeddings=tie_embeddings)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(back) is HopeForCausalLM and back.model.config == model.model.config
    ours, _ = model.model(tokens())
    found = back(tokens())
    torch.testing.assert_close(found.logits, ours, rtol=0, atol=1e-12)
    assert AutoConfig.from_pretrained(tmp_path).hope_config == model.model.config
    assert (tmp_path / "model.safetensors").is_file() and "library_name" in (
        tmp_path / "README.md"
    ).read_text()


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_generation_equals_ours(mixer: str) -> None:
    """Token by token on the state, from the start and from a cache."""
    model = make(mixer)
    ours = model.model.generate(tokens(), 12, temperature=0)
    assert torch.equal(model.generate(tokens(), max_new_tokens=12, do_sample=False), ours)
    assert torch.equal(model.generate(tokens(), max_new_tokens=12, do_sample=False, use_cache=False), ours)
    first = model(tokens()[:, :7])
    assert first.past_key_values.get_seq_length() == 7
    going_on = model.generate(
        tokens(), past_key_values=first.past_key_values, max_new_tokens=12, do_sample=False
    )
    assert torch.equal(going_on, ours)


@pytest.mark.parametrize("mixer", ["self_mod", "linear", "attention"])
def test_beams_reorder_states(mixer: str) -> None:
    """With the state as with rereading everything at every step."""
    model = make(mixer)
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False}
    found = model.generate(tokens(), **options)
    assert torch.equal(found, model.generate(tokens(), use_cache=False, **options))
    greedy = model.generate(tokens(), max_new_tokens=9, do_sample=False)
    assert mixer == "attention" or not torch.equal(found, greedy)


def test_sampling_is_that_of_transformers() -> None:
    model = make()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(tokens(), max_new_tokens=9, do_sample=True, top_k=5, use_cache=use_cache))
    assert torch.equal(*drawn)


def test_the_loss_is_that_of_the_labels() -> None:
    model, x = make(), tokens()
    labels = x.clone()
    labels[0, :5] = -100
    found = model(x, labels=labels)
    logits, _ = model.model(x)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    counted = int((labels[:, 1:] != -100).sum())
    assert float(found.loss) == pytest.approx(float(losses.sum()) / counted, rel=1e-6)  # float32 there
    half = model(x, labels=labels, num_items_in_batch=2 * counted)
    assert float(half.loss) == pytest.approx(float(losses.sum()) / counted / 2, rel=1e-6)


def test_padding_at_the_end_changes_nothing_before_it() -> None:
    model, x = make(), tokens(2, 13)
    mask = torch.ones_like(x)
    mask[1, 9:] = 0
    found = model(x, attention_mask=mask)
    alone = model(x[1:, :9])
    torch.testing.assert_close(found.logits[1:, :9], alone.logits, rtol=0, atol=1e-12)
    assert found.past_key_values is None and alone.past_key_values is not None


def test_logits_to_keep_and_tuples() -> None:
    model, x = make("linear"), tokens()
    whole = model(x).logits
    assert torch.equal(model(x, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(x, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    logits, cache = model(x, return_dict=False)
    assert torch.equal(logits, whole) and isinstance(cache, StateCache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 13, 16)}, "inputs_embeds is not supported"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be a StateCache, got DynamicCache"),
        ({"attention_mask": torch.tensor([[0, 1] + [1] * 11] * 2)}, "left padding"),
    ],
)
def test_what_is_not_supported_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("linear")(tokens(), **options)


def test_what_cannot_be_generated_is_refused() -> None:
    model = make("linear")
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"padding; rows of different lengths go into .*generate_text"):
        model.generate(tokens(), attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        model.generate(tokens(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="cannot be resized"):
        model.resize_token_embeddings(30)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make("linear")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hope"]["tie_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing weight model\.head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config["hope"]["mixr"] = "linear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown key 'model.mixr'; did you mean model.mixer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_options_of_the_model_survive(tmp_path: Path) -> None:
    memory = MemoryConfig(momentum=True)
    model = make("titans", memory=memory, levels=FAST, seq_len=16)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hope_config == model.model.config


# Tokenizers


def test_tokenizers_are_ours(tmp_path: Path) -> None:
    pieces = train_sentencepiece([WILD * 3, "one two three four"], 310)
    for number, own in enumerate((ByteTokenizer(), pieces)):
        HopeTokenizer.of(own).save_pretrained(tmp_path / str(number))
        back = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert type(back) is HopeTokenizer
        assert back(WILD)["input_ids"] == own.encode(WILD)
        assert back.decode(own.encode(WILD)) == WILD
        assert back.eos_token_id == own.eos_id and len(back) == back.vocab_size == own.vocab_size
        ended = [*own.encode("a"), own.eos_id, *own.encode("b")]
        assert back.decode(ended) == "a</s>b"
        assert back.decode(ended, skip_special_tokens=True) == "ab"
        assert len(back.get_vocab()) == own.vocab_size


# Checkpoints


def test_a_checkpoint_becomes_a_folder(exported: Path, loaded: Loaded, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "hf"
    assert nl.main(["export", str(exported), "--huggingface", str(folder)]) == 0
    assert "transformers reads it" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer("The quick brown", return_tensors="pt")
    ours, _ = loaded.model(text["input_ids"])
    torch.testing.assert_close(model(**text).logits, ours, rtol=0, atol=1e-5)
    written = model.generate(**text, max_new_tokens=15, do_sample=False)
    (expected,) = loaded.model.generate_text(
        ["The quick brown"], loaded.tokenizer, max_new_tokens=15, temperature=0
    )
    assert tokenizer.decode(written[0], skip_special_tokens=True) == "The quick brown" + expected
    card = (folder / "README.md").read_text()
    assert "| steps " in card and "| valid loss " in card and "# tiny\n" in card
    with pytest.raises(ValueError, match="must be new or empty"):
        export_folder(exported, folder)
    assert nl.main(["export", str(exported), "--huggingface", "x", "--output", "y.safetensors"]) == 2


@pytest.mark.thorough
def test_trainer_runs_an_epoch_and_the_loss_falls(exported: Path, tmp_path: Path) -> None:
    folder = export_folder(exported, tmp_path / "hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["pack my box with five dozen liquor jugs"[: 20 + n % 10] for n in range(48)]
    data = [tokenizer(text) for text in texts]
    batch = tokenizer.pad([dict(one) for one in data[:10]], return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    before = float(model(**batch, labels=labels).loss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    model.eval()
    after = float(model(**batch, labels=labels).loss)
    assert after < before - 0.3
    trainer.save_model(str(tmp_path / "trained"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_lm_eval_scores_the_folder_as_we_score_the_checkpoint(
    exported: Path, loaded: Loaded, tmp_path: Path
) -> None:
    """lm-eval's own adapter of transformers on the folder, and ours on the checkpoint."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from nested_learning.eval.lm import NestedLM

    folder = export_folder(exported, tmp_path / "hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=64)
    ours = NestedLM(loaded.model, loaded.tokenizer, batch_size=2, max_length=64)
    pairs = [("The quick brown", " fox"), ("How many dogs", " are there?"), ("One dog ", "sleeps all day.")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    for a, b in zip(theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
        assert b[0] == pytest.approx(a[0], rel=1e-5) and b[1] == a[1]
