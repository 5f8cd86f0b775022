-- How long the answers of a chunk took. Like its other figures they stay until its next commit, so that
-- their sums over all chunks never fall.
ALTER TABLE chunks ADD COLUMN latency_counts BIGINT[];  -- by the bounds of domain/store_figures, then all
ALTER TABLE chunks ADD COLUMN latency_micros BIGINT;    -- whole ones: their sum is the same in any order
