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
