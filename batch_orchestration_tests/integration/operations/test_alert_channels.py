"""Channels against real sockets and processes: what arrives, what is said if it does not."""

import json
import logging
import sys
import threading
import time

import pytest

from batch_orchestration.core.errors import AlertNotSent
from batch_orchestration.operations.alerts import channels as channels_module
from batch_orchestration.operations.alerts.channels import alert_channels, deliver, delivered_late
from batch_orchestration.operations.alerts.notification import Change, Notification, Transition
from batch_orchestration.operations.alerts.state import Attempt
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.settings import Settings, settings_in_force
from batch_orchestration_tests.support.alert_servers import MailServer, Webhook, serving
from batch_orchestration_tests.support.builders import NOW

SECRET = "s3cret"


def make_notification(title="The disk is nearly full", **fields):
    finding = Finding(
        check="disk", kind=AlertKind.DISK_LOW, level=Level.UNHEALTHY, title=title, since=NOW,
        reason="1 GiB < 2 GiB & falling", counts={"timeout": 3}, **fields,
    )  # fmt: skip
    transition = Transition(change=Change.RAISED, finding=finding, at=NOW)
    return Notification(transitions=(transition,))


def make_settings(**values):
    return Settings(**{"engine": "simulated", **values}, _env_file=None)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def webhook():
    with serving(Webhook()) as server:
        yield server


@pytest.fixture
def mail_server():
    with serving(MailServer()) as server:
        yield server


def webhook_channel(url):
    return alert_channels(make_settings(alert_webhook_url=url))["webhook"]


def mail_channel(port, **values):
    settings = make_settings(
        alert_email_to="ops@example.org, night@example.org", smtp_host="127.0.0.1",
        smtp_port=port, smtp_security="none", smtp_from="batch@example.org", **values,
    )  # fmt: skip
    return alert_channels(settings)["email"]


def failure_of(send):
    with pytest.raises(AlertNotSent) as caught:
        send(make_notification())
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


def problem_of(send):
    return str(failure_of(send))


# --- webhook --------------------------------------------------------------------------------------


def test_a_webhook_gets_text_that_slack_shows_as_it_is(webhook):
    webhook_channel(webhook.url)(make_notification())

    (text,) = webhook.texts
    assert text.splitlines()[:3] == [
        "[alert] The disk is nearly full",
        "1 GiB &lt; 2 GiB &amp; falling",
        "timeout: 3",
    ]


@pytest.mark.parametrize(
    ("status", "refused"),
    [
        *((400, True), (413, True), (422, True)),
        *((302, False), (404, False), (429, False), (500, False), (None, False)),
    ],
)
def test_a_webhook_that_does_not_take_a_post_says_why_without_a_secret(webhook, status, refused):
    webhook.status = status

    error = failure_of(webhook_channel(webhook.url))

    assert str(status or "did not answer") in str(error)
    assert error.refused is refused
    assert not any(asked.startswith("GET") for asked in webhook.asked)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/s3cret",
        "s3cret",
        "ftp://127.0.0.1/s3cret",
        "http://127.0.0.1:9/s3cret with blanks",
        "http://127.0.0.1:s3cret/",
        "http://s3cret.invalid/",
    ],
)
def test_an_address_that_leads_nowhere_is_a_problem_that_tells_no_secret(url):
    problem_of(webhook_channel(url))


def test_secrets_are_shown_nowhere():
    settings = make_settings(
        alert_webhook_url=f"https://hooks.example.org/{SECRET}", smtp_password=SECRET
    )

    assert SECRET not in repr(settings)
    assert SECRET not in repr(settings_in_force(settings))
    assert SECRET not in repr(alert_channels(settings))


# --- mail -----------------------------------------------------------------------------------------


def test_a_mail_goes_to_everybody_with_the_alert_as_its_text(mail_server):
    mail_channel(mail_server.port)(make_notification("The file a\nBcc: x@example.org was rejected"))

    ((recipients, mail),) = mail_server.mails
    assert recipients == ["ops@example.org", "night@example.org"]
    assert mail["Subject"] == "[alert] The file a Bcc: x@example.org was rejected"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert "1 GiB < 2 GiB & falling" in mail.get_payload(decode=True).decode()


def test_a_mail_server_that_refuses_is_a_problem_that_tells_no_secret(mail_server):
    mail_server.takes_logins = False
    assert "535" in problem_of(mail_channel(mail_server.port, smtp_user="me", smtp_password=SECRET))
    assert len(mail_server.logins) >= 1

    mail_server.refuses = {"ops@example.org", "night@example.org"}
    assert "every address" in problem_of(mail_channel(mail_server.port))


def test_a_wrong_address_among_others_is_no_reason_to_send_it_again(mail_server, tmp_path):
    """Else everybody else would get the same mail for ever."""
    mail_server.refuses = {"ops@example.org"}
    channels = {"email": mail_channel(mail_server.port)}

    problems = deliver({"email": make_notification()}, channels, root=tmp_path)
    tested = deliver({"email": make_notification()}, channels, root=tmp_path, strict=True)

    assert problems["email"].problem is None
    assert tested["email"].problem == "the mail server refused ops@example.org"


def test_a_mail_server_that_is_not_there_or_speaks_no_tls_is_a_problem(mail_server):
    problem_of(mail_channel(9))

    settings = make_settings(
        alert_email_to="ops@example.org", smtp_host="127.0.0.1", smtp_port=mail_server.port
    )
    problem_of(alert_channels(settings)["email"])
    assert mail_server.mails == []


# --- command --------------------------------------------------------------------------------------


def command_channel(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return alert_channels(make_settings(alert_command=command))["command"]


def test_a_command_gets_the_post_as_json(tmp_path):
    path = tmp_path / "got.json"

    command_channel(
        "import sys, pathlib; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())", path
    )(make_notification(next_command="du"))

    got = json.loads(path.read_text())
    assert (got["subject"], got["severity"]) == ("[alert] The disk is nearly full", "error")
    (message,) = got["messages"]
    assert (message["kind"], message["counts"], message["next_command"]) == (
        "disk_low",
        {"timeout": 3},
        "du",
    )


def test_a_command_that_fails_says_how():
    assert "ended with 3: no pager" in problem_of(
        command_channel("import sys; print('no pager', file=sys.stderr); sys.exit(3)")
    )


def test_a_command_that_is_not_there_or_hangs_is_a_problem_in_time(monkeypatch, tmp_path):
    monkeypatch.setattr(channels_module, "ANSWER_SECONDS", 0.3)
    began = time.monotonic()

    missing = alert_channels(make_settings(alert_command=[str(tmp_path / "nothing")]))["command"]
    problem_of(missing)
    problem_of(command_channel("import time; time.sleep(600)"))

    assert time.monotonic() - began < 100


def test_a_post_is_never_longer_than_discord_takes(webhook):
    (transition,) = make_notification().transitions
    many = Notification(transitions=(transition,) * 100, left_out={"disk_low": 900})
    webhook_channel(webhook.url)(many)

    assert len(webhook.texts[0]) <= 2000
    assert "1000 alerts" in webhook.texts[0]


def test_a_mail_that_was_taken_is_sent_however_the_server_parts(mail_server):
    mail_server.parts_well = False

    mail_channel(mail_server.port)(make_notification())

    assert len(mail_server.mails) == 1


def test_what_a_slow_channel_has_taken_late_is_known_afterwards(tmp_path):
    go_on = threading.Event()
    channels = {"email": lambda post: go_on.wait(20)}
    post = make_notification()

    first = deliver({"email": post}, channels, root=tmp_path, seconds=0.05)
    assert first["email"].problem is not None
    assert delivered_late(tmp_path) == {}
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "alert:email":
            thread.join(5)

    assert delivered_late(tmp_path)["email"] == Attempt(notification=post)
    assert delivered_late(tmp_path) == {}


# --- delivery -------------------------------------------------------------------------------------


def test_a_channel_that_hangs_holds_up_neither_the_tick_nor_the_others(tmp_path, webhook):
    never, begun = threading.Event(), []

    def hanging(post):
        begun.append(post)
        never.wait(200)

    channels = {"email": hanging, "webhook": webhook_channel(webhook.url)}
    posts = dict.fromkeys(channels, make_notification())
    began = time.monotonic()
    first = deliver(posts, channels, root=tmp_path, seconds=1.0)
    second = deliver(posts, channels, root=tmp_path, seconds=1.0)

    assert time.monotonic() - began < 100
    assert first["webhook"].problem is None
    assert "not done" in first["email"].problem
    assert "still on its way" in second["email"].problem
    assert len(begun) == 1
    never.set()


def test_a_channel_that_raises_what_nobody_foresaw_is_a_problem_without_its_words(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)

    def broken(post):
        raise RuntimeError(SECRET)

    problems = deliver({"x": make_notification()}, {"x": broken}, root=tmp_path)

    assert problems["x"].problem == "it failed with RuntimeError"
    assert SECRET not in caplog.text
