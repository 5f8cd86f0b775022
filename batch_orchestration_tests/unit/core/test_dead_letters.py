from batch_orchestration.core.dead_letters import after_replay
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration_tests.support.builders import (
    NOW,
    make_attempt,
    make_completion,
    make_failure,
    make_provenance,
    make_settled,
)


def test_the_history_of_a_replayed_request_is_in_the_order_of_its_attempts() -> None:
    first, second = make_attempt(at=NOW), make_attempt(FailureCode.ENGINE_ERROR, at=NOW + 9)
    before = make_settled(
        3, make_failure(), attempts=2, failed_attempts=(first,), settled_at=NOW + 1
    )
    replayed = make_settled(
        3,
        make_completion(),
        attempts=2,
        failed_attempts=(second,),
        settled_at=NOW + 10,
        provenance=make_provenance("replay"),
    )

    after = after_replay(before, replayed)

    assert after.attempts == 4
    assert [attempt.at for attempt in after.failed_attempts] == [NOW, NOW + 1, NOW + 9]
    assert after.failed_attempts[1].code == "engine_refused"
    assert (after.outcome, after.settled_at) == (replayed.outcome, NOW + 10)
    assert after.provenance.run_id == "replay"
    assert (after.body, after.line) == (before.body, before.line)
