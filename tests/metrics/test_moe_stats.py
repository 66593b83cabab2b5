import math

import pytest
import torch

from dmoe.metrics.moe_stats import (
    dead_fraction,
    drop_fraction,
    load_cv,
    load_entropy,
    load_max_over_mean,
    moe_rows,
    relative_load,
)

# Two layers of four experts: one uses only the first expert, one is balanced. An idle layer.
COUNTS = [[8, 0, 0, 0], [2, 2, 2, 2]]
IDLE = [[0, 0, 0, 0]]


def test_load():
    assert relative_load([[6, 2]]).tolist() == [[1.5, 0.5]]
    assert load_max_over_mean(COUNTS).tolist() == [4.0, 1.0]
    assert relative_load(IDLE).tolist() == [[0.0] * 4]


def test_coefficient_of_variation():
    # Mean 4, standard deviation 2.
    assert load_cv([[6, 2]]).tolist() == [0.5]
    assert load_cv(COUNTS).tolist() == pytest.approx([math.sqrt(3), 0.0])
    assert load_cv(IDLE).tolist() == [0.0]


def test_dead_fraction():
    assert dead_fraction(COUNTS).tolist() == [0.75, 0.0]
    assert dead_fraction([[1, 0]]).tolist() == [0.5]
    assert dead_fraction(IDLE).tolist() == [1.0]


def test_load_entropy():
    assert load_entropy(COUNTS).tolist() == [0.0, 1.0]
    assert load_entropy([[1, 1, 0, 0]]).tolist() == pytest.approx([0.5])
    assert load_entropy(IDLE).tolist() == [0.0]


def test_means_of_squares_become_standard_deviations():
    # One layer whose tokens have 1 and 3: mean 2, mean square 5, standard deviation 1.
    row = moe_rows([[1, 1]], [0], {"sigma": [2.0], "sigma_square": [5.0]}, num_tokens=2)
    assert (row["moe/sigma_mean"], row["moe/sigma_std_mean"]) == (2.0, 1.0)
    assert not any("square" in key for key in row)


def test_drop_fraction():
    assert drop_fraction(COUNTS, [6, 0]).tolist() == [0.75, 0.0]
    assert drop_fraction([[3, 1]], [1]).tolist() == [0.25]
    assert drop_fraction(IDLE, [0]).tolist() == [0.0]


def test_rows_hold_mean_and_maximum_over_layers():
    row = moe_rows(COUNTS, [4, 0], {"entropy": [0.5, 0.25]}, num_tokens=4)
    assert row["moe/load_max_over_mean_mean"] == 2.5
    assert row["moe/load_max_over_mean_max"] == 4.0
    assert row["moe/drop_frac_mean"] == 0.25
    assert row["moe/k_mean_mean"] == 2.0
    assert row["k_sum"] == 4.0
    assert row["moe/entropy_max"] == 0.5
    assert not any("layer" in key or "bias" in key for key in row)


def test_detailed_rows_name_layers_by_their_position_in_the_model():
    row = moe_rows(
        COUNTS,
        [4, 0],
        {"entropy": [0.5, 0.25]},
        num_tokens=4,
        biases=[[0, -3], [1, 2, 0]],
        layer_ids=[1, 3],
    )
    assert row["moe/layer_1/load_max_over_mean"] == 4.0
    assert row["moe/layer_3/load_max_over_mean"] == 1.0
    assert row["moe/layer_1/bias_absmax"] == row["moe/bias_absmax_max"] == 3.0
    assert all(type(value) is float for value in row.values())


def test_tensors_are_taken_as_they_are():
    counts = torch.tensor(COUNTS)
    assert load_max_over_mean(counts).tolist() == [4.0, 1.0]
