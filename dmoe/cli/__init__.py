"""The `dmoe` command."""

from dmoe.cli.app import main

__all__ = ["main"]
