import math

import pytest

from dmoe.checkpoint.retention import best_step, expired_steps


def test_best_is_the_lowest_finite_loss_and_the_earliest_of_equals():
    assert best_step({0: 3.0, 10: 2.0, 20: 2.0, 30: None, 40: math.nan}) == 10
    assert best_step({10: None, 20: math.inf}) is None


@pytest.mark.parametrize(
    ("rule", "expired"),
    [
        ({"keep_last": 1, "keep_every": 0, "keep_best": False}, [0, 10, 20, 30]),
        ({"keep_last": 2, "keep_every": 0, "keep_best": False}, [0, 10, 20]),
        ({"keep_last": 9, "keep_every": 0, "keep_best": False}, []),
        ({"keep_last": 1, "keep_every": 20, "keep_best": False}, [10, 30]),
        ({"keep_last": 1, "keep_every": 0, "keep_best": True}, [10, 20, 30]),
    ],
)
def test_rules(rule, expired):
    losses = {0: 1.0, 10: 2.0, 20: None, 30: 4.0, 40: 5.0}
    assert expired_steps(losses, 40, **rule) == expired


def test_steps_beyond_the_latest_stay_and_do_not_count():
    losses = dict.fromkeys([10, 20, 30, 900, 1000])
    assert expired_steps(losses, 30, keep_last=2, keep_every=0, keep_best=True) == [10]
