-- Every status that a batch was ever in, with who brought it there and why; rows are only added.
CREATE TABLE batch_events (
    batch_id VARCHAR NOT NULL,
    number INTEGER NOT NULL,            -- place in the batch's history, from 1
    happened_at TIMESTAMP NOT NULL,
    from_status VARCHAR,                -- NULL for the first
    to_status VARCHAR NOT NULL,
    actor VARCHAR NOT NULL,             -- run, person or sensor
    reason VARCHAR NOT NULL
);

-- Of batches that are older than this table only the times are known.
INSERT INTO batch_events
SELECT
    batch_id,
    row_number() OVER history,
    happened_at,
    lag(to_status) OVER history,
    to_status,
    'unknown',
    'from before events were kept'
FROM (
    SELECT batch_id, created_at AS happened_at, 'validating' AS to_status, 1 AS place FROM batches
    UNION ALL SELECT batch_id, in_progress_at, 'in_progress', 2 FROM batches
    UNION ALL SELECT batch_id, finalizing_at, 'finalizing', 3 FROM batches
    UNION ALL SELECT batch_id, completed_at, 'completed', 4 FROM batches
)
WHERE happened_at IS NOT NULL
WINDOW history AS (PARTITION BY batch_id ORDER BY place);
