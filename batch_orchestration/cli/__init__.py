"""The command line: `python -m batch_orchestration`, or `batch-orchestration`."""

from batch_orchestration.cli.commands import main

__all__ = ["main"]
