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
    run_id VARCHAR
);

CREATE TABLE results (
    batch_id VARCHAR NOT NULL,
    chunk INTEGER NOT NULL,
    request_index BIGINT NOT NULL,      -- place in the batch, from 0
    line BIGINT NOT NULL,               -- in the file, from 1
    custom_id VARCHAR,
    endpoint VARCHAR NOT NULL,
    http_status INTEGER NOT NULL,
    response VARCHAR NOT NULL,          -- the engine's answer, JSON
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
    request_id VARCHAR,
    latency_seconds DOUBLE NOT NULL,
    body VARCHAR NOT NULL,              -- the request, JSON; the line itself where it was unreadable
    attempts INTEGER NOT NULL,
    failed_attempts VARCHAR NOT NULL,
    settled_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    engine VARCHAR NOT NULL,
    engine_version VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    settings_hash VARCHAR NOT NULL
);
