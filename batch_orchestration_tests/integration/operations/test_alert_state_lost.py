"""The alert state under accidents: what happened before is sent all the same, once."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_orchestration.core.errors import AlertNotSent, TooManyOpenFiles
from batch_orchestration.operations.alerts import cycle
from batch_orchestration.operations.alerts.notification import Notification
from batch_orchestration.operations.alerts.sources import _of_rejected
from batch_orchestration.operations.alerts.state import Observation
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration_tests.support.alert_bench import AlertBench
from batch_orchestration_tests.support.builders import NOW


class Site(AlertBench):
    """With one channel, which keeps what it sends or is down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, channels={"channel": self._send})
        self.sent: list[str] = []
        self.is_down = False

    def _send(self, notification: Notification) -> None:
        if self.is_down:
            raise AlertNotSent("down")
        self.sent.append(notification.text)

    def observe(self, *findings: Finding, now: float) -> None:
        self.now = now
        self.cycle(Observation(findings=list(findings)))


def failed_at(at: float) -> Finding:
    return Finding(
        check="ending:b",
        level=Level.UNHEALTHY,
        reason="it failed",
        since=at,
        kind=AlertKind.BATCH_FAILED,
        title="Batch b failed",
    )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield Site(tmp_path)
    cycle._unsaved.clear()


@pytest.fixture
def one_descriptor_left() -> Iterator[None]:
    """For the lock, and none for the state."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    taken: list[int] = []
    try:
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_state_that_cannot_be_opened_for_want_of_descriptors_is_no_damaged_one(
    site: Site, request: pytest.FixtureRequest
) -> None:
    site.observe(now=NOW)
    site.is_down = True
    site.observe(failed_at(NOW + 1), now=NOW + 2)
    before = site.folder.alerts.read_bytes()

    request.getfixturevalue("one_descriptor_left")
    with pytest.raises(TooManyOpenFiles):
        site.observe(now=NOW + 3)

    assert site.folder.alerts.read_bytes() == before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, soft + 64), hard))
    assert site.state.channels["channel"].pending.count == 1


def test_what_happened_since_the_last_cycle_is_sent_though_the_state_is_damaged(site: Site) -> None:
    site.observe(now=NOW)
    site.folder.alerts.write_bytes(b"")
    os.utime(site.folder.alerts, (NOW, NOW))

    site.observe(failed_at(NOW + 300), now=NOW + 900)

    assert "Batch b failed" in "".join(site.sent)
    assert "The alert state was damaged" in "".join(site.sent)


def test_a_rejected_file_with_a_name_that_is_no_text_stops_no_alert(
    site: Site, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl.errors.json"))
    site.observe(now=NOW)

    site.observe(_of_rejected(path, site.in_force, NOW + 1), failed_at(NOW + 1), now=NOW + 2)

    assert "The file caf?.jsonl was rejected" in "".join(site.sent)
    assert "Batch b failed" in "".join(site.sent)
