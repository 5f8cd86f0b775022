"""Whatever people do in whatever order: each request is in exactly one of output and errors."""

import contextlib
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_orchestration.core.dead_letters import DeadLetterState, Selection
from batch_orchestration.core.errors import DeadLetterError, EngineDied
from batch_orchestration.store.operations import open_replays
from batch_orchestration_tests.support.letter_bench import LetterBench, number_of, refusing
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine

REQUESTS = 12
FAILING = (1, 2, 5, 8, 11)

numbers = st.frozensets(st.sampled_from(FAILING), max_size=4)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), numbers),
        st.tuples(st.just("replay"), numbers),
        st.tuples(st.just("die"), numbers),
        st.tuples(st.just("discard"), numbers),
        st.tuples(st.just("take back"), numbers),
        st.tuples(st.just("recommit"), st.just(frozenset())),
        st.tuples(st.just("recover"), st.just(frozenset())),
        st.tuples(st.just("assemble"), st.just(frozenset())),
    ),
    max_size=6,
)


def take(bench: LetterBench, step: str, chosen: frozenset[int]) -> None:
    meant = Selection(custom_ids=tuple(f"request-{number}" for number in chosen))
    if step == "ask":
        bench.ask(meant)
    elif step in {"replay", "die"}:
        engine = refusing(*chosen) if step == "replay" else killed_by(chosen)
        for _, number in open_replays(bench.folder):
            bench.replay(number, engine, engine_restarts=0, in_flight=2)
    elif step == "discard":
        bench.discard(meant)
    elif step == "take back":
        states = (DeadLetterState.DEAD, DeadLetterState.REPLAYING)
        bench.discard(Selection(custom_ids=meant.custom_ids, states=states))
    elif step == "recommit":
        for chunk in bench.plan.chunks:
            bench.recommit(chunk.number)
    elif step == "recover":
        bench.recover()
    else:
        bench.assemble()


def killed_by(chosen: frozenset[int]) -> ScriptedEngine:
    def script(body: bytes, submitted: int):
        return EngineDied("scripted") if number_of(body) in chosen else None

    return ScriptedEngine(script)


#: Each step opens DuckDB a few times: a second an example, more on a busy machine.
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps)
def test_counts_add_up_through_any_sequence(taken: list[tuple[str, frozenset[int]]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        bench = LetterBench(Path(root), failing=FAILING, requests=REQUESTS)
        for step, chosen in taken:
            before = bench.states()
            with contextlib.suppress(DeadLetterError, EngineDied):
                take(bench, step, chosen)
            bench.assert_accounts_add_up()
            after = bench.states()
            # No letter vanishes, and no verdict of a person or answer is undone.
            assert before.keys() <= after.keys()
            for index, state in before.items():
                if state in {"resolved", "discarded"}:
                    assert after[index] == state
        there = bench.contents()
        bench.recover()
        again = bench.contents()
        for table in ("results", "failed_requests", "dead_letter_events"):
            assert again[table] == there[table]
