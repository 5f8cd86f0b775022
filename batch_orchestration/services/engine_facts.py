"""Remembers what an engine said of itself: the next file is judged by it before it starts."""

import logging

from batch_orchestration.core.errors import StorageError
from batch_orchestration.engines.base import Engine
from batch_orchestration.services.estimates import EngineInForce
from batch_orchestration.storage.estimates import EngineFacts, EstimateTables
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)


def remember_engine(engine: Engine, in_force: EngineInForce, store: Store, *, at: float) -> None:
    """Keep what an engine that was started told; of one that was not, nothing is kept.

    Its longest request is left out where the memory ladder had shortened it. A store that cannot be
    written is no reason to fail: the next run tells the same.
    """
    figures = engine.figures()
    if "models" not in figures:
        return
    shortened = "max-model-len" in engine.ladder.flags
    facts = EngineFacts(
        models=tuple(figures["models"]),
        max_model_len=None if shortened else figures.get("max_model_len"),
        kv_cache_tokens=None if shortened else figures.get("kv_cache_tokens"),
        start_seconds=figures.get("start_seconds"),
        seen_at=at,
    )
    try:
        EstimateTables(store).put_facts(facts, **in_force.key, args_hash=in_force.args_hash)
    except StorageError as error:
        logger.warning("what the engine said of itself is not remembered: %s", error)
