"""Windows: they cover what is missing, each within its limit, and by whole runs."""

from itertools import chain
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.dispatch.batch_window import chunks_by_window
from batch_orchestration_tests.unit.dispatch.test_run_planning import make_record

NUMBERS = st.integers(1, 60)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sets(st.integers(0, 59)))
def test_windows_cover_what_is_missing_once_in_file_order_and_within_their_limit(
    chunks: int, requests_per_chunk: int, most_requests: int, per_run: int, committed: set[int]
) -> None:
    windows = list(
        chunks_by_window(
            make_record(chunks=chunks, requests_per_chunk=requests_per_chunk),
            committed,
            most_requests=most_requests,
            chunks_per_run=per_run,
        )
    )

    covered = list(chain.from_iterable(chain.from_iterable(windows)))
    assert covered == sorted(set(range(chunks)) - committed)
    for window in windows:
        assert window
        assert all(0 < len(run) <= per_run for run in window)
        open_chunks = sum(map(len, window))
        assert open_chunks == 1 or open_chunks * requests_per_chunk <= most_requests


@given(st.integers(1, 2000), st.integers(50, 5000), st.integers(1, 60_000), st.integers(1, 200))
def test_no_run_but_the_last_is_cut_short_at_the_border_of_a_window(
    chunks: int, requests_per_chunk: int, most_requests: int, per_run: int
) -> None:
    """A run costs a start of the engine."""
    runs = list(
        chain.from_iterable(
            chunks_by_window(
                make_record(chunks=chunks, requests_per_chunk=requests_per_chunk),
                (),
                most_requests=most_requests,
                chunks_per_run=per_run,
            )
        )
    )

    longest = min(per_run, max(1, most_requests // requests_per_chunk))
    assert len(runs) == ceil(chunks / longest)
