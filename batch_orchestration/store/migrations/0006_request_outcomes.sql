-- What became of each request of the committed chunks, answered or not: one row per request. A dead
-- letter that a replay answered shows as the answer only.
CREATE VIEW request_outcomes AS
SELECT
    batch_id, chunk, request_index, line, custom_id, endpoint, 'completed' AS status,
    CAST(NULL AS VARCHAR) AS code, CAST(NULL AS VARCHAR) AS message, http_status, response, request_id,
    finish_reason, prompt_tokens, completion_tokens, latency_seconds, attempts, settled_at,
    run_id, engine, engine_version, model, settings_hash, engine = 'simulated' AS simulated
FROM results
UNION ALL
SELECT
    batch_id, chunk, request_index, line, custom_id, endpoint, 'failed' AS status,
    code, message, http_status, response, request_id,
    NULL AS finish_reason, NULL AS prompt_tokens, NULL AS completion_tokens, latency_seconds, attempts,
    settled_at, run_id, engine, engine_version, model, settings_hash, engine = 'simulated' AS simulated
FROM failed_requests
WHERE state <> 'resolved';
