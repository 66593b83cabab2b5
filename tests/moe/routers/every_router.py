"""One section, or several, of each router there is: what the tests that go over all routers use."""

from typing import Any

NUM_EXPERTS = 8
"""That the sections are meant for."""

ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01},
    "sigmoid": {"name": "top_k", "top_k": 3, "score": "sigmoid", "scaling_factor": 2.5},
    "switch": {"name": "top_k", "top_k": 1, "normalize": False},
    "gshard": {"name": "top_k", "top_k": 2, "second_choice": "random"},
    "groups": {
        "name": "top_k",
        "top_k": 2,
        "score": "sigmoid",
        "bias_update_rate": 0.01,
        "groups": {"num": 4, "used": 2},
    },
    "expert_choice": {"name": "expert_choice"},
    "top_p": {"name": "top_p", "p": 0.5, "controller": {"target_k": 3}},
    "soft_gate": {"name": "soft_gate"},
    "relu": {"name": "relu", "target_k": 3, "penalty": 0.1},
    "expert_threshold": {"name": "expert_threshold", "target_k": 2, "decay": 0.5},
    "sparse_mixer": {"name": "sparse_mixer", "jitter": 0.3},
    "noisy_top_k": {"name": "noisy_top_k", "top_k": 2},
    "hierarchical": {"name": "hierarchical", "num_groups": 4, "experts_per_group": 1},
    "batchwise": {"name": "batchwise", "top_k": 2},
    "base_layer": {"name": "base_layer"},
    "sinkhorn": {"name": "sinkhorn"},
    "hash": {"name": "hash", "top_k": 2},
    "nested": {
        "name": "nested",
        "groups": 4,
        "outer": {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01},
        "inner": {"name": "top_p", "p": 0.6},
    },
    "forced_balance": {"name": "forced_balance", "top_k": 2},
}
"""By a name of its own each, `model.moe.router`."""
