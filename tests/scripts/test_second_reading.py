"""scripts/eval/second_reading.py on a model and tokenizer made here."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "scripts" / "eval" / "second_reading.py"


@pytest.mark.thorough
def test_the_script_prints_a_row_for_every_setting(tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(letters), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    with torch.no_grad():
        for weight in model.parameters():  # large enough for the MLPs to matter
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    words = f"{SCRIPT} --model {tmp_path} --layers 0 0,1 --lr 0.1 1000 --steps 2 --length 129"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 0
    rows = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]
    assert [row[:3] for row in rows[1:]] == [
        [layers, rate, "2"] for layers in ("0", "0,1") for rate in ("0.1", "1000")
    ]
    for row in rows[1:]:
        assert (
            float(row[4]) < float(rows[0][4]) == float(row[3])
        )  # the second reading is better than the first
