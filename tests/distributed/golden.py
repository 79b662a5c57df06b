"""Write golden_pilot_smoke.json anew:  uv run python tests/distributed/golden.py"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    import torch
    from work import losses, train

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    settings = [
        *("train.steps=20", "train.log_every=1", "train.eval_every=20", "train.save_every=20"),
        *("train.eval_batches=1", "train.sample_tokens=0", "train.device=cpu", "logging.progress=false"),
    ]
    train([*settings, f"train.output_dir={folder}", "name=single"], "single")
    found = {"losses": list(losses(folder / "single").values()), "torch": torch.__version__}
    path = Path(__file__).parent / "golden_pilot_smoke.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
