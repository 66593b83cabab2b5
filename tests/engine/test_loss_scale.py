"""The loss scale: when it grows, when it shrinks, and that it goes through a checkpoint."""

from dmoe.engine.loss_scale import LossScale


def test_doubles_after_enough_good_steps_in_a_row() -> None:
    scale = LossScale(enabled=True, initial=8.0, growth_interval=3)
    seen = []
    for _ in range(7):
        scale.step_taken()
        seen.append(scale.value)
    assert seen == [8, 8, 16, 16, 16, 32, 32]


def test_a_skip_halves_it_and_starts_the_count_anew() -> None:
    scale = LossScale(enabled=True, initial=8.0, growth_interval=2)
    scale.step_taken()
    scale.step_skipped()
    assert scale.value == 4
    scale.step_taken()
    assert scale.value == 4
    scale.step_taken()
    assert scale.value == 8


def test_never_falls_below_one() -> None:
    scale = LossScale(enabled=True, initial=2.0)
    for _ in range(3):
        scale.step_skipped()
    assert scale.value == 1


def test_is_one_for_other_precisions_whatever_happens() -> None:
    scale = LossScale(enabled=False, growth_interval=1)
    scale.step_taken()
    scale.step_skipped()
    scale.load({"loss_scale": 64.0, "loss_scale_good_steps": 1})
    assert scale.value == 1


def test_state_round_trip() -> None:
    scale = LossScale(enabled=True, initial=8.0, growth_interval=3)
    scale.step_taken()
    scale.step_taken()
    again = LossScale(enabled=True, growth_interval=3)
    again.load(scale.state())
    again.step_taken()
    assert again.value == 16


def test_a_run_that_changes_to_float16_starts_at_the_initial_scale() -> None:
    scale = LossScale(enabled=True, initial=256.0)
    scale.load(LossScale(enabled=False).state())
    assert scale.value == 256.0
