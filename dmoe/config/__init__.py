"""Configs: YAML files with `extends`, `a.b=c` overrides, checked against sections of the code."""

from dmoe.config.base import ConfigError, ConfigModel
from dmoe.config.export import (
    config_schema,
    config_tree,
    diff_trees,
    dump_yaml,
    flatten_tree,
    save_config,
)
from dmoe.config.loading import load_config

__all__ = [
    "ConfigError",
    "ConfigModel",
    "config_schema",
    "config_tree",
    "diff_trees",
    "dump_yaml",
    "flatten_tree",
    "load_config",
    "save_config",
]
