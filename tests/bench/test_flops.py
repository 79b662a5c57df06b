"""The counted operations against torch's counter of dispatched products."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nested_learning.bench.flops import Work, flops_per_token, forward_work, inverse_flops
from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.ops.triangular.inverse import inverse_unit_lower

CHUNK = 32


def in_place(total: list[int], a: list[int], b: list[int], out_shape: list[int], **scales: float) -> int:
    """`total.baddbmm_(a, b)`, which torch's counter passes over; shapes in, operations out."""
    return 2 * a[0] * a[1] * a[2] * b[2]


UNKNOWN = {torch.ops.aten.baddbmm_: in_place}


def config(mixer: str, **changes) -> HopeConfig:
    return HopeConfig(
        **{"vocab_size": 40, "dim": 128, "num_layers": 2, "mixer": mixer, "chunk_size": CHUNK} | changes
    )


def dispatched(config: HopeConfig, batch: int, length: int) -> int:
    model, tokens = HopeLM(config), torch.zeros(batch, length, dtype=torch.long)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter,
    ):
        model(tokens)
    return counter.get_total_flops()


def dispatched_inverse(size: int) -> int:
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        inverse_unit_lower(torch.zeros(1, size, size))
    return counter.get_total_flops()


def total(work: list[Work], name: str | None = None) -> float:
    return sum(item.flops for item in work if name in (None, item.name))


def with_dispatched_inverses(work: list[Work]) -> float:
    """The count, with the library's inverse in the place of the nominal one."""
    inverses = total(work, "inverse")
    return total(work) - inverses + inverses / inverse_flops(CHUNK) * dispatched_inverse(CHUNK)


def test_attention_counts_the_causal_half_of_what_the_kernel_dispatches():
    batch, length = 2, 48
    work = forward_work(config("attention"), batch, length)
    causal = total(work, "attention")
    square = causal * 2 * length / (length + 1)
    assert total(work) - causal + square == pytest.approx(
        dispatched(config("attention"), batch, length), rel=0.01
    )


def test_a_window_bounds_the_pairs_of_attention():
    work = forward_work(config("sliding_attention", window=3, num_layers=1), 1, 10)
    pairs = sum(1 for t in range(10) for s in range(10) if 0 <= t - s < 3)
    assert total(work, "attention") == 2 * 2 * 128 * pairs


@pytest.mark.parametrize("mixer", ["linear", "titans", "self_mod_linear"])
@pytest.mark.parametrize("length", [CHUNK, 4 * CHUNK])
def test_memories_agree_with_the_dispatched_products(mixer: str, length: int):
    counted = with_dispatched_inverses(forward_work(config(mixer), 2, length))
    assert counted == pytest.approx(dispatched(config(mixer), 2, length), rel=0.01)


@pytest.mark.parametrize("memory", [{}, {"hidden": 16}, {"adaptive": ("k", "q")}, {"self_targets": False}])
def test_self_mod_agrees_with_the_dispatched_products(memory: dict):
    chosen = config("self_mod", memory=MemoryConfig(**memory))
    counted = with_dispatched_inverses(forward_work(chosen, 2, 2 * CHUNK))
    assert counted == pytest.approx(dispatched(chosen, 2, 2 * CHUNK), rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"key": "projected"}, {"target": "same"}, {"expansion": 0.25}])
@pytest.mark.parametrize("length", [3 * CHUNK, CHUNK + 5])
def test_fast_levels_agree_with_the_dispatched_products(changes: dict, length: int):
    levels = (LevelSpec(name="fast", chunk_size=CHUNK, **changes), LevelSpec(name="mlp"))
    chosen = config("attention", levels=levels, num_layers=1)
    ordinary = config("attention", levels=levels[1:], num_layers=1)
    more = with_dispatched_inverses(forward_work(chosen, 2, length)) - total(
        forward_work(ordinary, 2, length)
    )
    assert more == pytest.approx(dispatched(chosen, 2, length) - dispatched(ordinary, 2, length), rel=0.02)


@pytest.mark.parametrize("adaptive", [(), ("k",), ("q", "alpha"), ("k", "v", "q", "eta")])
@pytest.mark.parametrize("length", [2 * CHUNK, CHUNK + 5])
def test_memories_with_one_gain_agree_with_the_dispatched_products(adaptive: tuple[str, ...], length: int):
    chosen = config("self_mod_linear", memory=MemoryConfig(adaptive=adaptive))
    counted = with_dispatched_inverses(forward_work(chosen, 2, length))
    assert counted == pytest.approx(dispatched(chosen, 2, length), rel=0.01)


def test_an_unfinished_chunk_reads_and_does_not_write():
    full = forward_work(config("titans"), 1, CHUNK)
    longer = forward_work(config("titans"), 1, CHUNK + 5)
    assert total(longer, "write") == total(full, "write")
    assert total(longer, "read") == pytest.approx(total(full, "read") * (CHUNK + 5) / CHUNK)


def test_inverse_by_halves():
    assert inverse_flops(4) == 2 * 4 * 1 + 1 * 4 * 2**3  # two pairs of 1 × 1 blocks, one pair of 2 × 2


def test_memories_cost_the_same_per_token_at_every_length_and_attention_does_not():
    assert flops_per_token(config("self_mod"), CHUNK) == flops_per_token(config("self_mod"), 64 * CHUNK)
    grown = flops_per_token(config("attention"), 2048) - flops_per_token(config("attention"), 1024)
    assert grown == 2 * 2 * 128 * 2 * 512  # scores and values, 512 more keys on average, two layers


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"read": "after_write"}, "model.read"),
        ({"memory": MemoryConfig(momentum=True)}, "momentum"),
    ],
)
def test_what_is_not_covered_is_refused(changes: dict, named: str):
    with pytest.raises(ValueError, match=named):
        forward_work(config("self_mod", **changes), 1, CHUNK)


def test_a_level_counts_in_the_blocks_that_have_it():
    chosen = config("attention", levels=(LevelSpec(name="a"), LevelSpec(name="b", layers=(1,))))
    without = config("attention", levels=(LevelSpec(name="a"),))
    more = total(forward_work(chosen, 2, 9)) - total(forward_work(without, 2, 9))
    assert more == dispatched(chosen, 2, 9) - dispatched(without, 2, 9) > 0
