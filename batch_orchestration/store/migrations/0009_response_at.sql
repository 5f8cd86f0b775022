-- What is too large for this file stays where it was: an engine's answer in a journal, a request's
-- body in its line of the kept input.
ALTER TABLE results ADD COLUMN response_at VARCHAR;         -- journal:first byte+bytes of the record
ALTER TABLE failed_requests ADD COLUMN response_at VARCHAR;
ALTER TABLE results ALTER COLUMN response DROP NOT NULL;    -- NULL where `response_at` is not
ALTER TABLE failed_requests ALTER COLUMN body DROP NOT NULL;
CREATE OR REPLACE VIEW request_outcomes AS
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
