-- What batches were expected to take, what they took, and what that teaches about the next ones.

CREATE TABLE estimates (
    batch_id VARCHAR NOT NULL,
    created_at TIMESTAMP NOT NULL,
    requests BIGINT NOT NULL,
    basis VARCHAR NOT NULL,             -- how prompt tokens were counted
    prompt_low DOUBLE NOT NULL,
    prompt_mid DOUBLE NOT NULL,
    prompt_high DOUBLE NOT NULL,
    completion_low DOUBLE NOT NULL,
    completion_mid DOUBLE NOT NULL,
    completion_high DOUBLE NOT NULL,
    seconds_low DOUBLE,                 -- NULL where the engine had never been measured
    seconds_mid DOUBLE,
    seconds_high DOUBLE,
    start_seconds DOUBLE,
    ahead_seconds DOUBLE NOT NULL,
    window_seconds DOUBLE,
    price_mid DOUBLE,
    from_history DOUBLE NOT NULL,       -- share of the requests with answers like earlier ones
    measurements INTEGER NOT NULL,
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
    rung VARCHAR NOT NULL,              -- memory settings in force, for people
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
    prompt_tokens_per_second DOUBLE NOT NULL,
    completion_tokens_per_second DOUBLE NOT NULL,
    requests_per_second DOUBLE NOT NULL
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

-- What an engine said of itself when it had started.
CREATE TABLE engine_facts (
    engine VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    device VARCHAR NOT NULL,
    args_hash VARCHAR NOT NULL,
    seen_at TIMESTAMP NOT NULL,
    max_model_len BIGINT,
    kv_cache_tokens BIGINT,
    models VARCHAR NOT NULL,            -- JSON array: names that it answers to
    start_seconds DOUBLE
);
