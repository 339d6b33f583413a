-- What models cost, and since when. A gateway reads what has a higher changed_seq than it has seen.
CREATE TABLE prices (
    model          TEXT    NOT NULL,
    effective_from TEXT    NOT NULL,
    price          TEXT    NOT NULL,  -- JSON: rates in 10^-12 dollars per token, by tier
    imported_at    TEXT    NOT NULL,
    changed_seq    INTEGER NOT NULL,
    PRIMARY KEY (model, effective_from)
);
CREATE INDEX prices_changed_seq ON prices (changed_seq);

-- Who answered, how, and the kinds of tokens that have prices of their own.
ALTER TABLE request_log ADD COLUMN served_model TEXT;
ALTER TABLE request_log ADD COLUMN service_tier TEXT;
ALTER TABLE request_log ADD COLUMN cache_write_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE request_log ADD COLUMN output_audio_tokens INTEGER NOT NULL DEFAULT 0;  -- of audio_tokens
ALTER TABLE request_log ADD COLUMN image_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE request_log ADD COLUMN output_image_tokens INTEGER NOT NULL DEFAULT 0;  -- of image_tokens
