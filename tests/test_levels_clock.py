import json

import pytest

from nested_learning import ChunkedUpdateScheduler

PERIODS = {"fast": 1, "medium": 4, "slow": 6}


def drive(scheduler, first, last):
    """Marks every due level, and says what was marked."""
    marked = []
    for step in range(first, last + 1):
        for name in scheduler.periods:
            if scheduler.should_update(name, step):
                scheduler.mark_updated(name, step)
                marked.append((step, name))
    return marked


def test_levels_update_at_multiples_of_their_period():
    scheduler = ChunkedUpdateScheduler(PERIODS)
    marked = drive(scheduler, 1, 12)
    assert [step for step, name in marked if name == "medium"] == [4, 8, 12]
    assert [step for step, name in marked if name == "slow"] == [6, 12]
    assert [step for step, name in marked if name == "fast"] == list(range(1, 13))
    assert scheduler.calendar(12) == {name: [step for step, who in marked if who == name] for name in PERIODS}
    assert scheduler.due(12) == ["fast", "medium", "slow"] and scheduler.due(4) == ["fast", "medium"]


def test_statistics_count_floor_of_steps_over_period():
    scheduler = ChunkedUpdateScheduler(PERIODS)
    assert scheduler.statistics()["slow"] == {"period": 6, "updates": 0, "last_update": 0}
    drive(scheduler, 1, 15)
    assert scheduler.statistics() == {
        "fast": {"period": 1, "updates": 15, "last_update": 15},
        "medium": {"period": 4, "updates": 3, "last_update": 12},
        "slow": {"period": 6, "updates": 2, "last_update": 12},
    }


def test_a_saved_scheduler_goes_on_as_if_nothing_had_happened():
    whole, part, rest = (ChunkedUpdateScheduler(PERIODS) for _ in range(3))
    drive(whole, 1, 14)
    drive(part, 1, 5)
    rest.load_state_dict(json.loads(json.dumps(part.state_dict())))
    drive(rest, 6, 14)
    assert rest.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="'slow' is already marked as updated at step 12, got step 6"):
        rest.mark_updated("slow", 6)


def test_states_of_earlier_versions_name_periods_otherwise():
    scheduler = ChunkedUpdateScheduler(PERIODS)
    drive(scheduler, 1, 5)
    state = scheduler.state_dict()
    state["chunk_sizes"] = state.pop("periods")
    again = ChunkedUpdateScheduler(PERIODS)
    again.load_state_dict(state)
    assert again.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda s: s.should_update("slwo", 6), "level must be one of fast, medium, slow, got 'slwo'"),
        (lambda s: s.mark_updated("slwo", 6), "level must be one of fast, medium, slow, got 'slwo'"),
        (
            lambda s: s.should_update("slow", 0),
            r"step must be an integer of at least 1 \(steps count from 1\), got 0",
        ),
        (lambda s: s.mark_updated("slow", 7), "'slow' updates at multiples of 6 steps, not at step 7"),
        (
            lambda s: (s.mark_updated("slow", 6), s.mark_updated("slow", 6)),
            "already marked .* step 6, got step 6",
        ),
        (
            lambda s: s.load_state_dict({"periods": {"fast": 2}}),
            "periods must be .*the saved ones are",
        ),
        (lambda s: ChunkedUpdateScheduler({}), "periods must name at least one level"),
        (
            lambda s: ChunkedUpdateScheduler({"a": 0}),
            r"periods\['a'\] must be an integer of at least 1, got 0",
        ),
        (lambda s: ChunkedUpdateScheduler({"a": 1.5}), "must be an integer of at least 1, got 1.5"),
    ],
)
def test_errors_name_what_is_wrong(act, message):
    with pytest.raises(ValueError, match=message):
        act(ChunkedUpdateScheduler(PERIODS))
