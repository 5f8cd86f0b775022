"""Channels: how an alert leaves this machine. Each is bounded in time and leaks no secret."""

import contextlib
import html
import json
import logging
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.errors import AlertNotSent
from batch_orchestration.core.waiting import BackgroundCall
from batch_orchestration.operations.alerts.notification import Notification
from batch_orchestration.operations.alerts.state import Attempt
from batch_orchestration.operations.health.links import NoRedirects
from batch_orchestration.settings import Settings, SmtpSecurity

logger = logging.getLogger(__name__)

#: Sends a notification; raises `AlertNotSent`, whose message is safe to show to anybody.
Send = Callable[[Notification], None]

#: Until a mail server is ready for a mail.
WAIT_SECONDS = 5.0
#: Until the receiver confirms a notification. It may take its time, and giving up early resends a
#: mail that had arrived (RFC 5321, 4.5.3.2.6 asks for ten minutes).
ANSWER_SECONDS = 300.0
#: How long a tick waits for its notifications, whatever the receivers do; it has 60 s in all.
POST_SECONDS = 20.0
#: Discord refuses longer texts. https://discord.com/developers/docs/resources/webhook
DISCORD_CHARACTERS = 2000
#: Leaves room for escaping.
WEBHOOK_CHARACTERS = 1800
MAIL_CHARACTERS = 50_000
#: Codes about the notification. Others (401, 404 …) are about the address, which a person mends.
_REFUSE_THE_POST = (400, 413, 414, 422)
#: Bytes of a failed command's stderr that are shown.
_SHOWN = 300


def alert_channels(settings: Settings) -> dict[str, Send]:
    """Return the configured channels by name. The log is none of them: it has every alert."""
    channels: dict[str, Send] = {}
    if settings.alert_webhook_url.get_secret_value():
        channels["webhook"] = partial(send_to_webhook, settings)
    if settings.alert_email_to:
        channels["email"] = partial(send_mail, settings)
    if settings.alert_command:
        channels["command"] = partial(run_command, settings)
    return channels


_opener = urllib.request.build_opener(NoRedirects)


def send_to_webhook(settings: Settings, notification: Notification) -> None:
    """Post JSON in the format of Slack, Mattermost and Discord (`…/slack`).

    Raises:
        AlertNotSent: The webhook did not accept it. The message omits the address, a secret.
    """
    # https://api.slack.com/reference/surfaces/formatting#escaping
    text = html.escape(notification.text_within(WEBHOOK_CHARACTERS), quote=False)[
        :DISCORD_CHARACTERS
    ]
    body = json.dumps({"text": text}).encode()
    try:
        request = urllib.request.Request(
            settings.alert_webhook_url.get_secret_value(),
            data=body,
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        with _opener.open(request, timeout=ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        with error:
            raise AlertNotSent(
                f"the webhook answered {error.code}", refused=error.code in _REFUSE_THE_POST
            ) from None
    except urllib.error.URLError as error:
        raise AlertNotSent(f"the webhook cannot be reached: {_reason(error.reason)}") from None
    except (OSError, HTTPException) as error:
        raise AlertNotSent(f"the webhook did not answer: {_reason(error)}") from None
    except ValueError:  # its message would contain the address
        raise AlertNotSent("BATCH_ALERT_WEBHOOK_URL is not an address") from None


def send_mail(settings: Settings, notification: Notification) -> None:
    """Send a mail to all recipients.

    Raises:
        AlertNotSent: The server did not accept it for all of them.
    """
    message = _mail(settings, notification)
    try:
        with contextlib.closing(_connect(settings)) as server:
            refused = server.send_message(message)
            with contextlib.suppress(OSError):  # the mail is accepted, however the session ends
                server.quit()
    except smtplib.SMTPDataError as error:
        raise AlertNotSent(
            f"the mail server answered {error.smtp_code}", refused=error.smtp_code >= 500
        ) from None
    except smtplib.SMTPResponseException as error:
        raise AlertNotSent(f"the mail server answered {error.smtp_code}") from None
    except smtplib.SMTPRecipientsRefused:
        raise AlertNotSent("the mail server refused every address") from None
    except (OSError, ValueError) as error:  # an SMTPException is an OSError
        raise AlertNotSent(f"the mail server cannot be used: {_reason(error)}") from None
    if refused:
        raise AlertNotSent(f"the mail server refused {', '.join(sorted(refused))}", partly=True)


def run_command(settings: Settings, notification: Notification) -> None:
    """Run the command, without a shell, with the notification as JSON on stdin.

    Raises:
        AlertNotSent: The command cannot be run, failed, or had to be ended.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                settings.alert_command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise AlertNotSent(f"the command cannot be run: {_reason(error)}") from None
        try:
            process.communicate(msgspec.json.encode(_as_json(notification)), timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise AlertNotSent(f"the command did not end within {ANSWER_SECONDS:.0f} s") from None
        finally:
            _end(process)
        if process.returncode:
            errors.seek(0)
            words = errors.read(_SHOWN).decode(errors="replace").strip()
            raise AlertNotSent(f"the command ended with {process.returncode}: {words}")


def _as_json(notification: Notification) -> dict[str, Any]:
    return {
        "subject": notification.subject,
        "severity": notification.level.severity,
        "text": notification.text,
        "messages": [
            {
                **transition.finding.to_json(),
                "severity": transition.level.severity,
                "change": transition.change,
                "at": transition.at,
            }
            for transition in notification.transitions
        ],
        "left_out": dict(notification.left_out),
    }


#: Deliveries that are in progress, or that ended after `deliver` stopped waiting.
_deliveries: dict[tuple[Path, str], tuple[Notification, BackgroundCall[None]]] = {}


def deliver(
    notifications: Mapping[str, Notification],
    channels: Mapping[str, Send],
    *,
    root: Path,
    seconds: float = POST_SECONDS,
    strict: bool = False,
) -> dict[str, Attempt]:
    """Send the channels' notifications in parallel; return the result by channel.

    A delivery that misses the deadline stays in progress. Its channel sends nothing else until it
    has ended, and `delivered_late` then returns its result. Resending meanwhile would never end if
    the receiver is merely slow.

    Args:
        root: The data folder that the channels belong to.
        seconds: For all of them together.
        strict: Whether a partial delivery counts as not sent. Otherwise it is only logged, because
            sending it again would flood the recipients already reached.
    """
    attempts: dict[str, Attempt] = {}
    begun: dict[str, tuple[Notification, BackgroundCall[None]]] = {}
    for name, notification in notifications.items():
        if (root, name) in _deliveries:
            problem = "an earlier alert is still on its way"
            attempts[name] = Attempt(notification=notification, problem=problem)
        else:
            call = BackgroundCall(f"alert:{name}", partial(channels[name], notification))
            begun[name] = _deliveries[root, name] = notification, call
    until = time.monotonic() + seconds
    for name, (notification, call) in begun.items():
        if call.returned(within=until - time.monotonic()):
            attempts[name] = _attempt(name, *_deliveries.pop((root, name)), strict=strict)
        else:
            problem = f"not done within {seconds:.0f} s"
            attempts[name] = Attempt(notification=notification, problem=problem)
    return attempts


def delivered_late(root: Path) -> dict[str, Attempt]:
    """Return the results of deliveries that had not ended when `deliver` did, and now have."""
    ended = [
        name for (of, name), (_, call) in _deliveries.items() if of == root and call.returned()
    ]
    return {name: _attempt(name, *_deliveries.pop((root, name))) for name in ended}


def _attempt(
    name: str, notification: Notification, call: BackgroundCall[None], *, strict: bool = False
) -> Attempt:
    """Return the result of a delivery that has ended."""
    try:
        call.result()
    except AlertNotSent as error:
        if not error.partly or strict:
            return Attempt(notification=notification, problem=str(error), refused=error.refused)
        logger.warning("%s: the alert reached only some recipients: %s", name, error)
    except Exception as error:  # noqa: BLE001 - its message may hold a secret
        problem = f"it failed with {type(error).__name__}"
        return Attempt(notification=notification, problem=problem)
    return Attempt(notification=notification)


def _connect(settings: Settings) -> smtplib.SMTP:
    address, context = (settings.smtp_host, settings.smtp_port), ssl.create_default_context()
    if settings.smtp_security is SmtpSecurity.TLS:
        server: smtplib.SMTP = smtplib.SMTP_SSL(*address, timeout=WAIT_SECONDS, context=context)
    else:
        server = smtplib.SMTP(*address, timeout=WAIT_SECONDS)
    try:
        if settings.smtp_security is SmtpSecurity.STARTTLS:
            server.starttls(context=context)
        if settings.smtp_user:
            server.login(settings.smtp_user, settings.smtp_password.get_secret_value())
    except BaseException:
        server.close()
        raise
    if server.sock is not None:
        server.sock.settimeout(ANSWER_SECONDS)
    return server


def _mail(settings: Settings, notification: Notification) -> EmailMessage:
    message = EmailMessage()
    # The subject contains file names, which may hold anything.
    message["Subject"] = " ".join(notification.subject.split())
    message["From"] = settings.smtp_from or f"batch@{socket.gethostname()}"
    message["To"] = settings.alert_email_to
    message["Date"] = formatdate(localtime=True)
    message["Message-ID"] = make_msgid()
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no automatic reply
    message.set_content(notification.text_within(MAIL_CHARACTERS) + "\n")
    return message


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # The process leads its own session and is not reaped yet, so its pid is still its own.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(error: object) -> str:
    """Return the system's reason, without the addresses that libraries add."""
    reason = getattr(error, "strerror", None)
    return reason if isinstance(reason, str) and reason else type(error).__name__
