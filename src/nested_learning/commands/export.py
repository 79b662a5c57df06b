"""Write a checkpoint as one safetensors file that describes itself.

uv run nl export outputs/pilot --output pilot.safetensors
"""

from __future__ import annotations

from nested_learning.command import Parser
from nested_learning.train.checkpoint.export import export_checkpoint


def main() -> None:
    """Write the file and print its size."""
    parser = Parser(description=__doc__)
    parser.add_argument("path", help="a checkpoint folder, or a run directory for its latest one")
    parser.add_argument("--output", help="a .safetensors file; beside the checkpoint folder if left out")
    options = parser.parse_args()
    target = export_checkpoint(options.path, options.output)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB; load_checkpoint reads it")
