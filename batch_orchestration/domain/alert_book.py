"""The book of alerts: which are open, what is still to be sent through which channel, and when.

All of it is decided here, from what is passed in; who calls reads, sends and writes.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from batch_orchestration.domain.alerts import Alert, AlertKind, Message, News, Post, Severity

#: Wait after the first failed attempt of a channel, doubled by each further one, up to the longest:
#: an outage of an hour costs nine attempts, and is over for us within 15 minutes of its end.
BACKOFF_SECONDS = 30.0
LONGEST_BACKOFF_SECONDS = 900.0
#: More messages than these wait for no channel in full; older ones are counted.
MOST_PENDING = 100
_WORSE = (Severity.INFO, Severity.WARNING, Severity.ERROR)
#: So many posts may go out at once before the rate counts.
BURST = 5


@dataclass(frozen=True, kw_only=True)
class AlertRules:
    """The settings that the book depends on.

    Attributes:
        repeat_seconds: An open alert is told again so often; 0 for never.
        settle_seconds: What is gone for so long has recovered; what comes back before has not, so
            that what flaps is one alert and spends no post.
        posts_per_hour: Of one channel. What has to wait goes out together, as one post.
    """

    repeat_seconds: float = 14_400.0
    settle_seconds: float = 300.0
    posts_per_hour: float = 20.0


class OpenAlert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert whose condition lasts, or has only just gone.

    Attributes:
        since: When it was raised, POSIX seconds.
        told_at: When it was told last.
        worst: How severe it has been.
        gone_at: Since when its condition is gone; None while it lasts.
    """

    alert: Alert
    since: float
    told_at: float
    worst: Severity
    gone_at: float | None = None


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """What one channel still has to send.

    Attributes:
        pending: Oldest first.
        left_out: Older ones that found no place among them, counted by kind.
        failures: Attempts that failed in a row.
        next_at: Not before that, POSIX seconds.
        posts: That may still go out at once, as of `counted_at`.
        problem: Why the last attempt failed; None if it did not.
        at_most: Messages of one post; fewer and fewer until it is found which one is refused.
    """

    pending: tuple[Message, ...] = ()
    left_out: Mapping[str, int] = {}
    failures: int = 0
    next_at: float = 0.0
    posts: float = BURST
    counted_at: float = 0.0
    problem: str | None = None
    at_most: int = MOST_PENDING

    @property
    def waiting(self) -> int:
        """How many messages it still has to send."""
        return len(self.pending) + sum(self.left_out.values())


class AlertBook(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about alerts that outlives a process.

    Attributes:
        began: What happened before is history that nobody is told of, POSIX seconds.
        cursor: Up to when the store was looked at.
        opened: By key.
        told: Keys of what was told once, with the time at which it had happened.
        channels: By name.
    """

    began: float
    cursor: float
    opened: Mapping[str, OpenAlert] = {}
    told: Mapping[str, float] = {}
    channels: Mapping[str, Channel] = {}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What there is to be told at a moment.

    Attributes:
        conditions: What is the case now.
        events: What has happened, with the time at which it did.
        unknown: Kinds of which nobody could find out whether they are the case.
        cursor: Up to when events are complete; None if nobody could look.
    """

    conditions: Sequence[Alert] = ()
    events: Sequence[tuple[Alert, float]] = ()
    unknown: Collection[AlertKind] = ()
    cursor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An attempt to send a post.

    Attributes:
        problem: Why it could not be sent; None if it was.
        refused: That it is the post that is not taken, and never will be.
    """

    post: Post
    problem: str | None = None
    refused: bool = False

    @property
    def is_hopeless(self) -> bool:
        """Whether a single message was refused: it would keep back all others for ever."""
        return self.refused and len(self.post.messages) <= 1


def advance(
    book: AlertBook,
    seen: Seen,
    *,
    channels: Collection[str],
    rules: AlertRules,
    now: float,
    remember_seconds: float,
) -> tuple[AlertBook, tuple[Message, ...]]:
    """Return the book after a look at the world, and what is news in it.

    The news are pending in every channel then. Save the book before anything is sent, so that a
    process that dies in between loses none.

    Args:
        channels: Names of those that are set now; what others had to send is forgotten.
        remember_seconds: Events are looked at again so long behind the cursor.
    """
    # Of a clock that was in the future: nothing would be news before that time.
    began = min(book.began, now)
    opened, news = _opened(book.opened, seen, rules=rules, now=now)
    told = dict(book.told)
    for alert, at in seen.events:
        if at > began and alert.key not in told:
            told[alert.key] = at
            news.append(Message(news=News.RAISED, alert=alert, at=now, since=at))
    cursor = min(book.cursor, now) if seen.cursor is None else seen.cursor
    advanced = AlertBook(
        began=began,
        cursor=cursor,
        opened=opened,
        told={key: at for key, at in told.items() if at > cursor - remember_seconds},
        channels={
            name: _with(book.channels.get(name, Channel(counted_at=now)), news, now)
            for name in channels
        },
    )
    return advanced, tuple(news)


def due(book: AlertBook, *, rules: AlertRules, now: float) -> dict[str, Post]:
    """Return what each channel is to send now: all that it has, as one post if it can be one."""
    return {
        name: Post(messages=channel.pending[: channel.at_most], left_out=channel.left_out)
        for name, channel in book.channels.items()
        if channel.waiting and _may_try(channel, now) and _posts(channel, rules, now) >= 1
    }


def sent(
    book: AlertBook, tried: Mapping[str, Tried], *, rules: AlertRules, now: float
) -> AlertBook:
    """Return the book after attempts to send, by channel; the posts may be of any tick before."""
    channels = dict(book.channels)
    for name, attempt in tried.items():
        channel = channels.get(name)
        if channel is None:
            continue
        if attempt.problem is None:
            channels[name] = _after_success(channel, attempt.post, rules, now)
        elif attempt.is_hopeless:
            channels[name] = msgspec.structs.replace(
                _after_success(channel, attempt.post, rules, now),
                problem=f"{attempt.problem}; that alert was dropped",
            )
        elif attempt.refused:
            channels[name] = msgspec.structs.replace(
                channel,
                posts=_posts(channel, rules, now) - 1,
                counted_at=now,
                problem=attempt.problem,
                at_most=len(attempt.post.messages) // 2,
            )
        else:
            channels[name] = _after_failure(channel, attempt.problem, now)
    return msgspec.structs.replace(book, channels=channels)


def _opened(
    before: Mapping[str, OpenAlert], seen: Seen, *, rules: AlertRules, now: float
) -> tuple[dict[str, OpenAlert], list[Message]]:
    conditions = {alert.key: alert for alert in seen.conditions}
    opened: dict[str, OpenAlert] = {}
    news: list[Message] = []
    for key, alert in conditions.items():
        old = before.get(key)
        what = _news(old, alert, rules, now)
        since = now if old is None else old.since
        told_at = old.told_at if old is not None and what is None else now
        worst = alert.severity if old is None else max(alert.severity, old.worst, key=_WORSE.index)
        opened[key] = OpenAlert(alert=alert, since=since, told_at=told_at, worst=worst)
        if what is not None:
            news.append(Message(news=what, alert=alert, at=now, since=since))
    for key, old in before.items():
        if key in conditions:
            continue
        gone_at = now if old.gone_at is None else min(old.gone_at, now)
        if old.alert.kind in seen.unknown:
            opened[key] = old
        elif now - gone_at < rules.settle_seconds:
            opened[key] = msgspec.structs.replace(old, gone_at=gone_at)
        else:
            news.append(Message(news=News.RECOVERED, alert=old.alert, at=now, since=old.since))
    return opened, news


def _news(old: OpenAlert | None, alert: Alert, rules: AlertRules, now: float) -> News | None:
    if old is None or _WORSE.index(alert.severity) > _WORSE.index(old.worst):
        return News.RAISED
    # A clock that was set back must not silence it.
    waited = now - old.told_at
    if rules.repeat_seconds and (waited >= rules.repeat_seconds or waited < 0):
        return News.REMINDER
    return None


def _with(channel: Channel, news: Sequence[Message], now: float) -> Channel:
    pending = [*channel.pending, *news]
    dropped = pending[: max(0, len(pending) - MOST_PENDING)]
    left_out = Counter(channel.left_out)
    left_out.update(str(message.alert.kind) for message in dropped)
    return msgspec.structs.replace(
        channel,
        pending=tuple(pending[len(dropped) :]),
        left_out=dict(left_out),
        counted_at=min(channel.counted_at, now),
    )


def _may_try(channel: Channel, now: float) -> bool:
    # Where the clock was set back, the pause is over, too.
    return now >= channel.next_at or channel.next_at - now > LONGEST_BACKOFF_SECONDS


def _posts(channel: Channel, rules: AlertRules, now: float) -> float:
    passed = max(0.0, now - channel.counted_at)
    return min(float(BURST), channel.posts + passed * rules.posts_per_hour / 3600)


def _after_success(channel: Channel, post: Post, rules: AlertRules, now: float) -> Channel:
    # Of a post that was long on its way, others may have come since, and some be only counted.
    return Channel(
        pending=tuple(message for message in channel.pending if message not in post.messages),
        left_out=dict(Counter(channel.left_out) - Counter(post.left_out)),
        posts=_posts(channel, rules, now) - 1,
        counted_at=now,
    )


def _after_failure(channel: Channel, problem: str, now: float) -> Channel:
    # Not more doublings than it takes: the power has no end.
    delay = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(channel.failures, 10))
    return msgspec.structs.replace(
        channel, failures=channel.failures + 1, next_at=now + delay, problem=problem
    )
