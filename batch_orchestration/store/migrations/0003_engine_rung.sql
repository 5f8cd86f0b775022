-- The rung of the engine's memory ladder on which the chunk was completed, for people; NULL if that
-- is not known.
ALTER TABLE chunks ADD COLUMN memory_level VARCHAR;
