"""Tables of estimates in the store: estimates, scores, measurements and reported engine facts."""

from collections.abc import Sequence
from typing import Any

import duckdb
import msgspec

from batch_orchestration.estimates.costs import Measurement, Source, Work, steps
from batch_orchestration.estimates.estimate import AnsweredRequest, Band, Basis, Estimate
from batch_orchestration.estimates.scores import Score
from batch_orchestration.store import rows
from batch_orchestration.store.store import Store

#: Limits on the history read: older entries predict less than newer ones.
ANSWERED_READ = 20_000
MEASUREMENTS_READ = 60

#: Figures of each run. Its seconds are the time during which the engine had at least one of its
#: requests: waits and other batches in between do not count towards the engine's speed.
_RUNS = """
    WITH spans AS (
        SELECT *, epoch(settled_at) AS ended, epoch(settled_at) - latency_seconds AS began
        FROM results WHERE batch_id = ?
    ), reached AS (
        SELECT *, max(ended) OVER (
            PARTITION BY run_id ORDER BY began, ended, request_index
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS before FROM spans
    )
    SELECT run_id, any_value(engine), count(*), sum(prompt_tokens), sum(completion_tokens),
        max(completion_tokens),
        sum(greatest(0, ended - greatest(began, coalesce(before, began)))),
        max(ended),
        (SELECT max(memory_level) FROM chunks
            WHERE chunks.batch_id = ? AND chunks.run_id = reached.run_id)
    FROM reached GROUP BY run_id ORDER BY max(ended)
"""


class EngineRun(msgspec.Struct, frozen=True, kw_only=True):
    """Work of an engine in one run of a batch, or in one round of a calibration.

    Attributes:
        memory_level: Level in force, in words; empty if memory is not ours to set.
        longest: Tokens of the longest answer.
        at_a_time: Most requests that the engine had at a time.
        seconds: Time during which the engine had at least one request.
    """

    run_id: str
    engine: str
    memory_level: str
    source: Source
    batch_id: str | None = None
    requests: int
    prompt_tokens: int
    completion_tokens: int
    longest: int
    at_a_time: int
    seconds: float
    measured_at: float

    @property
    def measurement(self) -> Measurement:
        """The run as an input of `throughput`."""
        work = Work(
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            steps=steps(
                requests=self.requests,
                completion_tokens=self.completion_tokens,
                longest=self.longest,
                at_a_time=self.at_a_time,
            ),
        )
        return Measurement(work=work, seconds=self.seconds, source=self.source)


class CachedEngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that an engine reported after its start.

    Attributes:
        models: Model names that the engine serves.
        max_model_len: Most tokens of a request, prompt and answer; None if not reported.
        kv_cache_tokens: Capacity of the KV cache; None if not reported.
        start_seconds: Time until the engine was ready.
    """

    models: tuple[str, ...]
    max_model_len: int | None
    kv_cache_tokens: int | None
    start_seconds: float | None
    seen_at: float


class SampledResult(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of an answered request; `cut` if its answer ended at its cap."""

    prompt_tokens: int
    completion_tokens: int
    cut: bool


class EstimateTables:
    """The queries of estimates. Methods raise the same errors as those of `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def exist(self) -> bool:
        """Whether there is a store; a query must not create one."""
        return self._store.exists

    def add_estimate(self, batch_id: str, estimate: Estimate) -> None:
        """Store the estimate of a batch, unless it already has one."""
        row = _estimate_row(batch_id, estimate)
        with self._store.writing() as db:
            if not rows.select(db, "estimates", ["1"], "WHERE batch_id = ?", [batch_id]):
                _insert(db, "estimates", row)

    def score(self, score: Score, runs: Sequence[EngineRun], *, model: str, device: str,
              answered: Sequence[AnsweredRequest]) -> None:  # fmt: skip
        """Store the score of a batch, its runs and its sampled answers in one transaction.

        Idempotent: a later score of the same batch changes nothing.
        """
        at = rows.timestamp(score.scored_at)
        with self._store.writing() as db:
            (done,) = db.execute(
                "SELECT count(*) FROM estimates WHERE batch_id = ? AND scored_at IS NOT NULL",
                [score.batch_id],
            ).fetchone() or (0,)
            if done:
                return
            db.execute(
                "UPDATE estimates SET scored_at = ?, actual_prompt_tokens = ?,"
                " actual_completion_tokens = ?, actual_seconds = ?, error = ?, inside = ?"
                " WHERE batch_id = ?",
                [at, score.actual_prompt_tokens, score.actual_tokens, score.actual_seconds,
                 score.error, score.inside, score.batch_id],
            )  # fmt: skip
            for run in runs:
                _insert(db, "benchmarks", _run_row(run, model, device))
            found = [
                {"batch_id": score.batch_id, "model": model, "scored_at": at}
                | msgspec.structs.asdict(request)
                for request in answered
            ]
            rows.insert(db, "answered_requests", _ANSWERED, found)

    def scores(self, *, limit: int, until: float | None = None) -> list[Score]:
        """Return the latest scores, newest first, up to `until` if it is given."""
        where = "WHERE scored_at IS NOT NULL" + (" AND scored_at <= ?" if until else "")
        parameters = [rows.timestamp(until)] if until else []
        with self._store.reading() as db:
            found = rows.select(
                db,
                "estimates",
                _SCORE,
                f"{where} ORDER BY scored_at DESC, batch_id LIMIT {limit}",
                parameters,
            )
        return [_score(row) for row in found]

    def scores_since(self, since: float) -> list[Score]:
        """Return all scores later than `since`, oldest first."""
        with self._store.reading() as db:
            found = rows.select(
                db,
                "estimates",
                _SCORE,
                "WHERE scored_at > ? ORDER BY scored_at, batch_id",
                [rows.timestamp(since)],
            )
        return [_score(row) for row in found]

    def score_of(self, batch_id: str) -> Score | None:
        """Return the score of a batch; None if it has none."""
        with self._store.reading() as db:
            found = rows.select(
                db, "estimates", _SCORE, "WHERE batch_id = ? AND scored_at IS NOT NULL", [batch_id]
            )
        return _score(found[0]) if found else None

    def runs_of(self, batch_id: str, *, at_a_time: int) -> list[EngineRun]:
        """Return the work of the engine in each run of a batch, from its answered requests."""
        with self._store.reading() as db:
            found = db.execute(_RUNS, [batch_id, batch_id]).fetchall()
        return [
            EngineRun(
                run_id=run_id,
                engine=engine,
                memory_level=level or "",
                source=Source.HISTORY,
                batch_id=batch_id,
                requests=requests,
                prompt_tokens=int(prompts),
                completion_tokens=int(answers),
                longest=longest,
                at_a_time=at_a_time,
                seconds=seconds,
                measured_at=ended,
            )
            for run_id, engine, requests, prompts, answers, longest, seconds, ended, level in found
        ]

    def results_of(self, batch_id: str, indices: Sequence[int]) -> dict[int, SampledResult]:
        """Return the tokens of the answered ones among these requests, by index."""
        with self._store.reading() as db:
            found = db.execute(
                "SELECT request_index, prompt_tokens, completion_tokens, finish_reason"
                " FROM results WHERE batch_id = ?"
                " AND request_index IN (SELECT unnest(?::BIGINT[]))",
                [batch_id, list(indices)],
            ).fetchall()
        return {
            index: SampledResult(
                prompt_tokens=prompt, completion_tokens=answer, cut=reason == "length"
            )
            for index, prompt, answer, reason in found
        }

    def answered(self, model: str) -> list[AnsweredRequest]:
        """Return the sampled requests of a model's latest batches."""
        with self._store.reading() as db:
            found = rows.select(
                db,
                "answered_requests",
                AnsweredRequest.__struct_fields__,
                f"WHERE model = ? ORDER BY scored_at DESC LIMIT {ANSWERED_READ}",
                [model],
            )
        return [AnsweredRequest(**row) for row in found]

    def add_runs(self, runs: Sequence[EngineRun], *, model: str, device: str) -> None:
        """Store measurements."""
        with self._store.writing() as db:
            for run in runs:
                _insert(db, "benchmarks", _run_row(run, model, device))

    def runs(self, *, engine: str, model: str, device: str) -> list[EngineRun]:
        """Return the latest measurements of an engine at the memory level used last."""
        where = "WHERE engine = ? AND model = ? AND device = ?"
        with self._store.reading() as db:
            found = rows.select(
                db,
                "benchmarks",
                EngineRun.__struct_fields__,
                f"{where} AND memory_level ="
                f" (SELECT arg_max(memory_level, measured_at) FROM benchmarks {where})"
                f" ORDER BY measured_at DESC LIMIT {MEASUREMENTS_READ}",
                [engine, model, device] * 2,
            )
        return [
            EngineRun(
                **{
                    **row,
                    "source": Source(row["source"]),
                    "measured_at": rows.posix_seconds(row["measured_at"]),
                }
            )
            for row in found
        ]

    def put_facts(
        self, facts: CachedEngineInfo, *, engine: str, model: str, device: str, args_hash: str
    ) -> None:
        """Replace the facts that an engine reported before."""
        key = {"engine": engine, "model": model, "device": device, "args_hash": args_hash}
        with self._store.writing() as db:
            db.execute(f"DELETE FROM engine_facts {_WHERE_ENGINE}", list(key.values()))
            _insert(
                db,
                "engine_facts",
                key
                | msgspec.structs.asdict(facts)
                | {
                    "models": msgspec.json.encode(facts.models).decode(),
                    "seen_at": rows.timestamp(facts.seen_at),
                },
            )

    def facts(
        self, *, engine: str, model: str, device: str, args_hash: str
    ) -> CachedEngineInfo | None:
        """Return the facts that an engine with these flags reported last; None without any."""
        with self._store.reading() as db:
            found = rows.select(
                db,
                "engine_facts",
                CachedEngineInfo.__struct_fields__,
                _WHERE_ENGINE,
                [engine, model, device, args_hash],
            )
        if not found:
            return None
        row = found[0]
        row["models"] = msgspec.json.decode(row["models"], type=tuple[str, ...])
        row["seen_at"] = rows.posix_seconds(row["seen_at"])
        return CachedEngineInfo(**row)


_WHERE_ENGINE = "WHERE engine = ? AND model = ? AND device = ? AND args_hash = ?"
_ANSWERED = {
    **dict.fromkeys(("batch_id", "model", "shape"), "object"),
    **dict.fromkeys(("characters", "prompt_tokens", "completion_tokens"), "int64"),
    "cut": "bool",
    "scored_at": "datetime64[us]",
}
_BANDS = ("prompt", "completion", "seconds")
_SCORE = (
    *("batch_id", "requests", "basis", "scored_at", "actual_prompt_tokens"),
    *("actual_completion_tokens", "actual_seconds"),
    *(f"{band}_{end}" for band in _BANDS for end in ("low", "mid", "high")),
)


def _insert(db: duckdb.DuckDBPyConnection, table: str, row: rows.Row) -> None:
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def _estimate_row(batch_id: str, estimate: Estimate) -> rows.Row:
    bands = {
        "prompt": estimate.prompt_tokens,
        "completion": estimate.completion_tokens,
        "seconds": estimate.seconds,
    }
    row: dict[str, Any] = {
        f"{name}_{end}": getattr(band, end, None)
        for name, band in bands.items()
        for end in ("low", "mid", "high")
    }
    return row | {
        "batch_id": batch_id,
        "created_at": rows.timestamp(estimate.created_at),
        "requests": estimate.requests,
        "basis": str(estimate.basis),
        "start_seconds": estimate.start_seconds,
        "ahead_seconds": estimate.ahead_seconds,
        "window_seconds": estimate.window_seconds,
        "price_mid": None if estimate.price is None else estimate.price.mid,
        "from_history": estimate.from_history,
        "measurements": estimate.measurements,
    }


def _score(row: rows.Row) -> Score:
    prompt, completion, seconds = (
        None if row[f"{name}_low"] is None else Band(
            low=row[f"{name}_low"], mid=row[f"{name}_mid"], high=row[f"{name}_high"]
        )
        for name in _BANDS
    )  # fmt: skip
    assert prompt is not None
    assert completion is not None
    return Score(
        batch_id=row["batch_id"],
        scored_at=rows.posix_seconds(row["scored_at"]),
        requests=row["requests"],
        basis=Basis(row["basis"]),
        expected_prompt_tokens=prompt,
        actual_prompt_tokens=row["actual_prompt_tokens"],
        expected_tokens=completion,
        actual_tokens=row["actual_completion_tokens"],
        expected_seconds=seconds,
        actual_seconds=row["actual_seconds"],
    )


def _run_row(run: EngineRun, model: str, device: str) -> rows.Row:
    per_second = 1 / run.seconds if run.seconds > 0 else 0.0
    return msgspec.structs.asdict(run) | {
        "model": model,
        "device": device,
        "source": str(run.source),
        "measured_at": rows.timestamp(run.measured_at),
        "prompt_tokens_per_second": run.prompt_tokens * per_second,
        "completion_tokens_per_second": run.completion_tokens * per_second,
        "requests_per_second": run.requests * per_second,
    }
