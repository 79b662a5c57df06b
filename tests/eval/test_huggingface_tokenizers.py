"""Tokenizers with special tokens of their own: every kind of request against lm-eval's own `hf` model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nested_learning.eval.lm import NestedLM
from nested_learning.eval.scorer import HuggingFaceTokenizer
from nested_learning.levels import LevelSpec
from nested_learning.models.pretrained import levels_from_pretrained

DATA = Path(__file__).parent / "data" / "zeroshot"
BOS, EOS, TURN = "<s>", "</s>", "<turn>"
SPECIAL = [BOS, EOS, TURN]
AFFIXES = {"before": f"{BOS} $A", "both": f"{BOS} $A {EOS}", "after": f"$A {EOS}"}
# How each writes spaces, what it adds to a text, and whether it has a token for the beginning of a text.
KINDS = {
    "llama": ("▁ before", "before", True),
    "gemma": ("▁", "before", True),
    "gpt2": ("bytes", None, False),
    "bos that is not added": ("bytes", None, True),
    "bos and eos": ("▁", "both", True),
    "eos without bos": ("bytes", "after", False),
}
PAIRS = [
    ("Which animal lays eggs?", " hen"),
    ("Which animal lays eggs?", " cow"),
    ("Which animal lays eggs? ", "dog"),
    ("Which animal lays eggs?\n", "  dog"),
    ("", "hen and cow"),
    ("", " hen"),
    (f"{BOS}Which animal", " lays eggs"),
    ("", f"{BOS}hen"),
    ("word " * 80, " hen and cow"),
    ("B7", "x9q"),
]
TEXTS = ["A short text.", "a long text, " * 40, "x", f"{BOS}begun", ""]


def make_tokenizer(spaces, affixes, with_bos):
    made = Tokenizer(models.BPE(byte_fallback=spaces != "bytes", unk_token=None))
    alphabet = []
    if spaces == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        extra = []
    else:
        first = [normalizers.Prepend("▁")] if spaces == "▁ before" else []
        made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        last = [decoders.Strip(" ", 1, 0)] if first else []
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
        extra = [f"<0x{byte:02X}>" for byte in range(256)]
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text().split("\n")]
    words = lines if spaces == "bytes" else [word for line in lines for word in line.split(" ")]
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *extra], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(words, trainer)
    if affixes is not None:
        ids = [(name, made.token_to_id(name)) for name in (BOS, EOS)]
        made.post_processor = processors.TemplateProcessing(single=AFFIXES[affixes], special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[TURN],
        **({"bos_token": BOS} if with_bos else {}),
    )


def make_model(vocab_size):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that what stands before a token counts
        bos_token_id=0,
        eos_token_id=1,
        **shape,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.replace(" ", "-"))
def hf(request):
    tokenizer = make_tokenizer(*KINDS[request.param])
    return make_model(len(tokenizer)), tokenizer


def both(model, tokenizer, batch_size=3, **options):
    """lm-eval's model and ours around the same weights."""
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu", **options)
    leveled = levels_from_pretrained(model, [LevelSpec(name="fast", chunk_size=8, layers=(1,))])
    return theirs, NestedLM(leveled, HuggingFaceTokenizer(tokenizer), batch_size=batch_size, **options)


def requests_of(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def test_tokenizers_add_what_their_kind_adds(hf, request):
    spaces, affixes, with_bos = KINDS[request.node.callspec.params["hf"]]
    _, tokenizer = hf
    plain = tokenizer.encode("hen", add_special_tokens=False)
    before, after = affixes in ("before", "both"), affixes in ("both", "after")
    assert tokenizer.encode("hen") == [0] * before + plain + [1] * after
    assert tokenizer.bos_token_id == (0 if with_bos else None)
    assert tokenizer.decode(plain) == "hen"


@pytest.mark.parametrize("options", [{}, {"max_length": 24}], ids=["own length", "24 tokens"])
def test_log_likelihoods_are_those_of_lm_eval(hf, options):
    theirs, ours = both(*hf, **options)
    requests = requests_of("loglikelihood", PAIRS)
    for pair, a, b in zip(PAIRS, theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
        assert b[0] == pytest.approx(a[0], abs=1e-4), pair
        assert b[1] == a[1]


def test_white_space_as_context(hf):
    """lm-eval needs a special token before it; without one, the prefix token stands there."""
    theirs, ours = both(*hf)
    requests = requests_of("loglikelihood", [(" ", "hen")])
    if hf[1].encode(""):
        (wanted,) = theirs.loglikelihood(requests)
    else:
        (wanted,) = theirs.loglikelihood(requests_of("loglikelihood", [("", " hen")]))
    assert ours.loglikelihood(requests)[0][0] == pytest.approx(wanted[0], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_length": 24}], ids=["own length", "24 tokens"])
def test_rolling_log_likelihoods_are_those_of_lm_eval(hf, options):
    theirs, ours = both(*hf, **options)
    requests = requests_of("loglikelihood_rolling", [(text,) for text in TEXTS])
    found = zip(theirs.loglikelihood_rolling(requests), ours.loglikelihood_rolling(requests), strict=True)
    for text, (a, b) in zip(TEXTS, found, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-4), text


def test_generated_texts_are_those_of_lm_eval(hf):
    theirs, ours = both(*hf, batch_size=1)
    options = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    contexts = ["A cat", "Which animal lays", "The end is", "word " * 80, f"{BOS}The", "x "]
    requests = requests_of("generate_until", [(text, dict(options)) for text in contexts])
    found, wanted = ours.generate_until(requests), theirs.generate_until(requests)
    assert found == wanted
    assert len(set(wanted)) > 3


@pytest.mark.parametrize("how", ["until", "generation settings"])
def test_a_special_token_can_end_a_text(how):
    """As turns of a conversation do: asked for by the task, or by the model's settings of generation."""
    tokenizer = make_tokenizer(*KINDS["gemma"])
    model = make_model(len(tokenizer))
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    _, ours = both(model, tokenizer)
    (plain,) = ours.generate_until(requests_of("generate_until", [("A cat", options)]))
    third = tokenizer.encode(plain, add_special_tokens=False)[2]
    with torch.no_grad():  # where that token was the likeliest, <turn> is
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(TURN)] = 1.1 * model.lm_head.weight[third]
    if how == "until":
        options["until"] = [TURN]
    else:
        model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids(TURN)]
    theirs, ours = both(model, tokenizer, batch_size=1)
    requests = requests_of("generate_until", [("A cat", options)])
    (found,), (wanted,) = ours.generate_until(requests), theirs.generate_until(requests)
    assert found == wanted
    assert 0 < len(found) < len(plain)
    assert plain.startswith(found)


def test_adapters_of_different_tokenizers_have_different_names():
    tokenizer = make_tokenizer(*KINDS["gemma"])
    tokenizer.name_or_path = "some/folder"
    assert HuggingFaceTokenizer(tokenizer).fingerprint == "some__folder"
