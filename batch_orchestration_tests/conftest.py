"""The order of the tests."""

import os
from collections import Counter

import pytest

# Engines end with their runs: one that stays warm for ten minutes would be left by each test. The
# tests of engine hosts set a time of their own.
os.environ.setdefault("BATCH_ENGINE_KEEP_ALIVE", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first.

    Side by side, each file goes to the next free worker: one that gets a long file last works on
    alone.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
