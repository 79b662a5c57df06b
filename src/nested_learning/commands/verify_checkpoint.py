"""Compare the files of a checkpoint with their checksums.

uv run nl verify-checkpoint outputs/pilot

Exit status 1 if a file is damaged or missing.
"""

from __future__ import annotations

from nested_learning.command import Parser
from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.manifest import foreign, verify
from nested_learning.train.checkpoint.store import find_checkpoint, other_whole


def main() -> int:
    """Print what is wrong with a checkpoint and return 1 if anything is.

    Raises:
        CheckpointError: there is no checkpoint, or one without a manifest.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("path", help="a checkpoint folder, or a run directory for its latest one")
    path = find_checkpoint(parser.parse_args().path)
    if path.is_file():
        raise CheckpointError(f"{path} is an exported file; only checkpoint folders have a manifest")
    problems = verify(path)
    lines = [f"{path} is damaged:", *problems] if problems else [f"{path}: every file is as written"]
    lines += [f"{name} is not of this checkpoint" for name in foreign(path)]
    if problems and (other := other_whole(path)):
        lines.append(f"the newest whole one is {other}")
    print("\n".join(lines))
    return 1 if problems else 0
