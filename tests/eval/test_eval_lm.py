"""The adapter inside lm-eval: its own runner, its own tasks, and its own `hf` model as the judge."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.lm import Harness, HarnessSettings, NestedLM, sampling_of
from nested_learning.eval.questions import TASKS, read_questions
from nested_learning.eval.results import read_result
from nested_learning.eval.samples import samples_path
from nested_learning.eval.scorer import HuggingFaceTokenizer, Sampling
from nested_learning.eval.zeroshot import ZeroShot, ZeroShotSettings
from nested_learning.levels import LevelSpec
from nested_learning.models.pretrained import levels_from_pretrained

DATA = Path(__file__).parent / "data" / "zeroshot"
SOURCES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "siqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="session")
def harness_folder(tmp_path_factory):
    """lm-eval's own seven tasks, but with the local files as their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        source = Path(lm_eval.tasks.__path__[0]) / SOURCES.get(name, f"{name}/{name}.yaml")
        data = {split: str(DATA / f"{name}.jsonl") for split in ("train", task.split)}
        (folder / f"{name}.yaml").write_text(
            f"include: {source}\ntask: local_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps({'data_files': data})}\n"
        )
    return folder


@pytest.mark.thorough
def test_lm_eval_scores_our_seven_tasks_as_we_do(loaded, harness_folder, tmp_path):
    """Same prompts (every log-likelihood) and same scoring (every accuracy) as lm-eval's own definitions."""
    output = tmp_path / "zeroshot.json"
    ours = evaluate(ZeroShot(loaded, ZeroShotSettings(local_dir=DATA)), output)
    assert read_result(output) == ours
    theirs = simple_evaluate(
        model=NestedLM(loaded.model, loaded.tokenizer, batch_size=4),
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(harness_folder), include_defaults=False),
        bootstrap_iters=10,
    )
    for metric in ours.metrics:
        found = theirs["results"][f"local_{metric.task}"]
        assert metric.value == pytest.approx(found[f"{metric.name},none"]), metric
        assert metric.stderr == pytest.approx(found[f"{metric.name}_stderr,none"]), metric
    reported = {(task, key.split(",")[0]) for task, row in theirs["results"].items() for key in row}
    missing = {(f"local_{m.task}", m.name) for m in ours.metrics} ^ {
        (task, name) for task, name in reported if name in ("acc", "acc_norm")
    }
    assert not missing
    for name in TASKS:
        questions = read_questions(name, DATA, None)
        samples = sorted(theirs["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        for question, sample in zip(questions, samples, strict=True):
            assert [tuple(pair) for pair in sample["arguments"]] == question.pairs


@pytest.fixture(scope="module")
def hf():
    """A random Llama of two layers and a byte-level tokenizer made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text().split("\n")]
    made.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=0, **shape)
    return LlamaForCausalLM(config).eval(), tokenizer


def both(hf, **options):
    """lm-eval's model and ours around the same weights."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = hf
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu", **options)
    levels = [LevelSpec(name="fast", chunk_size=8, layers=(1,))]
    ours = NestedLM(
        levels_from_pretrained(model, levels), HuggingFaceTokenizer(tokenizer), batch_size=3, **options
    )
    return theirs, ours


def test_a_hugging_face_model_scores_as_in_lm_eval_s_own_adapter(hf):
    theirs, ours = both(hf, max_length=64)
    pairs = [
        ("Which animal lays eggs?", " hen"),
        ("Which animal lays eggs?", " cow"),
        ("Which animal lays eggs? ", "dog"),
        ("Which animal lays eggs?\n", "  dog"),
        ("", "hen"),
        ("word " * 80, " hen and cow"),
        ("B7", "x9q"),
    ]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    for a, b in zip(theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
        assert b[0] == pytest.approx(a[0], rel=1e-5)
        assert b[1] == a[1]
    texts = ["A short text.", "a long text, " * 60, "x"]
    requests = [request("loglikelihood_rolling", text) for text in texts]
    for c, d in zip(
        theirs.loglikelihood_rolling(requests), ours.loglikelihood_rolling(requests), strict=True
    ):
        assert d == pytest.approx(c, rel=1e-5)
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [request("generate_until", text, options) for text in ("A cat", "Which animal", "The end is")]
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_one_task_gives_equal_numbers_for_both_adapters(hf, harness_folder):
    tasks = {"tasks": ["local_arc_easy", "local_winogrande"], "bootstrap_iters": 10}
    manager = TaskManager(include_path=str(harness_folder), include_defaults=False)
    a, b = (simple_evaluate(model=model, task_manager=manager, **tasks) for model in both(hf))
    for name in tasks["tasks"]:
        assert a["results"][name] == b["results"][name]
        for one, two in zip(a["samples"][name], b["samples"][name], strict=True):
            first, second = ([float(r[0][0]) for r in s["resps"]] for s in (one, two))
            assert second == pytest.approx(first, rel=1e-5)


def test_tasks_by_name_give_a_result_file_and_keep_answers(loaded, harness_folder, tmp_path, monkeypatch):
    manager = TaskManager(include_path=str(harness_folder), include_defaults=False)
    output = tmp_path / "lm.json"
    settings = HarnessSettings(
        tasks=("local_piqa", "local_boolq"), limit=3, manager=manager, scorer={"batch_size": 4}
    )
    result = evaluate(Harness(loaded, settings), output)
    assert read_result(output) == result
    same = ZeroShotSettings(tasks=("piqa", "boolq"), local_dir=DATA, max_samples=3)
    ours = evaluate(ZeroShot(loaded, same), tmp_path / "z.json")
    numbers = [(m.task.removeprefix("local_"), m.name, m.value, m.n) for m in result.metrics]
    assert sorted(numbers) == sorted((m.task, m.name, m.value, m.n) for m in ours.metrics)
    assert samples_path(output).read_text().count("\n") == 6
    before = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(NestedLM, "loglikelihood", lambda *_: pytest.fail("answers are not kept"))
        evaluate(Harness(loaded, settings), output)
    assert output.read_bytes() == before


def test_every_kind_of_request_goes_to_the_cache_as_it_comes(loaded):
    model = NestedLM(loaded.model, loaded.tokenizer)
    kept = []
    model.cache_hook.add_partial = lambda method, arguments, answer: kept.append((method, arguments, answer))
    (score,) = model.loglikelihood([request("loglikelihood", "the fox", " runs")])
    (value,) = model.loglikelihood_rolling([request("loglikelihood_rolling", "the fox")])
    (text,) = model.generate_until([request("generate_until", "the fox", {"max_gen_toks": 2})])
    assert kept == [
        ("loglikelihood", ("the fox", " runs"), score),
        ("loglikelihood_rolling", ("the fox",), value),
        ("generate_until", ("the fox", {"max_gen_toks": 2}), text),
    ]


def test_generation_options_are_lm_eval_s():
    assert sampling_of({}) == Sampling(max_new_tokens=256)
    assert sampling_of(
        {"until": "\n", "max_gen_toks": 4, "temperature": 0.7, "do_sample": False}
    ) == Sampling(max_new_tokens=4, until=("\n",))
    assert sampling_of({"until": ["a", "b"], "temperature": 0.7, "top_k": 3}) == Sampling(
        until=("a", "b"), temperature=0.7, top_k=3
    )
    with pytest.raises(ValueError, match="'beams' is unknown"):
        sampling_of({"beams": 4})


def test_tokenizers_have_names_for_lm_eval_s_caches(loaded):
    assert NestedLM(loaded.model, ByteTokenizer()).tokenizer_name == "byte"
