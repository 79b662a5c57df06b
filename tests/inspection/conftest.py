"""The token loops of the layers, and a tiny run to inspect."""

import sys
from pathlib import Path

import pytest

from nested_learning.train.config import run_config
from nested_learning.train.launch import launch

sys.path.insert(0, str(Path(__file__).parents[1] / "layers"))

TEXT = "Die Äpfel <b>&amp;</b> die Birnen lagen im Gras.\nNiemand hob sie auf.\n"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on bytes: self-modifying Titans and a fast level."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    levels = [{"name": "fast", "chunk_size": 8}, {"name": "mlp"}]
    model = {"vocab_size": 257, "dim": 16, "num_layers": 1, "num_heads": 2, "chunk_size": 4, "seq_len": 32}
    config = run_config(
        {
            "name": "tiny",
            "model": {**model, "levels": levels},
            "data": {
                "files": [str(folder / "text.txt")],
                "cache_dir": str(folder / "cache"),
                "valid_fraction": 0.2,
                "tokenizer": {"kind": "byte", "vocab_size": 257},
            },
            "optim": {"lr": 3e-3, "warmup_steps": 1},
            "train": {
                **{"steps": 2, "batch_size": 2, "seq_len": 32, "save_every": 2, "eval_every": 2},
                **{"output_dir": str(folder), "device": "cpu", "sample_tokens": 0},
            },
            "logging": {"progress": False},
        }
    )
    launch(config)
    return config.run_dir
