-- The first tables. The same tables, in the words of PostgreSQL, are in ../postgres.
-- Times are RFC 3339 text in UTC, as the gateway writes them: they sort as text. All numbers fit a signed 64-bit integer.

-- Facts about the database itself, such as the value that tells whether a Fernet key fits it.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- One row, counted up inside every transaction that changes users, api_keys or upstreams. A running gateway reads
-- what has a higher changed_seq than it has seen. Updating one row makes writers wait for each other, so numbers
-- become visible in order.
CREATE TABLE change_seq (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    value INTEGER NOT NULL
);
INSERT INTO change_seq (id, value) VALUES (1, 0);

-- Users are never deleted, only disabled: the books name them.
CREATE TABLE users (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    name             TEXT    NOT NULL,
    rpm              INTEGER CHECK (rpm >= 0),
    tpm              INTEGER CHECK (tpm >= 0),
    concurrency      INTEGER CHECK (concurrency >= 0),
    monthly_tokens   INTEGER CHECK (monthly_tokens >= 0),
    monthly_nano_usd INTEGER CHECK (monthly_nano_usd >= 0),
    created_at       TEXT    NOT NULL,
    disabled_at      TEXT,
    changed_seq      INTEGER NOT NULL
);
CREATE UNIQUE INDEX users_name ON users (name);
CREATE INDEX users_changed_seq ON users (changed_seq);

-- Keys are never deleted, only revoked. A revoked key gives its name free.
CREATE TABLE api_keys (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id        INTEGER NOT NULL REFERENCES users (id),
    name           TEXT    NOT NULL,
    key_hash       BLOB    NOT NULL CHECK (length(key_hash) = 32),
    prefix         TEXT    NOT NULL,
    models         TEXT    NOT NULL,  -- JSON array of patterns; empty: every model
    allow_ip       TEXT    NOT NULL,  -- JSON array of networks; empty: any address
    rpm            INTEGER CHECK (rpm >= 0),
    tpm            INTEGER CHECK (tpm >= 0),
    concurrency    INTEGER CHECK (concurrency >= 0),
    monthly_tokens INTEGER CHECK (monthly_tokens >= 0),
    created_at     TEXT    NOT NULL,
    expires_at     TEXT,
    revoked_at     TEXT,
    changed_seq    INTEGER NOT NULL
);
CREATE UNIQUE INDEX api_keys_key_hash ON api_keys (key_hash);
CREATE UNIQUE INDEX api_keys_name ON api_keys (user_id, name) WHERE revoked_at IS NULL;
CREATE INDEX api_keys_changed_seq ON api_keys (changed_seq);

-- A removed upstream stays as a row without its credential, so that running gateways learn of the removal.
CREATE TABLE upstreams (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    name        TEXT    NOT NULL,
    kind        TEXT    NOT NULL CHECK (kind IN ('openai', 'azure')),
    base_url    TEXT    NOT NULL,
    credential  TEXT    CHECK (credential LIKE 'gAAAA%'),  -- Fernet ciphertext, never anything else
    models      TEXT    NOT NULL,  -- JSON array of name, name=upstream-name or pattern; empty: every model
    weight      INTEGER NOT NULL CHECK (weight >= 0),
    priority    INTEGER NOT NULL CHECK (priority >= 0),
    api_version TEXT,
    created_at  TEXT    NOT NULL,
    disabled_at TEXT,
    removed_at  TEXT,
    changed_seq INTEGER NOT NULL,
    CHECK ((credential IS NULL) = (removed_at IS NOT NULL))
);
CREATE UNIQUE INDEX upstreams_name ON upstreams (name) WHERE removed_at IS NULL;
CREATE INDEX upstreams_changed_seq ON upstreams (changed_seq);

-- One row per request: the audit log and the usage record. It references nothing, so that no state of the other
-- tables can keep a request off the books.
CREATE TABLE request_log (
    request_id          TEXT    NOT NULL,
    started_at          TEXT    NOT NULL,
    user_id             INTEGER NOT NULL,
    key_id              INTEGER NOT NULL,
    ip                  TEXT,
    route               TEXT    NOT NULL,
    model               TEXT    NOT NULL,
    upstream_model      TEXT,
    upstream            TEXT,
    attempts            TEXT    NOT NULL,  -- JSON array
    status              INTEGER NOT NULL,
    stream              BOOLEAN NOT NULL,
    code                TEXT,
    prompt_tokens       INTEGER NOT NULL,
    completion_tokens   INTEGER NOT NULL,
    cached_tokens       INTEGER NOT NULL,
    reasoning_tokens    INTEGER NOT NULL,
    audio_tokens        INTEGER NOT NULL,
    estimated           BOOLEAN NOT NULL,
    interrupted         BOOLEAN NOT NULL,
    cost_nano_usd       INTEGER NOT NULL,
    ttft_ms             INTEGER,
    duration_ms         INTEGER NOT NULL,
    overhead_us         INTEGER NOT NULL,
    finish_reason       TEXT,
    user_agent          TEXT,
    client_request_id   TEXT,
    provider_request_id TEXT,
    PRIMARY KEY (started_at, request_id)
);
CREATE INDEX request_log_user ON request_log (user_id, started_at);
CREATE INDEX request_log_key ON request_log (key_id, started_at);
CREATE INDEX request_log_model ON request_log (model, started_at);

-- Sums, kept in step with request_log in the transaction that adds to it. model and upstream are '' where a request
-- came to none.
CREATE TABLE usage_daily (
    day               TEXT    NOT NULL,  -- YYYY-MM-DD, UTC
    user_id           INTEGER NOT NULL,
    key_id            INTEGER NOT NULL,
    model             TEXT    NOT NULL,
    upstream          TEXT    NOT NULL,
    requests          INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    cached_tokens     INTEGER NOT NULL,
    cost_nano_usd     INTEGER NOT NULL,
    PRIMARY KEY (day, user_id, key_id, model, upstream)
) WITHOUT ROWID;

CREATE TABLE usage_monthly (
    month             TEXT    NOT NULL,  -- the first day: YYYY-MM-01, UTC
    user_id           INTEGER NOT NULL,
    key_id            INTEGER NOT NULL,
    model             TEXT    NOT NULL,
    upstream          TEXT    NOT NULL,
    requests          INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    cached_tokens     INTEGER NOT NULL,
    cost_nano_usd     INTEGER NOT NULL,
    PRIMARY KEY (month, user_id, key_id, model, upstream)
) WITHOUT ROWID;

-- Tokens for the admin listener: hashes only, like api_keys.
CREATE TABLE admin_tokens (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT    NOT NULL,
    token_hash BLOB    NOT NULL CHECK (length(token_hash) = 32),
    created_at TEXT    NOT NULL,
    revoked_at TEXT
);
CREATE UNIQUE INDEX admin_tokens_token_hash ON admin_tokens (token_hash);

-- Who changed what.
CREATE TABLE admin_log (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    at         TEXT    NOT NULL,
    actor      TEXT    NOT NULL,
    action     TEXT    NOT NULL,  -- such as user.create
    subject_id INTEGER,
    detail     TEXT    NOT NULL   -- JSON: the row as it is after the change, without secrets
);
