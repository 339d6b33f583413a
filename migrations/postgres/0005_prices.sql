-- What models cost, and since when. A gateway reads what has a higher changed_seq than it has seen.
CREATE TABLE prices (
    model          TEXT NOT NULL,
    effective_from TIMESTAMPTZ NOT NULL,
    price          TEXT NOT NULL,  -- JSON: rates in 10^-12 dollars per token, by tier
    imported_at    TIMESTAMPTZ NOT NULL,
    changed_seq    BIGINT NOT NULL,
    PRIMARY KEY (model, effective_from)
);
CREATE INDEX prices_changed_seq ON prices (changed_seq);

-- Who answered, how, and the kinds of tokens that have prices of their own.
ALTER TABLE request_log ADD COLUMN served_model TEXT;
ALTER TABLE request_log ADD COLUMN service_tier TEXT;
ALTER TABLE request_log ADD COLUMN cache_write_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE request_log ADD COLUMN output_audio_tokens BIGINT NOT NULL DEFAULT 0;  -- of audio_tokens
ALTER TABLE request_log ADD COLUMN image_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE request_log ADD COLUMN output_image_tokens BIGINT NOT NULL DEFAULT 0;  -- of image_tokens

-- The transaction that booked the row. Rows of transactions that are over, in the order of their numbers, are the order in
-- which the log grew, whoever wrote at the same time: what `tollgate audit --follow` goes by. Rows that are older than this
-- column have none. The index costs next to nothing, because rows lie on the disk in this order.
ALTER TABLE request_log ADD COLUMN booked_by BIGINT;
ALTER TABLE request_log ALTER COLUMN booked_by SET DEFAULT txid_current();
CREATE INDEX request_log_booked_by ON request_log USING brin (booked_by);
