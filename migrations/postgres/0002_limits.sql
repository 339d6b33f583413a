-- Keys get a quota of money, as users have one, and limits of single models.
ALTER TABLE api_keys ADD COLUMN monthly_nano_usd BIGINT CHECK (monthly_nano_usd >= 0);
-- JSON array of {"model", "limits"}; a model is a name or a pattern, what limits leave out has its default.
ALTER TABLE api_keys ADD COLUMN model_limits TEXT NOT NULL DEFAULT '[]';
