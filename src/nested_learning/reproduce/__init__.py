"""Tables and figures that a laptop can make: `nl reproduce <name>`. One module per experiment."""

from nested_learning.reproduce import (
    ablation,
    byte_bar,
    chunk_size,
    cms,
    context,
    continual,
    defaults,
    fig4,
    formal,
    levels,
    linear_memory,
    mad,
    memorize,
    mqar,
    needle,
    optimizers,
    orthogonal,
    recall,
    stability,
    text,
)
from nested_learning.reproduce.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    text.EXPERIMENT,
    recall.EXPERIMENT,
    chunk_size.EXPERIMENT,
    stability.EXPERIMENT,
    defaults.EXPERIMENT,
    cms.EXPERIMENT,
    levels.EXPERIMENT,
    continual.EXPERIMENT,
    memorize.EXPERIMENT,
    needle.EXPERIMENT,
    ablation.EXPERIMENT,
    context.EXPERIMENT,
    linear_memory.EXPERIMENT,
    formal.EXPERIMENT,
    mad.EXPERIMENT,
    mqar.EXPERIMENT,
    fig4.EXPERIMENT,
    orthogonal.EXPERIMENT,
    optimizers.EXPERIMENT,
    byte_bar.EXPERIMENT,
)

__all__ = ["EXPERIMENTS", "Experiment"]
