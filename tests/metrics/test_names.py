import pytest

from dmoe.metrics import METRICS, MOE_STATISTICS, moe_rows, tensorboard_scalars


def test_names_are_unique_and_explained():
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    assert len({metric.tensorboard for metric in METRICS}) == len(METRICS)
    assert all(metric.meaning for metric in METRICS)


def test_a_row_is_renamed_and_nulls_are_left_out():
    row = {"step": 1, "loss": None, "lr": 0.1, "non_finite": ["loss"], "moe/entropy_mean": 0.9}
    assert tensorboard_scalars(row) == {"train/lr": 0.1, "moe/entropy_mean": 0.9}


@pytest.mark.parametrize(
    ("k", "name"), [(None, "eval/loss"), (4, "eval/loss_k4"), ([2, 4], "eval/loss_k2-4")]
)
def test_evaluations_at_several_k_are_several_curves(k, name):
    assert tensorboard_scalars({"step": 1, "eval_loss": 2.0, "k": k}) == {name: 2.0}


def test_an_unknown_key_is_our_bug():
    with pytest.raises(KeyError, match="los"):
        tensorboard_scalars({"los": 1.0})


def test_every_moe_statistic_is_in_the_table():
    names = ("entropy", "active", "overlap", "sigma", "sigma_square")
    means = {name: [0.5] for name in names}
    row = moe_rows([[1, 1]], [0], means, num_tokens=1, biases=[[0, 0]], layer_ids=[0])
    assert set(row) == {"k_sum"} | {
        f"moe/{key}"
        for name in MOE_STATISTICS
        for key in (f"{name}_mean", f"{name}_max", f"layer_0/{name}")
    }
