-- `failed_requests` becomes the queue of dead letters. A row is never deleted: what a replay answered
-- stays, as `resolved`, beside its row in `results`. All ALTERs come first: DuckDB changes no table
-- that has uncommitted updates.

ALTER TABLE failed_requests ADD COLUMN state VARCHAR DEFAULT 'dead'; -- dead, replaying, resolved, discarded
ALTER TABLE failed_requests ALTER COLUMN state SET NOT NULL;
ALTER TABLE failed_requests ADD COLUMN first_failed_at TIMESTAMP;
ALTER TABLE failed_requests ADD COLUMN last_failed_at TIMESTAMP;
ALTER TABLE failed_requests ADD COLUMN replay INTEGER;               -- number of the latest one
ALTER TABLE failed_requests ADD COLUMN resolved_at TIMESTAMP;
ALTER TABLE failed_requests ADD COLUMN discarded_at TIMESTAMP;
ALTER TABLE failed_requests ADD COLUMN discard_reason VARCHAR;

-- Every state that a dead letter was ever in, with who brought it there; rows are only added.
CREATE TABLE dead_letter_events (
    batch_id VARCHAR NOT NULL,
    request_index BIGINT NOT NULL,
    happened_at TIMESTAMP NOT NULL,
    state VARCHAR NOT NULL,
    actor VARCHAR NOT NULL,             -- run, or person
    operation INTEGER,                  -- number of the replay or discard; NULL for a run's failure
    code VARCHAR,                       -- of the failure
    reason VARCHAR NOT NULL,            -- message, reason of a discard, overrides of a replay
    engine VARCHAR NOT NULL,
    settings_hash VARCHAR NOT NULL
);

INSERT INTO dead_letter_events
SELECT batch_id, request_index, settled_at, 'dead', run_id, NULL, code, message, engine, settings_hash
FROM failed_requests;

UPDATE failed_requests SET
    last_failed_at = settled_at,
    first_failed_at = coalesce(
        make_timestamp(
            CAST(CAST(json_extract(failed_attempts, '$[0].at') AS DOUBLE) * 1000000 AS BIGINT)
        ),
        settled_at
    );
