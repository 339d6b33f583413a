-- A batch is written by statements of many rows. SQLite keeps a journal of a statement that may fail half-way: a copy of each
-- page that it changes, in a temporary file, which was most of what a batch cost. Any call of a function counts as such, so the
-- class of a row is computed without. Its values are the same.
DROP INDEX request_log_user;
DROP INDEX request_log_key;
DROP INDEX request_log_class;
ALTER TABLE request_log DROP COLUMN class;
ALTER TABLE request_log ADD COLUMN class TEXT GENERATED ALWAYS AS
    (model || CAST(x'1f' AS TEXT) || COALESCE(upstream, '') || CAST(x'1f' AS TEXT) || status || CAST(x'1f' AS TEXT)
        || COALESCE(code, '')) VIRTUAL;
CREATE INDEX request_log_user ON request_log (user_id, class, started_at);
CREATE INDEX request_log_key ON request_log (key_id, class, started_at);
CREATE INDEX request_log_class ON request_log (class, started_at);
