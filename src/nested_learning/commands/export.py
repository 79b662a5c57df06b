"""Write a checkpoint as one safetensors file that describes itself, or as a folder for transformers.

uv run nl export outputs/pilot --output pilot.safetensors
uv run nl export outputs/pilot --huggingface pilot-hf
"""

from __future__ import annotations

from nested_learning.command import Parser
from nested_learning.train.checkpoint.export import export_checkpoint


def main() -> None:
    """Write the file, or the folder, and print its size."""
    parser = Parser(description=__doc__)
    parser.add_argument("path", help="a checkpoint folder, or a run directory for its latest one")
    parser.add_argument("--output", help="a .safetensors file; beside the checkpoint folder if left out")
    parser.add_argument(
        "--huggingface",
        metavar="FOLDER",
        help="write this folder instead, for AutoModelForCausalLM (extra hf)",
    )
    options = parser.parse_args()
    if options.huggingface is not None:
        if options.output is not None:
            raise ValueError("--output and --huggingface are two ways to export; give one of them")
        from nested_learning.hf import export_folder

        folder = export_folder(options.path, options.huggingface)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB; after `import nested_learning.hf`, transformers reads it")
        return
    target = export_checkpoint(options.path, options.output)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB; load_checkpoint reads it")
