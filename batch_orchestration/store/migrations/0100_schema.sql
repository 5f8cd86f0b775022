-- The schema. Nothing older is migrated: see `schema.py`.
--
-- Times are UTC. JSON is kept as text. There are no keys on purpose: they cost a third of a commit,
-- and a chunk is replaced as a whole (delete, then insert, in one transaction).

CREATE TABLE batches (
    batch_id VARCHAR NOT NULL,
    identity VARCHAR NOT NULL,
    file_name VARCHAR NOT NULL,
    sha256 VARCHAR NOT NULL,
    size_bytes BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    faulty BIGINT NOT NULL,
    chunks INTEGER NOT NULL,
    requests_per_chunk INTEGER NOT NULL, -- of each chunk but the last
    model VARCHAR NOT NULL,
    priority INTEGER NOT NULL,
    options VARCHAR NOT NULL,
    settings VARCHAR NOT NULL,
    settings_hash VARCHAR NOT NULL,
    status VARCHAR NOT NULL,            -- OpenAI's eight words
    created_at TIMESTAMP NOT NULL,
    in_progress_at TIMESTAMP,
    finalizing_at TIMESTAMP,
    completed_at TIMESTAMP,
    failed_at TIMESTAMP,
    expired_at TIMESTAMP,
    cancelling_at TIMESTAMP,
    cancelled_at TIMESTAMP,
    -- Figures of committed chunks.
    chunks_committed INTEGER NOT NULL,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL
);

CREATE TABLE chunks (
    batch_id VARCHAR NOT NULL,
    chunk INTEGER NOT NULL,
    first_index BIGINT NOT NULL,
    requests INTEGER NOT NULL,
    status VARCHAR NOT NULL,            -- pending, committed
    completed INTEGER,
    failed INTEGER,
    prompt_tokens BIGINT,
    completion_tokens BIGINT,
    attempts BIGINT,
    seconds DOUBLE,
    failures_by_code VARCHAR,           -- JSON object: code to count
    committed_at TIMESTAMP,
    run_id VARCHAR,
    memory_level VARCHAR,               -- of the engine that completed the chunk; NULL if not known
    -- Latencies, like the other figures, stay until the next commit: sums over all chunks never fall.
    latency_counts BIGINT[],            -- by the bounds of `LATENCY_BOUNDS`, then all
    latency_micros BIGINT               -- whole ones: their sum is the same in any order
);

CREATE TABLE results (
    batch_id VARCHAR NOT NULL,
    chunk INTEGER NOT NULL,
    request_index BIGINT NOT NULL,      -- place in the batch, from 0
    line BIGINT NOT NULL,               -- in the file, from 1
    custom_id VARCHAR,
    endpoint VARCHAR NOT NULL,
    http_status INTEGER NOT NULL,
    response VARCHAR,                   -- the engine's answer, JSON; NULL where it is too large
    response_at VARCHAR,                -- then its place: journal:first byte+bytes of the record
    request_id VARCHAR,
    finish_reason VARCHAR,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    latency_seconds DOUBLE NOT NULL,
    attempts INTEGER NOT NULL,
    failed_attempts VARCHAR NOT NULL,   -- JSON array of {at, code, message}
    settled_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    engine VARCHAR NOT NULL,
    engine_version VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    settings_hash VARCHAR NOT NULL
);

-- The dead letters. A row is never deleted: one that a replay answered stays, as `resolved`, beside its
-- row in `results`.
CREATE TABLE failed_requests (
    batch_id VARCHAR NOT NULL,
    chunk INTEGER NOT NULL,
    request_index BIGINT NOT NULL,
    line BIGINT NOT NULL,
    custom_id VARCHAR,                  -- NULL where the line did not give one
    endpoint VARCHAR NOT NULL,
    code VARCHAR NOT NULL,
    message VARCHAR NOT NULL,
    http_status INTEGER,                -- NULL where no engine answered
    response VARCHAR,
    response_at VARCHAR,                -- as in `results`
    request_id VARCHAR,
    latency_seconds DOUBLE NOT NULL,
    body VARCHAR,                       -- the request, JSON; the line itself where it was unreadable;
                                        -- NULL where it is too large: the kept input has it
    attempts INTEGER NOT NULL,
    failed_attempts VARCHAR NOT NULL,
    settled_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    engine VARCHAR NOT NULL,
    engine_version VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    settings_hash VARCHAR NOT NULL,
    state VARCHAR NOT NULL DEFAULT 'dead', -- dead, replaying, resolved, discarded
    first_failed_at TIMESTAMP,
    last_failed_at TIMESTAMP,
    replay INTEGER,                     -- number of the latest one
    resolved_at TIMESTAMP,
    discarded_at TIMESTAMP,
    discard_reason VARCHAR
);

-- Every state of a dead letter, and the run or person that set it; rows are only added.
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

-- Every status of a batch, what set it, and why; rows are only added.
CREATE TABLE batch_events (
    batch_id VARCHAR NOT NULL,
    number INTEGER NOT NULL,            -- place in the batch's history, from 1
    happened_at TIMESTAMP NOT NULL,
    from_status VARCHAR,                -- NULL for the first
    to_status VARCHAR NOT NULL,
    actor VARCHAR NOT NULL,             -- run, person or sensor
    reason VARCHAR NOT NULL
);

-- One row per request of the committed chunks. A dead letter that a replay answered shows as the answer.
CREATE VIEW request_outcomes AS
SELECT
    batch_id, chunk, request_index, line, custom_id, endpoint, 'completed' AS status,
    CAST(NULL AS VARCHAR) AS code, CAST(NULL AS VARCHAR) AS message, http_status, response, response_at,
    request_id, finish_reason, prompt_tokens, completion_tokens, latency_seconds, attempts, settled_at,
    run_id, engine, engine_version, model, settings_hash, engine = 'simulated' AS simulated
FROM results
UNION ALL
SELECT
    batch_id, chunk, request_index, line, custom_id, endpoint, 'failed' AS status,
    code, message, http_status, response, response_at,
    request_id, NULL AS finish_reason, NULL AS prompt_tokens, NULL AS completion_tokens, latency_seconds,
    attempts, settled_at, run_id, engine, engine_version, model, settings_hash,
    engine = 'simulated' AS simulated
FROM failed_requests
WHERE state <> 'resolved';

-- What batches were expected to take, what they took, and what that teaches about the next ones.

CREATE TABLE estimates (
    batch_id VARCHAR NOT NULL,
    created_at TIMESTAMP NOT NULL,
    estimate VARCHAR NOT NULL,          -- JSON, as in estimate.json
    scored_at TIMESTAMP,                -- NULL until the batch is completed, as is what follows
    actual_prompt_tokens BIGINT,
    actual_completion_tokens BIGINT,
    actual_seconds DOUBLE,
    error DOUBLE,                       -- |estimate - actual| / actual, of the seconds
    inside BOOLEAN                      -- whether the actual seconds are within the band
);

-- One row per run of a batch, or per round of a calibration.
CREATE TABLE benchmarks (
    engine VARCHAR NOT NULL,            -- vllm, remote, simulated
    model VARCHAR NOT NULL,
    device VARCHAR NOT NULL,
    memory_level VARCHAR NOT NULL,      -- memory settings in force, for people
    measured_at TIMESTAMP NOT NULL,
    source VARCHAR NOT NULL,            -- calibration, history
    batch_id VARCHAR,
    run_id VARCHAR NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    longest BIGINT NOT NULL,            -- tokens of the longest answer
    at_a_time INTEGER NOT NULL,         -- most requests at the engine
    seconds DOUBLE NOT NULL,            -- during which the engine had at least one of them
    prompt_tokens_per_second DOUBLE AS (prompt_tokens / nullif(seconds, 0)),
    completion_tokens_per_second DOUBLE AS (completion_tokens / nullif(seconds, 0)),
    requests_per_second DOUBLE AS (requests / nullif(seconds, 0))
);

-- A sample of finished batches: what was asked, by shape, and how long the answer was.
CREATE TABLE answered_requests (
    batch_id VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    scored_at TIMESTAMP NOT NULL,
    shape VARCHAR NOT NULL,
    characters BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    cut BOOLEAN NOT NULL                -- by its cap
);

-- What an engine reported after its start.
CREATE TABLE engine_facts (
    engine VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    device VARCHAR NOT NULL,
    args_hash VARCHAR NOT NULL,
    seen_at TIMESTAMP NOT NULL,
    max_model_len BIGINT,
    kv_cache_tokens BIGINT,
    models VARCHAR[] NOT NULL,          -- names that it answers to
    start_seconds DOUBLE
);

-- What the GPUs did while runs used them: taken from the samples files of the batches, and pruned by age.

CREATE TABLE gpu_samples (
    run_id VARCHAR NOT NULL,
    batch_id VARCHAR NOT NULL,              -- the run's own; guests of the run share its samples
    sampled_at TIMESTAMP NOT NULL,
    gpu VARCHAR NOT NULL,                   -- uuid
    gpu_index INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    memory_used_bytes BIGINT,               -- NULL, here and below, is what the device does not report
    memory_free_bytes BIGINT,
    memory_total_bytes BIGINT,
    temperature_celsius INTEGER,
    slowdown_celsius INTEGER,
    utilization_percent INTEGER,
    power_watts DOUBLE,
    power_limit_watts DOUBLE,
    sm_clock_mhz INTEGER,
    memory_clock_mhz INTEGER,
    throttle_reasons VARCHAR,               -- in words, separated by commas; '' if nothing holds the clock
    ecc_uncorrectable_errors BIGINT,        -- since the driver was loaded
    remap_pending BOOLEAN,
    remap_failed BOOLEAN,
    recovery_action VARCHAR,
    in_flight INTEGER NOT NULL,             -- requests that the engine had
    window_requests INTEGER NOT NULL,       -- how many it was allowed
    output_tokens_per_second DOUBLE NOT NULL
);

-- How much of each samples file is in the table.
CREATE TABLE gpu_sample_files (
    batch_id VARCHAR NOT NULL,
    run_id VARCHAR NOT NULL,
    bytes BIGINT NOT NULL
);
