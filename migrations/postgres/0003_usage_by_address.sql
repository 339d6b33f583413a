-- Sums by address, only kept while [limits.ip] has a monthly quota: addresses are personal data.
CREATE TABLE usage_monthly_ip (
    month         DATE NOT NULL,  -- the first day, UTC
    network       TEXT NOT NULL,  -- the address; of IPv6 the first one of its network of 64 bits
    requests      BIGINT NOT NULL,
    total_tokens  BIGINT NOT NULL,
    cost_nano_usd BIGINT NOT NULL,
    PRIMARY KEY (month, network)
);
