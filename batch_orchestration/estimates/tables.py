"""Tables of estimates in the store: estimates, scores, measurements and reported engine facts."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import duckdb
import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.engines.base import Engine
from batch_orchestration.estimates.costs import Measurement, Source
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.estimates.estimate import AnsweredRequest, Estimate
from batch_orchestration.estimates.profile import SampledRequest
from batch_orchestration.estimates.scores import Score
from batch_orchestration.store import rows
from batch_orchestration.store.store import Store

_T = TypeVar("_T", bound=msgspec.Struct)
logger = logging.getLogger(__name__)

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
        with self._store.writing() as db:
            _add_estimate(db, batch_id, estimate)

    def add_score(
        self, score: Score, runs: Sequence[Measurement], answered: Sequence[AnsweredRequest]
    ) -> None:
        """Store the score of a batch, its runs and its sampled answers in one transaction.

        Idempotent: a later score of the same batch changes nothing.
        """
        at = rows.timestamp(score.scored_at)
        with self._store.writing() as db:
            _add_estimate(db, score.batch_id, score.estimate)
            scored = db.execute(
                "UPDATE estimates SET scored_at = ?, actual_prompt_tokens = ?,"
                " actual_completion_tokens = ?, actual_seconds = ?, error = ?, inside = ?"
                " WHERE batch_id = ? AND scored_at IS NULL",
                [at, score.actual_prompt_tokens, score.actual_completion_tokens,
                 score.actual_seconds, score.error, score.inside, score.batch_id],
            ).fetchone()  # fmt: skip
            if scored == (0,):
                return
            for run in runs:
                _insert(db, "benchmarks", _row(run))
            shared = {
                "batch_id": score.batch_id,
                "model": score.estimate.engine.get("model", ""),
                "scored_at": score.scored_at,
            }
            found = [shared | _row(request) for request in answered]
            rows.insert(db, "answered_requests", found)

    def scores(self, *, limit: int, until: float | None = None) -> list[Score]:
        """Return the latest scores, newest first, up to `until` if it is given."""
        return self._scores(
            f"scored_at <= coalesce(?, scored_at) ORDER BY scored_at DESC, batch_id LIMIT {limit}",
            None if until is None else rows.timestamp(until),
        )

    def scores_since(self, since: float) -> list[Score]:
        """Return all scores later than `since`, oldest first."""
        return self._scores("scored_at > ? ORDER BY scored_at, batch_id", rows.timestamp(since))

    def score_of(self, batch_id: str) -> Score | None:
        """Return the score of a batch; None if it has none."""
        found = self._scores("batch_id = ? AND scored_at IS NOT NULL", batch_id)
        return found[0] if found else None

    def measure(self, batch_id: str, estimate: Estimate) -> list[Measurement]:
        """Return the work of the engine in each run of a batch, from its answered requests."""
        with self._store.reading() as db:
            found = db.execute(_RUNS, [batch_id, batch_id]).fetchall()
        return [
            Measurement(
                engine=engine,
                model=estimate.engine.get("model", ""),
                device=estimate.engine.get("device", ""),
                memory_level=level or "",
                measured_at=ended,
                source=Source.HISTORY,
                batch_id=batch_id,
                run_id=run_id,
                requests=requests,
                prompt_tokens=int(prompts),
                completion_tokens=int(answers),
                longest=longest,
                at_a_time=estimate.at_a_time,
                seconds=seconds,
            )
            for run_id, engine, requests, prompts, answers, longest, seconds, ended, level in found
        ]

    def answers_to(self, batch_id: str, sample: Iterable[SampledRequest]) -> list[AnsweredRequest]:
        """Return the answered ones among the sampled requests of a batch."""
        sampled = {request.index: request for request in sample}
        with self._store.reading() as db:
            found = db.execute(
                "SELECT request_index, prompt_tokens, completion_tokens, finish_reason"
                " FROM results WHERE batch_id = ?"
                " AND request_index IN (SELECT unnest(?::BIGINT[]))",
                [batch_id, list(sampled)],
            ).fetchall()
        return [
            AnsweredRequest(
                shape=sampled[index].shape,
                characters=sampled[index].characters,
                prompt_tokens=prompt,
                completion_tokens=answer,
                cut=reason == "length",
            )
            for index, prompt, answer, reason in found
        ]

    def answered(self, model: str) -> list[AnsweredRequest]:
        """Return the sampled requests of a model's latest batches."""
        rest = f"WHERE model = ? ORDER BY scored_at DESC LIMIT {ANSWERED_READ}"
        return self._select(AnsweredRequest, "answered_requests", rest, [model])

    def add_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Store measurements."""
        with self._store.writing() as db:
            for measurement in measurements:
                _insert(db, "benchmarks", _row(measurement))

    def measurements(self, engine: EngineInForce) -> list[Measurement]:
        """Return the latest measurements of an engine at the memory level used last."""
        where = "WHERE engine = ? AND model = ? AND device = ?"
        rest = (
            f"{where} AND memory_level ="
            f" (SELECT arg_max(memory_level, measured_at) FROM benchmarks {where})"
            f" ORDER BY measured_at DESC LIMIT {MEASUREMENTS_READ}"
        )
        return self._select(Measurement, "benchmarks", rest, [*engine.key.values()] * 2)

    def put_engine_info(self, engine: EngineInForce, info: CachedEngineInfo) -> None:
        """Replace the facts that an engine with the same flags reported before."""
        key = engine.key | {"args_hash": engine.args_hash}
        with self._store.writing() as db:
            db.execute(f"DELETE FROM engine_facts {_WHERE_ENGINE}", list(key.values()))
            _insert(db, "engine_facts", key | _row(info))

    def engine_info(self, engine: EngineInForce) -> CachedEngineInfo | None:
        """Return the facts that an engine with the same flags reported last; None without any."""
        key = [*engine.key.values(), engine.args_hash]
        found = self._select(CachedEngineInfo, "engine_facts", _WHERE_ENGINE, key)
        return found[0] if found else None

    def _scores(self, where: str, parameter: object) -> list[Score]:
        with self._store.reading() as db:
            found = rows.select(
                db, "estimates", Score.__struct_fields__, f"WHERE {where}", [parameter]
            )
        return [
            Score(estimate=msgspec.json.decode(row.pop("estimate"), type=Estimate), **row)
            for row in found
        ]

    def _select(self, kind: type[_T], table: str, rest: str, parameters: list[Any]) -> list[_T]:
        with self._store.reading() as db:
            found = rows.select(db, table, kind.__struct_fields__, rest, parameters)
        return msgspec.convert(found, list[kind])  # type: ignore[valid-type]


_WHERE_ENGINE = "WHERE engine = ? AND model = ? AND device = ? AND args_hash = ?"


def _add_estimate(db: duckdb.DuckDBPyConnection, batch_id: str, estimate: Estimate) -> None:
    db.execute(
        "INSERT INTO estimates (batch_id, created_at, estimate) SELECT $1, $2, $3"
        " WHERE NOT EXISTS (SELECT 1 FROM estimates WHERE batch_id = $1)",
        [batch_id, rows.timestamp(estimate.created_at), msgspec.json.encode(estimate).decode()],
    )


def _insert(db: duckdb.DuckDBPyConnection, table: str, row: rows.Row) -> None:
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def _row(value: msgspec.Struct) -> rows.Row:
    """Return a struct as a row; fields whose names end with `_at` are times."""
    return {
        name: rows.timestamp(field) if name.endswith("_at") else field
        for name, field in msgspec.to_builtins(value).items()
    }


def cache_engine_info(engine: Engine, in_force: EngineInForce, store: Store, *, at: float) -> None:
    """Store the facts that a started engine reported. Does nothing if it was not started.

    Context length and KV cache size are left out if a reduced memory level shortened the context. A
    store error is only logged, because the next run reports the same facts.
    """
    info = engine.info
    if info is None:
        return
    shortened = "max-model-len" in engine.fallback.flags
    cached = CachedEngineInfo(
        models=info.models,
        max_model_len=None if shortened else info.max_model_len,
        kv_cache_tokens=None if shortened else info.kv_cache_tokens,
        start_seconds=info.start_seconds,
        seen_at=at,
    )
    try:
        EstimateTables(store).put_engine_info(in_force, cached)
    except StorageError as error:
        logger.warning("cannot store what the engine reported at its start: %s", error)
