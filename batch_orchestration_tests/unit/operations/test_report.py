"""Health reports: the worst finding decides, and what lasts keeps the time at which it began."""

import pytest

from batch_orchestration.operations.health.report import Finding, HealthReport, Level, dated
from batch_orchestration_tests.support.builders import NOW


def finding(check="disk", level=Level.HEALTHY, *, since=None):
    return Finding(check=check, level=level, reason=f"{check} is {level.word}", since=since)


def report(*findings, at=NOW):
    return HealthReport(at=at, findings=findings)


def test_a_report_is_as_bad_as_its_worst_finding():
    assert report(finding()).level is Level.HEALTHY
    assert report(finding(), finding("gpu", Level.DEGRADED)).level is Level.DEGRADED
    worst = report(finding("gpu", Level.UNHEALTHY), finding("disk", Level.DEGRADED))
    assert worst.level is Level.UNHEALTHY
    assert [found.check for found in worst.problems] == ["gpu", "disk"]


def test_a_report_of_nothing_is_not_healthy():
    assert report().level is Level.UNHEALTHY
    assert report().summary.startswith("unhealthy")


@pytest.mark.parametrize("level", [Level.DEGRADED, Level.UNHEALTHY])
def test_the_verdict_names_what_is_wrong_and_nothing_else(level):
    verdict = report(finding("store", level), finding("disk")).summary

    assert verdict == f"{level.word}: store: store is {level.word}"


def test_what_lasts_keeps_the_time_at_which_it_began_also_when_it_gets_worse():
    first = report(*dated([finding("store", Level.DEGRADED)], previous=None, now=NOW))

    (later,) = dated([finding("store", Level.UNHEALTHY)], previous=first, now=NOW + 60)

    assert later.since == NOW


def test_what_was_well_in_between_begins_anew():
    well = report(*dated([finding("store")], previous=None, now=NOW))

    (again,) = dated([finding("store", Level.DEGRADED)], previous=well, now=NOW + 30)

    assert well.findings[0].since is None
    assert again.since == NOW + 30


def test_other_figures_are_no_news_and_another_level_is():
    before = report(finding("disk", Level.DEGRADED))
    figures = Finding(check="disk", level=Level.DEGRADED, reason="1.2 GiB are free")

    assert report(figures).problem_levels() == before.problem_levels()
    assert report(finding("disk", Level.UNHEALTHY)).problem_levels() != before.problem_levels()
    assert report(finding("disk")).problem_levels() == frozenset()
