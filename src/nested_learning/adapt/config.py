"""The configuration of learning from the loss of the language model."""

from __future__ import annotations

from dataclasses import dataclass

from nested_learning.checks import at_least, check_types, one_of

PATHS: tuple[str, ...] = ("titan", "cms_fast", "cms", "all")
SURPRISES: tuple[str, ...] = ("none", "l2", "loss", "logit_entropy")


@dataclass(kw_only=True, slots=True)
class AdaptConfig:
    """How fast weights learn from the loss of the language model while a text is read (Eq. 71).

    Args:
        paths: which weights: "titan" (memories of the mixers), "cms_fast" (fast levels), "cms" (fast and
            ordinary levels) or "all".
        chunk_size: tokens that are scored with the same weights, and then learned from.
        steps: gradient steps on a chunk.
        lr: step size, on the mean loss of a row's chunk. 0 = learn nothing: exactly the plain model. Steps
            are bounded whatever it is, and one that does not lower the loss of its chunk is not kept.
        surprise: what must reach `threshold` for a row to learn from a chunk: "none" (always learn), "l2"
            (root mean square over tokens of the gradient of the loss at the logits), "loss" (nats per token)
            or "logit_entropy" (nats per token).
        threshold: in units of `surprise`.
        reset: forget everything between samples; False = keep the weights that can learn.
    """

    paths: str = "cms"
    chunk_size: int = 64
    steps: int = 1
    lr: float = 0.1
    surprise: str = "none"
    threshold: float = 0.0
    reset: bool = True

    def __post_init__(self) -> None:
        check_types(self, "adapt")
        one_of("adapt.paths", self.paths, PATHS)
        one_of("adapt.surprise", self.surprise, SURPRISES)
        for name, least in (("chunk_size", 1), ("steps", 1), ("lr", 0), ("threshold", 0)):
            at_least(f"adapt.{name}", getattr(self, name), least)
        if self.threshold and self.surprise == "none":
            raise ValueError(f"adapt.threshold must be 0 for adapt.surprise = none, got {self.threshold}")


def check_online(adapt: AdaptConfig, seq_len: int, recomputed: bool) -> None:
    """Whether a model can be trained with `train.inner=online`; a ValueError if not.

    Args:
        seq_len: tokens of a training sequence.
        recomputed: whether `train.compile` or `parallel.activation_checkpointing` is on.
    """
    if adapt.lr == 0:
        raise ValueError("adapt.lr must be positive for train.inner = online, got 0")
    if adapt.chunk_size >= seq_len:
        raise ValueError(
            f"adapt.chunk_size must be less than train.seq_len = {seq_len} for train.inner = online, "
            f"or no token ever reads what was learned; got {adapt.chunk_size}"
        )
    if recomputed:
        raise ValueError(
            "train.compile and parallel.activation_checkpointing must be false for train.inner = online, "
            "which takes gradients in the forward pass"
        )
