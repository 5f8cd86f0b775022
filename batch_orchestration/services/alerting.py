"""Tending the alerts: look, decide what is news, keep that durably, and only then send it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from batch_orchestration.domain.alert_book import (
    AlertBook,
    AlertRules,
    Seen,
    Tried,
    advance,
    due,
    sent,
)
from batch_orchestration.domain.alerts import (
    Alert,
    AlertKind,
    Message,
    News,
    Post,
    Severity,
)
from batch_orchestration.domain.errors import StorageError
from batch_orchestration.services.alert_channels import Send, deliver, delivered_late
from batch_orchestration.services.alert_sources import LOOK_BACK_SECONDS, look_for_alerts
from batch_orchestration.settings import Settings
from batch_orchestration.storage.alert_files import (
    read_book,
    set_book_aside,
    tending,
    touch_book,
    write_book,
)
from batch_orchestration.storage.files import DataFolder

logger = logging.getLogger(__name__)

_LOG_LEVELS = {
    Severity.ERROR: logging.ERROR,
    Severity.WARNING: logging.WARNING,
    Severity.INFO: logging.INFO,
}
#: Books that a full disk did not take, by path: without them each tick would tell all again.
_unsaved: dict[Path, AlertBook] = {}


@dataclass(frozen=True, kw_only=True)
class Tended:
    """What one tick did.

    Attributes:
        news: What was found to be told.
        problems: By channel that was tried, why its post could not be sent; None if it was.
    """

    book: AlertBook
    news: tuple[Message, ...]
    problems: Mapping[str, str | None]

    def __str__(self) -> str:
        said = [f"open: {len(self.book.opened)}", f"new: {len(self.news)}"]
        for name, channel in self.book.channels.items():
            if channel.problem is not None:
                said.append(f"{name}: {channel.waiting} wait, {channel.problem}")
            elif channel.waiting:
                said.append(f"{name}: {channel.waiting} wait")
        return "; ".join([*said, *sorted(open_titles(self.book))])


def open_titles(book: AlertBook) -> list[str]:
    """Return the titles of the alerts that are open."""
    return [opened.alert.title for opened in book.opened.values()]


def alert_rules(settings: Settings) -> AlertRules:
    """Return how often somebody is told."""
    return AlertRules(
        repeat_seconds=settings.alert_repeat_seconds,
        posts_per_hour=settings.alert_posts_per_hour,
    )


def tend_alerts(
    *,
    settings: Settings,
    folder: DataFolder,
    channels: Mapping[str, Send],
    now: float,
    look: Callable[..., Seen] = look_for_alerts,
    path: Path | None = None,
) -> Tended:
    """Look once, and send what is due. One at a time: who is at it owns the book.

    News are kept before they are sent. Who dies in between sends them again: nothing is lost, and
    little is told twice.

    Args:
        settings: In force.
        folder: The data folder.
        channels: By name.
        now: POSIX seconds.
        look: What there is to be told.
        path: Of the book; default: that of `alert_sensor`.

    Raises:
        StorageError: Somebody else is at it.
    """
    path = path or folder.alerts
    with tending(path):
        return _tend(settings, folder, channels, now, look, path)


def _tend(
    settings: Settings,
    folder: DataFolder,
    channels: Mapping[str, Send],
    now: float,
    look: Callable[..., Seen],
    path: Path,
) -> Tended:
    rules = alert_rules(settings)
    book, lost = _open_book(path, now)
    seen = look(settings=settings, folder=folder, book=book, now=now)
    if lost is not None:
        seen = Seen(
            conditions=seen.conditions,
            events=[*seen.events, (lost, now)],
            unknown=seen.unknown,
            cursor=seen.cursor,
        )
    book, news = advance(
        book,
        seen,
        channels=channels.keys(),
        rules=rules,
        now=now,
        remember_seconds=LOOK_BACK_SECONDS,
    )
    book = _noted(book, delivered_late(folder.root), rules, now)
    _save(path, book)
    for message in news:
        logger.log(_LOG_LEVELS[message.severity], "%s", " | ".join(message.text.splitlines()))
    posts = due(book, rules=rules, now=now)
    tried = deliver(posts, channels, root=folder.root)
    if tried:
        book = _noted(book, tried, rules, now)
        _save(path, book)
    problems = {name: attempt.problem for name, attempt in tried.items()}
    return Tended(book=book, news=news, problems=problems)


def _noted(book: AlertBook, tried: Mapping[str, Tried], rules: AlertRules, now: float) -> AlertBook:
    for name, attempt in tried.items():
        if attempt.is_hopeless:
            logger.error("%s refused an alert, which is dropped: %s", name, attempt.problem)
        elif attempt.problem is not None:
            logger.warning("alerts wait, for %s: %s", name, attempt.problem)
    return sent(book, tried, rules=rules, now=now)


def send_test(
    channels: Mapping[str, Send], *, folder: DataFolder, now: float
) -> dict[str, str | None]:
    """Send a test alert through all channels; return by channel why it could not, None if it did.

    The book knows nothing of it.
    """
    alert = Alert(
        key=str(AlertKind.TEST),
        kind=AlertKind.TEST,
        severity=Severity.INFO,
        title="This is a test of the alerts of batch_orchestration",
        cause=f"somebody asked for it; the data folder is {folder.root}",
        next_command="python -m batch_orchestration health",
    )
    message = Message(news=News.RAISED, alert=alert, at=now, since=now)
    post = Post(messages=(message,))
    tried = deliver(dict.fromkeys(channels, post), channels, root=folder.root, strict=True)
    return {name: attempt.problem for name, attempt in tried.items()}


def _open_book(path: Path, now: float) -> tuple[AlertBook, Alert | None]:
    """Return the book, and an alert if it had to be begun anew though there was one."""
    if (unsaved := _unsaved.get(path)) is not None:
        return unsaved, None
    began = AlertBook(began=now, cursor=now)
    try:
        return read_book(path) or began, None
    except StorageError as error:
        _set_aside(path)
        # Later than it began, or it would be history.
        began = AlertBook(began=now - 1, cursor=now)
        return began, Alert(
            key=f"{AlertKind.ALERTS_LOST}:{now:.0f}",
            kind=AlertKind.ALERTS_LOST,
            severity=Severity.WARNING,
            title="The book of alerts was damaged and is begun anew",
            cause=f"{error}; what was not sent yet is lost, what lasts is told again",
            next_command="python -m batch_orchestration status",
        )


def _set_aside(path: Path) -> None:
    try:
        set_book_aside(path)
    except StorageError as error:
        logger.warning("the damaged book of alerts stays where it is: %s", error)


def _save(path: Path, book: AlertBook) -> None:
    try:
        write_book(path, book)
        _unsaved.pop(path, None)
    except StorageError as error:
        # That the disk is full is what somebody has to be told.
        _unsaved[path] = book
        touch_book(path)
        logger.warning("the book of alerts is kept in memory: %s", error)
