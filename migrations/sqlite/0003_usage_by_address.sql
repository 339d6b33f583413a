-- Sums by address, only kept while [limits.ip] has a monthly quota: addresses are personal data.
CREATE TABLE usage_monthly_ip (
    month         TEXT    NOT NULL,  -- the first day: YYYY-MM-01, UTC
    network       TEXT    NOT NULL,  -- the address; of IPv6 the first one of its network of 64 bits
    requests      INTEGER NOT NULL,
    total_tokens  INTEGER NOT NULL,
    cost_nano_usd INTEGER NOT NULL,
    PRIMARY KEY (month, network)
) WITHOUT ROWID;
