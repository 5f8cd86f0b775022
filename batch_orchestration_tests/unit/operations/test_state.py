"""The alert state on a clock of its own: nothing lost, nothing twice, no flood."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from batch_orchestration.operations.alerts.notification import MOST_PENDING, Change, Notification
from batch_orchestration.operations.alerts.state import (
    BURST,
    AlertState,
    Attempt,
    Channel,
    Observation,
    advance,
    due,
    sent,
)
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration_tests.support.builders import NOW

TICK = 30.0
HOUR = 3600.0
POSTS_PER_HOUR = 20.0


def make_alert(check="disk", *, level=Level.UNHEALTHY, kind=AlertKind.DISK_LOW, **fields):
    values = {"title": f"{check} is ill", "reason": "1 GiB is free", **fields}
    return Finding(check=check, kind=kind, level=level, **values)


def make_event(check, at, *, kind=AlertKind.BATCH_EXPIRED):
    return make_alert(check, kind=kind, since=at)


class Desk:
    """Runs the cycle as the sensor does, with one channel that works or does not."""

    def __init__(self):
        self.channels = ("webhook",)
        self.now = NOW
        self.state = AlertState(began=NOW, cursor=NOW)
        self.works = True
        self.refuses: set[str] = set()
        self.attempts: list[float] = []
        self.posts: list[tuple[float, Notification]] = []
        self.transitions: list = []

    def tick(self, *conditions, events=(), unknown=(), seconds=TICK):
        self.now += seconds
        observed = Observation(findings=[*conditions, *events], unknown=unknown)
        self.state, transitions = advance(
            self.state,
            observed,
            channels=self.channels,
            repeat_seconds=4 * HOUR,
            now=self.now,
        )
        self.transitions += transitions
        posts = due(self.state, posts_per_hour=POSTS_PER_HOUR, now=self.now)
        tried = {name: self.send(post) for name, post in posts.items()}
        self.state = sent(self.state, tried, posts_per_hour=POSTS_PER_HOUR, now=self.now)

    def send(self, post):
        self.attempts.append(self.now)
        refused = any(t.finding.check in self.refuses for t in post.transitions)
        if self.works and not refused:
            self.posts.append((self.now, post))
            return Attempt(notification=post)
        problem = "answered 400" if refused else "is down"
        return Attempt(notification=post, problem=problem, refused=refused)

    @property
    def pending(self):
        return self.state.channels["webhook"].pending

    def after(self, attempt):
        """The channel after an attempt that ends now."""
        state = sent(self.state, {"webhook": attempt}, posts_per_hour=POSTS_PER_HOUR, now=self.now)
        return state.channels["webhook"]

    @property
    def told(self):
        """What has gone out, oldest first."""
        return [(t.change, t.finding.check) for _, post in self.posts for t in post.transitions]

    def wait(self, seconds, *conditions):
        for _ in range(int(seconds / TICK)):
            self.tick(*conditions)


def test_a_condition_that_lasts_is_told_once_and_reminded_of_now_and_then():
    desk = Desk()

    desk.wait(9 * HOUR, make_alert())

    assert desk.told == [
        (Change.RAISED, "disk"),
        (Change.REMINDER, "disk"),
        (Change.REMINDER, "disk"),
    ]


def test_other_figures_are_no_news_and_a_worse_level_is():
    desk = Desk()

    desk.tick(make_alert(level=Level.DEGRADED))
    desk.tick(make_alert(level=Level.DEGRADED, reason="0.9 GiB are free"))
    desk.tick(make_alert(level=Level.UNHEALTHY))
    desk.tick(make_alert(level=Level.DEGRADED))
    desk.tick(make_alert(level=Level.UNHEALTHY))

    assert desk.told == [(Change.RAISED, "disk")] * 2


def test_what_is_over_is_told_once_and_then_forgotten():
    desk = Desk()
    desk.tick(make_alert())

    desk.wait(HOUR)

    assert desk.told == [(Change.RAISED, "disk"), (Change.RECOVERED, "disk")]
    assert desk.state.open == {}
    assert desk.posts[-1][1].level is Level.HEALTHY


def test_what_nobody_can_find_out_is_not_over():
    desk = Desk()
    desk.tick(make_alert())

    for _ in range(100):
        desk.tick(unknown=[AlertKind.DISK_LOW])

    assert desk.told == [(Change.RAISED, "disk")]
    assert "disk" in desk.state.open


def test_while_events_cannot_be_observed_the_cursor_waits_for_them():
    desk = Desk()

    desk.tick(unknown=[AlertKind.DISK_LOW, AlertKind.BATCH_EXPIRED])
    assert desk.state.cursor == NOW
    desk.tick(unknown=[AlertKind.DISK_LOW])

    assert desk.state.cursor == desk.now


def test_what_happened_before_the_state_began_is_history():
    desk = Desk()

    desk.tick(events=[make_event(f"ending:b-{n}:3", NOW - n) for n in range(1000)])

    assert desk.told == []


def test_an_outage_of_an_hour_loses_nothing_and_ends_in_one_post():
    desk = Desk()
    desk.works = False
    for number in range(120):
        key = f"ending:b-{number}:3" if number % 4 == 0 else None
        desk.tick(events=[make_event(key, desk.now + TICK)] if key else [])
    tried = len(desk.attempts)

    desk.works = True
    desk.wait(HOUR)

    assert tried <= 9
    assert [len(post.transitions) for _, post in desk.posts] == [30]
    assert len(desk.told) == len(set(desk.told)) == 30
    assert desk.posts[0][0] - (NOW + HOUR) <= 900 + TICK
    assert "30 alerts and recoveries" in desk.posts[0][1].subject


def test_more_than_a_channel_can_keep_is_counted_by_kind():
    desk = Desk()
    desk.works = False
    count = MOST_PENDING + 50
    desk.tick(events=[make_event(f"ending:b-{n}:3", NOW + 1) for n in range(count)])
    desk.works = True
    desk.wait(HOUR)

    ((_, post),) = desk.posts
    assert len(post.transitions) == MOST_PENDING
    assert post.left_out == {"batch_expired": 50}
    assert "batch_expired: 50" in post.text
    assert len(post.text) < 40_000


def test_a_message_that_is_refused_for_good_is_dropped_alone_and_keeps_back_no_other():
    desk = Desk()
    desk.refuses = {"ending:b-7:3", "ending:b-40:3"}
    keys = [f"ending:b-{number}:3" for number in range(60)]

    desk.tick(events=[make_event(key, NOW + 1) for key in keys])
    desk.wait(2 * HOUR)

    assert [key for _, key in desk.told] == [key for key in keys if key not in desk.refuses]
    assert desk.state.channels["webhook"].pending.count == 0
    assert len(desk.attempts) <= BURST + 2 * POSTS_PER_HOUR


def test_a_post_that_ends_late_is_taken_off_whatever_has_come_since():
    desk = Desk()
    desk.works = False
    desk.tick(make_alert("early"))
    ((late),) = due(desk.state, posts_per_hour=POSTS_PER_HOUR, now=desk.now + HOUR).values()
    count = MOST_PENDING + 10
    desk.tick(events=[make_event(f"ending:b-{n}:3", NOW + 1) for n in range(count)])

    state = sent(
        desk.state,
        {"webhook": Attempt(notification=late)},
        posts_per_hour=POSTS_PER_HOUR,
        now=desk.now,
    )

    left = state.channels["webhook"].pending
    assert "early" not in {t.finding.check for t in left.transitions}
    assert left.count >= count


def test_a_refused_alert_does_not_take_along_the_counts_of_others():
    desk = Desk()
    desk.works = False
    desk.tick(make_alert())
    counts = {"batch_expired": 50}
    for pending, left in (
        (replace(desk.pending, left_out=counts), Notification(left_out=counts)),
        (Notification(left_out=counts), Notification()),  # they are what is refused
    ):
        refused = Attempt(notification=pending, problem="answered 400", refused=True)
        desk.state = replace(desk.state, channels={"webhook": Channel(pending=pending)})
        assert desk.after(refused).pending == left


def test_an_alert_that_was_sent_is_not_counted_again_among_those_that_were_not():
    desk = Desk()
    desk.works = False
    desk.tick(make_alert("early"))
    ((late),) = due(desk.state, posts_per_hour=POSTS_PER_HOUR, now=desk.now + HOUR).values()
    desk.tick(events=[make_event(f"ending:b-{n}:3", NOW + 1) for n in range(MOST_PENDING)])

    state = sent(
        desk.state,
        {"webhook": Attempt(notification=late)},
        posts_per_hour=POSTS_PER_HOUR,
        now=desk.now,
    )

    assert desk.state.channels["webhook"].pending.left_out == {"disk_low": 1}
    assert state.channels["webhook"].pending.left_out == {}


def test_a_storm_of_a_thousand_failed_batches_is_one_short_post_with_counts():
    desk = Desk()

    desk.tick(events=[make_event(f"ending:b-{n}:3", NOW + 1) for n in range(1000)])
    desk.wait(HOUR)

    ((_, post),) = desk.posts
    text = post.text_within(1800)
    assert len(text) <= 1800
    assert len(post.text_within(10)) == 10
    assert "1000 alerts" in text
    assert "ending:b-999:3" in text
    shown = text.count("[alert]")
    assert f"batch_expired: {1000 - shown}" in text


def test_a_clock_that_is_set_back_silences_nobody():
    desk = Desk()
    desk.works = False
    desk.tick(make_alert())
    desk.works = True

    desk.now -= 24 * HOUR
    desk.wait(HOUR, make_alert())

    assert (Change.RAISED, "disk") in desk.told


def test_a_clock_that_was_in_the_future_at_first_silences_nobody_for_good():
    desk = Desk()
    desk.now = NOW + 365 * 24 * HOUR
    desk.state = AlertState(began=desk.now, cursor=desk.now)
    for number in range(2 * BURST):  # whatever may go out at once is spent
        desk.tick(make_alert(f"early-{number}"))
    desk.now = NOW
    desk.tick()

    desk.tick(events=[make_event("ending:b-1:3", desk.now + 10)])
    desk.wait(HOUR)

    assert (Change.RAISED, "ending:b-1:3") in desk.told


def test_a_channel_that_is_new_hears_nothing_of_the_past_and_one_that_is_gone_is_forgotten():
    desk = Desk()
    desk.works = False
    desk.tick(make_alert())

    desk.channels, desk.works = ("email",), True
    desk.wait(HOUR, make_alert())

    assert desk.told == []
    assert set(desk.state.channels) == {"email"}


def test_a_message_says_reason_counts_page_and_next_command():
    alert = make_alert(
        counts={"timeout": 1200, "engine_error": 3},
        link="http://dagster/runs/1",
        next_command="python -m batch_orchestration failures b-1",
    )
    desk = Desk()
    desk.tick(alert)

    ((_, post),) = desk.posts
    assert post.text.splitlines() == [
        "[alert] disk is ill",
        "1 GiB is free",
        "timeout: 1,200, engine_error: 3",
        "Page: http://dagster/runs/1",
        "Next: python -m batch_orchestration failures b-1",
    ]


keys = st.sampled_from(["disk", "gpu", "queue"])
ticks = st.lists(
    st.tuples(
        st.sets(keys),  # the conditions
        st.booleans(),  # the channel works
        st.lists(st.integers(0, 9), max_size=3),  # events
        st.floats(1, 900),  # seconds since the tick before
    ),
    max_size=40,
)


@settings(max_examples=50, deadline=None)
@given(ticks)
def test_whatever_happens_each_news_goes_out_exactly_once_in_order_and_episodes_alternate(ticks):
    desk = Desk()
    for conditions, works, numbers, seconds in ticks:
        desk.works = works
        # As the store gives them: at the time when they happened, and so far back only.
        events = [
            make_event(f"event-{number}", NOW + 300 * number + 1)
            for number in numbers
            if NOW + 300 * number + 1 > desk.state.cursor - HOUR
        ]
        desk.tick(*map(make_alert, sorted(conditions)), events=events, seconds=seconds)
    desk.works = True
    for _ in range(24):
        desk.tick(seconds=300)

    assert desk.told == [(t.change, t.finding.check) for t in desk.transitions]
    for key in ("disk", "gpu", "queue"):
        own = [change for change, of in desk.told if of == key and change is not Change.REMINDER]
        assert own == [Change.RAISED, Change.RECOVERED] * (len(own) // 2)
    counts = Counter(key for _, key in desk.told if key.startswith("event"))
    assert set(counts.values()) <= {1}
    assert not any(channel.pending.count for channel in desk.state.channels.values())


@settings(max_examples=50, deadline=None)
@given(ticks)
def test_what_flaps_is_raised_again_only_after_it_was_gone_for_long(ticks):
    desk = Desk()
    last_seen: dict[str, float] = {}
    for conditions, _, _, seconds in ticks:
        told = len(desk.transitions)
        desk.tick(*map(make_alert, sorted(conditions)), seconds=seconds)
        for transition in desk.transitions[told:]:
            if transition.change is Change.RAISED and transition.finding.check in last_seen:
                assert desk.now - last_seen[transition.finding.check] >= 300
        last_seen |= dict.fromkeys(conditions, desk.now)


@settings(max_examples=50, deadline=None)
@given(ticks)
def test_no_channel_is_ever_asked_more_often_than_its_rate(ticks):
    desk = Desk()
    for conditions, works, numbers, seconds in ticks * 3:
        desk.works = works
        events = [make_event(f"{desk.now}-{number}", desk.now + 1) for number in numbers]
        desk.tick(*map(make_alert, sorted(conditions)), events=events, seconds=seconds)

    sent_at = [at for at, _ in desk.posts]
    for at in sent_at:
        within = sum(at <= other < at + HOUR for other in sent_at)
        assert within <= BURST + POSTS_PER_HOUR + 1
