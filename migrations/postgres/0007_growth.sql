-- Reading the log fast, whatever is asked for and however much there is.
--
-- Rows that are alike in model, upstream, status and code are a class; there are few of them. An index that has the class
-- before the time finds the newest rows of each class at once, and its classes by going from one to the next, so a filter
-- costs a look per class and not a look per row (src/store/listing.rs). The unit separator cannot be part of a name. "C":
-- compared byte by byte, so that the classes of a model stand together.
--
-- NULLS LAST, because the primary key is not ordered so: nothing else than these indexes can give the order that a listing
-- asks for, and no estimate tempts the planner to go through the whole log in order of time.
DROP INDEX request_log_user;
DROP INDEX request_log_key;
DROP INDEX request_log_model;
ALTER TABLE request_log ADD COLUMN class TEXT COLLATE "C" NOT NULL GENERATED ALWAYS AS
    (model || chr(31) || COALESCE(upstream, '') || chr(31) || status::text || chr(31) || COALESCE(code, '')) STORED;
CREATE INDEX request_log_user ON request_log (user_id, class, started_at DESC NULLS LAST);
CREATE INDEX request_log_key ON request_log (key_id, class, started_at DESC NULLS LAST);
CREATE INDEX request_log_class ON request_log (class, started_at DESC NULLS LAST);
