"""The four shapes of the learning rate, at their corners and by hand in between."""

import pytest
from pydantic import ValidationError

from dmoe.optim import ScheduleConfig, learning_rate_factor

TOTAL = 11


def factors(total: int = TOTAL, **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [learning_rate_factor(config, step, total) for step in range(total)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_and_its_last_step_has_the_full_rate(name: str) -> None:
    assert factors(name=name, warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 4])
def test_decay_goes_from_the_full_rate_to_the_final_fraction(
    name: str, final: float, warmup: int
) -> None:
    rates = factors(name=name, warmup_steps=warmup, final_fraction=final)
    assert rates[warmup] == pytest.approx(1)
    assert rates[-1] == pytest.approx(final, abs=1e-12)
    decaying = rates[warmup:]
    assert decaying == sorted(decaying, reverse=True)


def test_shapes_in_the_middle() -> None:
    middle = TOTAL // 2
    assert factors(name="linear", final_fraction=0.0)[middle] == pytest.approx(0.5)
    assert factors(name="cosine", final_fraction=0.2)[middle] == pytest.approx(0.6)
    # A quarter of the way, cosine is above linear: (1 + cos(pi / 4)) / 2.
    quarter = learning_rate_factor(ScheduleConfig(final_fraction=0.0), 1, 5)
    assert quarter == pytest.approx(0.853553, abs=1e-6)
    assert factors(name="constant", warmup_steps=1) == [1.0] * TOTAL


def test_wsd_is_stable_until_its_share_of_all_steps_is_left() -> None:
    rates = factors(total=20, name="wsd", decay_fraction=0.25, final_fraction=0.0)
    assert rates[:16] == [1.0] * 16
    assert rates[15:] == pytest.approx([1, 0.75, 0.5, 0.25, 0][-5:])


def test_wsd_does_not_decay_before_the_warmup_is_over() -> None:
    rates = factors(name="wsd", warmup_steps=4, decay_fraction=1.0, final_fraction=0.0)
    assert rates[3:5] == [1.0, 1.0]
    assert rates[-1] == 0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_steps_past_the_end_stay_at_the_final_rate(name: str) -> None:
    config = ScheduleConfig(name=name, final_fraction=0.3)
    assert learning_rate_factor(config, 2 * TOTAL, TOTAL) == pytest.approx(0.3)


def test_a_run_of_one_step_has_a_rate() -> None:
    assert factors(total=1) == [1.0]


@pytest.mark.parametrize("key", ["final_fraction", "decay_fraction"])
def test_fractions_beyond_one_are_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        ScheduleConfig.model_validate({key: 1.5})
