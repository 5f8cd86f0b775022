"""The order of the tests."""

from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first.

    Side by side, each file goes to the next free worker: one that gets a long file last works on
    alone.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
