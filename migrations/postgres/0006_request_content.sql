-- What is kept of the content of requests, where the privacy settings ask for it. What a user or a key says of it goes
-- before the configuration; NULL: nothing is said.
ALTER TABLE users ADD COLUMN audit_content TEXT CHECK (audit_content IN ('none', 'hash', 'redacted', 'full'));
ALTER TABLE api_keys ADD COLUMN audit_content TEXT CHECK (audit_content IN ('none', 'hash', 'redacted', 'full'));

-- Apart from request_log, which is kept for longer and read by more people. Partitioned by time, as that is. A request with the
-- mode none has no row here.
CREATE TABLE request_content (
    request_id    UUID NOT NULL,
    started_at    TIMESTAMPTZ NOT NULL,
    mode          TEXT NOT NULL CHECK (mode IN ('hash', 'redacted', 'full')),
    prompt_hash   BYTEA NOT NULL CHECK (octet_length(prompt_hash) = 32),
    content       BYTEA CHECK (get_byte(content, 0) = 128),  -- a Fernet token in bytes (80 hex first), never anything else
    request_bytes BIGINT NOT NULL,  -- as they were, however much of them is kept
    answer_bytes  BIGINT NOT NULL,
    truncated     BOOLEAN NOT NULL,
    PRIMARY KEY (started_at, request_id),
    CHECK ((content IS NULL) = (mode = 'hash'))
) PARTITION BY RANGE (started_at);
-- Takes every row for which there is no partition of its own.
CREATE TABLE request_content_default PARTITION OF request_content DEFAULT;
CREATE INDEX request_content_prompt ON request_content (prompt_hash, started_at);
