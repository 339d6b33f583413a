-- What is kept of the content of requests, where the privacy settings ask for it. What a user or a key says of it goes
-- before the configuration; NULL: nothing is said.
ALTER TABLE users ADD COLUMN audit_content TEXT CHECK (audit_content IN ('none', 'hash', 'redacted', 'full'));
ALTER TABLE api_keys ADD COLUMN audit_content TEXT CHECK (audit_content IN ('none', 'hash', 'redacted', 'full'));

-- Apart from request_log, which is kept for longer and read by more people. A request with the mode none has no row here.
CREATE TABLE request_content (
    request_id    TEXT    NOT NULL,
    started_at    TEXT    NOT NULL,
    mode          TEXT    NOT NULL CHECK (mode IN ('hash', 'redacted', 'full')),
    prompt_hash   BLOB    NOT NULL CHECK (length(prompt_hash) = 32),
    content       BLOB    CHECK (substr(content, 1, 1) = X'80'),  -- a Fernet token in bytes, never anything else
    request_bytes INTEGER NOT NULL,  -- as they were, however much of them is kept
    answer_bytes  INTEGER NOT NULL,
    truncated     BOOLEAN NOT NULL,
    PRIMARY KEY (started_at, request_id),
    CHECK ((content IS NULL) = (mode = 'hash'))
);
CREATE INDEX request_content_prompt ON request_content (prompt_hash, started_at);
