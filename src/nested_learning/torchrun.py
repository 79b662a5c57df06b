"""torchrun that says no more than rank 0 does of a person's mistake, and ends with the same status, 2:

python -m nested_learning.torchrun --nproc-per-node 2 train_fsdp.py --config-name pilot

torchrun itself adds a report of 40 lines and ends with 1; the processes that it starts cannot prevent it.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nested_learning.command import BAD_INPUT


def main() -> int:
    """Run torchrun's command line: 0, or 2 for a mistake. Raises ChildFailedError for all other failures."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the error says it all again
    try:
        run.run(run.parse_args(sys.argv[1:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != BAD_INPUT:
            raise
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
