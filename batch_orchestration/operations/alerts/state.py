"""The alert state: the open alerts, the pending notifications by channel, and their times.

All decisions are made here, from arguments alone; the caller observes, sends and writes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from batch_orchestration.operations.alerts.notification import (
    MOST_PENDING,
    Change,
    Notification,
    Transition,
)
from batch_orchestration.operations.health.report import AlertKind, Finding

#: Pause after a channel's first failed attempt, doubled by each further one up to the longest: an
#: outage of an hour costs nine attempts, and sending resumes within 15 minutes of its end.
BACKOFF_SECONDS = 30.0
LONGEST_BACKOFF_SECONDS = 900.0
#: Notifications that may be sent at once before the rate applies.
BURST = 5


@dataclass(frozen=True, kw_only=True)
class AlertRules:
    """The settings of the alert state.

    Attributes:
        repeat_seconds: Interval at which an open alert is repeated; 0 for never.
        settle_seconds: A condition that is gone this long has recovered. One that returns sooner
            has not, so a flapping condition is one alert and causes no further notification.
        posts_per_hour: Of one channel. Transitions that have to wait are sent together.
    """

    repeat_seconds: float = 14_400.0
    settle_seconds: float = 300.0
    posts_per_hour: float = 20.0


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """The unsent transitions of one channel.

    Attributes:
        failures: Failed attempts in a row.
        next_at: Earliest time of the next attempt.
        posts: Notifications that may be sent at once, as of `counted_at`.
        problem: Why the last attempt failed; None if it succeeded.
        at_most: Transitions of one notification; halved until the refused one is found.
    """

    pending: Notification = Notification()
    failures: int = 0
    next_at: float = 0.0
    posts: float = BURST
    counted_at: float = 0.0
    problem: str | None = None
    at_most: int = MOST_PENDING


class AlertState(msgspec.Struct, frozen=True, kw_only=True):
    """All data about alerts that outlives a process.

    Attributes:
        began: Events before this time are history and never sent.
        cursor: Time up to which all events were observed.
        open: The last transition of each condition, by check. Its finding is the latest, at the
            worst level so far.
        gone: Time since when the condition of an open alert is gone, by check.
        events: Time of each event that has an alert, by check.
        channels: By name.
    """

    began: float
    cursor: float
    open: Mapping[str, Transition] = {}
    gone: Mapping[str, float] = {}
    events: Mapping[str, float] = {}
    channels: Mapping[str, Channel] = {}


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The conditions and events seen at one moment.

    Attributes:
        findings: Present conditions and past events, each with a kind.
        unknown: Kinds that could not be determined.
    """

    findings: Sequence[Finding] = ()
    unknown: Collection[AlertKind] = ()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An attempt to send a notification.

    Attributes:
        problem: Why it could not be sent; None if it was.
        refused: Whether the receiver will never accept this notification.
    """

    notification: Notification
    problem: str | None = None
    refused: bool = False

    @property
    def is_hopeless(self) -> bool:
        """Whether a single transition was refused, which would block all others forever."""
        return self.refused and len(self.notification.transitions) <= 1


def advance(
    state: AlertState,
    observed: Observation,
    *,
    channels: Collection[str],
    rules: AlertRules,
    now: float,
    remember_seconds: float,
) -> tuple[AlertState, tuple[Transition, ...]]:
    """Return the state after an observation, and the resulting transitions.

    The transitions are then pending in every channel. Save the state before sending anything, so
    that a process that dies in between loses none.

    Args:
        channels: Names of the configured channels; pending transitions of others are dropped.
        remember_seconds: Events are observed again this far behind the cursor.
    """
    # If the clock was in the future, all events before that time would be history.
    began = min(state.began, now)
    missed = any(kind.is_event for kind in observed.unknown)
    cursor = min(state.cursor, now) if missed else now
    is_open, gone, transitions = _conditions(state, observed, rules=rules, now=now)
    events = dict(state.events)
    for event in observed.findings:
        at = now if event.since is None else event.since
        if event.kind and event.kind.is_event and at > began and event.check not in events:
            events[event.check] = at
            transitions.append(Transition(change=Change.RAISED, finding=event, at=now))
    advanced = AlertState(
        began=began,
        cursor=cursor,
        open=is_open,
        gone=gone,
        events={check: at for check, at in events.items() if at > cursor - remember_seconds},
        channels={
            name: _with(state.channels.get(name, Channel(counted_at=now)), transitions, now)
            for name in channels
        },
    )
    return advanced, tuple(transitions)


def due(state: AlertState, *, rules: AlertRules, now: float) -> dict[str, Notification]:
    """Return the notification that each channel sends now, with all its transitions if possible."""
    return {
        name: channel.pending.oldest(channel.at_most)
        for name, channel in state.channels.items()
        if channel.pending.count and _may_try(channel, now) and _posts(channel, rules, now) >= 1
    }


def sent(
    state: AlertState, attempts: Mapping[str, Attempt], *, rules: AlertRules, now: float
) -> AlertState:
    """Return the state after attempts by channel; their notifications may be from earlier ticks."""
    channels = dict(state.channels)
    for name, attempt in attempts.items():
        channel = channels.get(name)
        if channel is None:
            continue
        spent = replace(channel, posts=_posts(channel, rules, now) - 1, counted_at=now)
        if attempt.problem is None or attempt.is_hopeless:
            dropped = attempt.problem and f"{attempt.problem}; that alert was dropped"
            left = channel.pending.minus(attempt.notification)
            channels[name] = Channel(
                pending=left, posts=spent.posts, counted_at=now, problem=dropped
            )
        elif attempt.refused:
            fewer = len(attempt.notification.transitions) // 2
            channels[name] = replace(spent, problem=attempt.problem, at_most=fewer)
        else:
            channels[name] = _after_failure(channel, attempt.problem, now)
    return replace(state, channels=channels)


def _conditions(
    state: AlertState, observed: Observation, *, rules: AlertRules, now: float
) -> tuple[dict[str, Transition], dict[str, float], list[Transition]]:
    """Return the open conditions, the time since when each is gone, and the transitions."""
    current = {f.check: f for f in observed.findings if not (f.kind and f.kind.is_event)}
    is_open: dict[str, Transition] = {}
    gone: dict[str, float] = {}
    told: list[Transition] = []
    for check, finding in current.items():
        old = state.open.get(check)
        since = (finding.since or now) if old is None else old.finding.since
        found = replace(finding, since=since)
        if (change := _change(old, finding, rules, now)) is not None:
            told.append(Transition(change=change, finding=found, at=now))
        worst = finding.level if old is None else max(finding.level, old.finding.level)
        last = told[-1] if change is not None or old is None else old
        is_open[check] = replace(last, finding=replace(found, level=worst))
    for check, old in state.open.items():
        if check in current:
            continue
        gone_at = min(state.gone.get(check, now), now)
        is_unknown = old.finding.kind in observed.unknown
        if not is_unknown and now - gone_at >= rules.settle_seconds:
            told.append(Transition(change=Change.RECOVERED, finding=old.finding, at=now))
            continue
        is_open[check] = old
        if not is_unknown or check in state.gone:
            gone[check] = gone_at
    return is_open, gone, told


def _change(
    old: Transition | None, finding: Finding, rules: AlertRules, now: float
) -> Change | None:
    if old is None or finding.level > old.finding.level:
        return Change.RAISED
    # A clock that was set back must not silence it.
    waited = now - old.at
    if rules.repeat_seconds and (waited >= rules.repeat_seconds or waited < 0):
        return Change.REMINDER
    return None


def _with(channel: Channel, transitions: Sequence[Transition], now: float) -> Channel:
    return replace(
        channel,
        pending=channel.pending.plus(transitions),
        counted_at=min(channel.counted_at, now),
    )


def _may_try(channel: Channel, now: float) -> bool:
    # A clock that was set back ends the pause, too.
    return now >= channel.next_at or channel.next_at - now > LONGEST_BACKOFF_SECONDS


def _posts(channel: Channel, rules: AlertRules, now: float) -> float:
    passed = max(0.0, now - channel.counted_at)
    return min(float(BURST), channel.posts + passed * rules.posts_per_hour / 3600)


def _after_failure(channel: Channel, problem: str, now: float) -> Channel:
    # The exponent is capped, because the power would overflow.
    delay = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(channel.failures, 10))
    return replace(channel, failures=channel.failures + 1, next_at=now + delay, problem=problem)
