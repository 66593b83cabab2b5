"""Each router, and what changes the path of tokens beside it: for tests that go over them all."""

from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "switch": {
        "router": {"name": "top_k", "top_k": 1, "normalize": False},
        "capacity": {"factor": 1.0, "minimum": 0},
    },
    # Gates of zero: all scores are equal, and most experts without a token.
    "ties": {"router": {"name": "noisy_top_k", "noise": False, "load_weight": 0}},
    "top_p": {
        "router": {"name": "top_p", "p": 0.5, "controller": {"target_k": 3}},
        "losses": {"load_balance_weight": 0.1, "load_balance_scope": "sequence"},
    },
    "expert_choice": {"router": {"name": "expert_choice", "group": "micro_batch"}},
    "groups": {
        "router": {
            "name": "top_k",
            "score": "sigmoid",
            "bias_update_rate": 0.01,
            "groups": {"num": 4, "used": 2},
        },
        "losses": {"load_balance_weight": 0.1, "load_balance_scope": "sequence"},
    },
    "sparse_mixer": {"router": {"name": "sparse_mixer", "jitter": 0.3}},
    "relu": {"router": {"name": "relu", "target_k": 1, "penalty": 0.1}},
    "expert_threshold": {"router": {"name": "expert_threshold", "decay": 0.5}},
    "gshard": {
        "router": {"name": "top_k", "top_k": 2, "second_choice": "random"},
        "capacity": {"factor": 1.0, "minimum": 0, "group": 8},
        "losses": {"load_balance_scope": 8, "load_balance_choices": "first"},
    },
    "expert_dropout": {"expert_dropout": 0.4},
    # Of which tokens have different numbers, and some experts that are sent nothing.
    "buffers": {
        "router": {"name": "top_p", "p": 0.5},
        "zero_computation": {"zeros": 1, "constants": 1},
        "capacity": {"factor": 0.5, "minimum": 1, "group": "sequence"},
        "dispatch": "buffers",
        "expert_dropout": 0.4,
    },
    "buffers_by_score": {
        "capacity": {"factor": 1.0, "minimum": 0, "policy": "score"},
        "dispatch": "buffers",
    },
    "soft_gate": {"router": {"name": "soft_gate"}},
    "noisy_top_k": {"router": {"name": "noisy_top_k", "balance_scope": "sequence"}},
    "hierarchical": {"router": {"name": "hierarchical", "num_groups": 4}},
    "batchwise": {"router": {"name": "batchwise"}},
    "base_layer": {"router": {"name": "base_layer", "group": "micro_batch"}},
    "sinkhorn": {"router": {"name": "sinkhorn"}},
    "hash": {"router": {"name": "hash"}},
    "nested": {
        "router": {
            "name": "nested",
            "groups": 4,
            "outer": {"name": "sparse_mixer", "jitter": 0.3},
            "inner": {"name": "relu", "target_k": 1, "penalty": 0.1},
        },
        "zero_computation": {"zeros": 4, "constants": 4},
    },
    # Experts that are layers, three levels of them.
    "expert_layer": {
        "num_experts": 3,
        "num_shared_experts": 1,
        "router": {"name": "top_k", "top_k": 1, "bias_update_rate": 0.01},
        "losses": {"load_balance_weight": 0.1},
        "expert_layer": {
            "num_experts": 2,
            "expert_ffn_dim": None,
            "router": {"name": "relu", "target_k": 1, "penalty": 0.1},
            "expert_layer": {
                "num_experts": 4,
                "expert_ffn_dim": 16,
                "num_shared_experts": 2,
                "router": {"name": "top_k", "top_k": 2, "jitter": 0.1, "bias_update_rate": 0.01},
                "zero_computation": {"zeros": 1, "constants": 1},
                "losses": {"load_balance_weight": 0.2, "z_loss_weight": 0.1},
            },
        },
    },
    "peer_inside": {
        "num_experts": 2,
        "expert_ffn_dim": None,
        "router": {"name": "top_k", "top_k": 1, "normalize": False},
        "expert_layer": {
            "num_experts": 64,
            "expert_ffn_dim": 1,
            "router": {"name": "peer", "heads": 2, "top_k": 3, "query_norm": "batch"},
        },
    },
    "blocks_inside": {
        "num_experts": 2,
        "expert_ffn_dim": None,
        "expert_layer": {
            "num_experts": 4,
            "expert_ffn_dim": 16,
            "infinite": {"granularity": "block", "samples": 2},
        },
    },
    "soft_moe": {"router": {"name": "soft_moe", "slots": 2}},
    "zero_computation": {
        "router": {"name": "top_k", "top_k": 4, "bias_update_rate": 0.01},
        "zero_computation": {"zeros": 2, "copies": 2, "constants": 4, "target_k": 2},
    },
    "forced_balance": {"router": {"name": "forced_balance"}},
    "peer": {
        "num_experts": 64,
        "expert_ffn_dim": 1,
        "router": {"name": "peer", "heads": 2, "top_k": 3},
    },
    "peer_batch_norm": {
        "num_experts": 64,
        "expert_ffn_dim": 1,
        "router": {"name": "peer", "heads": 2, "top_k": 3, "query_norm": "batch"},
    },
}
"""Overrides of a `model.moe` of 8 experts of width 16, 2 a token by top-k, and a dense layer."""
