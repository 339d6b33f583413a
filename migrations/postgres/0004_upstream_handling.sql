-- How an upstream is handled where not as the defaults say: a JSON object of timeouts, known limits and the probe interval.
ALTER TABLE upstreams ADD COLUMN handling TEXT NOT NULL DEFAULT '{}';
