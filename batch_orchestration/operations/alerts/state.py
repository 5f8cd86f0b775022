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
#: A condition that is gone this long has recovered. One that returns sooner has not, so a flapping
#: condition is one alert and causes no further notification.
SETTLE_SECONDS = 300.0
#: Events are observed again this far behind the cursor: they carry the time of the decision, and
#: their writer may wait ten minutes for the store before they become visible.
LOOK_BACK_SECONDS = 3600.0


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

    @property
    def done(self) -> Notification:
        """The part that need not be sent again: all of it, or only the transition to blame."""
        if self.is_hopeless and self.notification.transitions:
            return Notification(transitions=self.notification.transitions)
        return self.notification


def advance(
    state: AlertState,
    observed: Observation,
    *,
    channels: Collection[str],
    repeat_seconds: float,
    now: float,
) -> tuple[AlertState, tuple[Transition, ...]]:
    """Return the state after an observation, and the resulting transitions.

    The transitions are then pending in every channel. Save the state before sending anything, so
    that a process that dies in between loses none.

    Args:
        channels: Names of the configured channels; pending transitions of others are dropped.
        repeat_seconds: Interval at which an open alert is repeated; 0 for never.
    """
    # If the clock was in the future, all events before that time would be history.
    began = min(state.began, now)
    missed = any(kind.is_event for kind in observed.unknown)
    cursor = min(state.cursor, now) if missed else now
    is_open, transitions = _present(state, observed, repeat_seconds=repeat_seconds, now=now)
    gone: dict[str, float] = {}
    for check, old in state.open.items():
        if check in is_open:
            continue
        gone_at = min(state.gone.get(check, now), now)
        is_unknown = old.finding.kind in observed.unknown
        if not is_unknown and now - gone_at >= SETTLE_SECONDS:
            transitions.append(Transition(change=Change.RECOVERED, finding=old.finding, at=now))
            continue
        is_open[check] = old
        if not is_unknown or check in state.gone:
            gone[check] = gone_at
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
        events={check: at for check, at in events.items() if at > cursor - LOOK_BACK_SECONDS},
        channels={
            name: _with(state.channels.get(name, Channel(counted_at=now)), transitions, now)
            for name in channels
        },
    )
    return advanced, tuple(transitions)


def _present(
    state: AlertState, observed: Observation, *, repeat_seconds: float, now: float
) -> tuple[dict[str, Transition], list[Transition]]:
    """Return the conditions that are present, and the transitions that begin or repeat them."""
    is_open: dict[str, Transition] = {}
    transitions: list[Transition] = []
    conditions = {f.check: f for f in observed.findings if f.kind and not f.kind.is_event}
    for check, finding in conditions.items():
        old = state.open.get(check)
        since = (finding.since or now) if old is None else old.finding.since
        found = replace(finding, since=since)
        last = Transition(change=Change.RAISED, finding=found, at=now)
        if old is None or finding.level > old.finding.level:
            transitions.append(last)
        # A clock that was set back must not silence it.
        elif repeat_seconds and not 0 <= now - old.at < repeat_seconds:
            last = replace(last, change=Change.REMINDER)
            transitions.append(last)
        else:
            last = old
        worst = finding.level if old is None else max(finding.level, old.finding.level)
        is_open[check] = replace(last, finding=replace(found, level=worst))
    return is_open, transitions


def due(state: AlertState, *, posts_per_hour: float, now: float) -> dict[str, Notification]:
    """Return the notification that each channel sends now, with all its transitions if possible.

    Args:
        posts_per_hour: Of one channel. Transitions that have to wait are sent together.
    """
    return {
        name: channel.pending.oldest(channel.at_most)
        for name, channel in state.channels.items()
        # A clock that was set back ends the pause, too.
        if channel.pending.count
        and not 0 < channel.next_at - now <= LONGEST_BACKOFF_SECONDS
        and _posts(channel, posts_per_hour, now) >= 1
    }


def sent(
    state: AlertState, attempts: Mapping[str, Attempt], *, posts_per_hour: float, now: float
) -> AlertState:
    """Return the state after attempts by channel; their notifications may be from earlier ticks."""
    channels = dict(state.channels)
    for name, attempt in attempts.items():
        channel = channels.get(name)
        if channel is None:
            continue
        posts = _posts(channel, posts_per_hour, now) - 1
        if attempt.problem is None or attempt.is_hopeless:
            channels[name] = Channel(
                pending=channel.pending.minus(attempt.done),
                posts=posts,
                counted_at=now,
                problem=attempt.problem and f"{attempt.problem}; that alert was dropped",
            )
        elif attempt.refused:
            fewer = len(attempt.notification.transitions) // 2
            channels[name] = replace(
                channel, posts=posts, counted_at=now, problem=attempt.problem, at_most=fewer
            )
        else:
            channels[name] = _after_failure(channel, attempt.problem, now)
    return replace(state, channels=channels)


def _with(channel: Channel, transitions: Sequence[Transition], now: float) -> Channel:
    return replace(
        channel,
        pending=channel.pending.plus(transitions),
        counted_at=min(channel.counted_at, now),
    )


def _posts(channel: Channel, posts_per_hour: float, now: float) -> float:
    passed = max(0.0, now - channel.counted_at)
    return min(float(BURST), channel.posts + passed * posts_per_hour / 3600)


def _after_failure(channel: Channel, problem: str, now: float) -> Channel:
    # The exponent is capped, because the power would overflow.
    delay = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(channel.failures, 10))
    return replace(channel, failures=channel.failures + 1, next_at=now + delay, problem=problem)
