"""Learning at test time: the levels of a model driven by the gradient of its own next-token loss.

What learns is state, never a parameter: the model stays as it is.

    report, state = memorize(model, tokens)     # read, score, learn; `report.losses` are from before learning
    losses, _ = score(model, tokens, restart(model, state))
"""

from nested_learning.adapt.config import AdaptConfig
from nested_learning.adapt.memorize import MemorizeReport, memorize, memorize_each, score
from nested_learning.adapt.paths import Adaptable, checksum, diff, fast_paths, restart

__all__ = [
    "AdaptConfig",
    "Adaptable",
    "MemorizeReport",
    "checksum",
    "diff",
    "fast_paths",
    "memorize",
    "memorize_each",
    "restart",
    "score",
]
