-- Reading the log fast, whatever is asked for and however much there is: see the same file in ../postgres.
DROP INDEX request_log_user;
DROP INDEX request_log_key;
DROP INDEX request_log_model;
ALTER TABLE request_log ADD COLUMN class TEXT GENERATED ALWAYS AS
    (model || char(31) || COALESCE(upstream, '') || char(31) || status || char(31) || COALESCE(code, '')) VIRTUAL;
CREATE INDEX request_log_user ON request_log (user_id, class, started_at);
CREATE INDEX request_log_key ON request_log (key_id, class, started_at);
CREATE INDEX request_log_class ON request_log (class, started_at);
