//! `[limiter]` and `[limits]`: where the limits are counted, and which ones hold where nothing else is said.
//!
//! 0 stands for "none" everywhere, so what is written as 0 and what is left out are the same.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use tollgate_core::{
    limit::{Limits, MAX_LIMIT, ModelLimits, policy::Policy, written},
    snapshot::ModelInfo,
};

use super::{
    GateConfig, LimiterConfig, LimitsConfig, OnRedisDown, redis_url,
    table::Table,
    validate::{MILLISECOND, duration},
};

/// No address sends more than this in earnest.
const MOST_OF_AN_ADDRESS: u32 = 1_000_000;

/// Reads `[limiter]`.
pub(super) fn limiter(table: &mut Table<'_>) -> LimiterConfig {
    let redis = table.text("redis", redis_url::parse);
    let on_redis_down = table.text("on_redis_down", |text| match text {
        "local" => Ok(OnRedisDown::Local),
        "deny" => Ok(OnRedisDown::Deny),
        _ => Err(format!("{text:?} is not a choice: use \"local\" or \"deny\"")),
    });
    let on_redis_down = on_redis_down.unwrap_or(OnRedisDown::Local);
    // Not if an address is there that could not be read: that is noted already.
    let names_none = redis == Some(None) || !table.has("redis");
    if names_none && on_redis_down == OnRedisDown::Deny {
        table.warning("on_redis_down", "is not used: redis names no server");
    }
    let (most, default) = (Duration::from_secs(5), Duration::from_millis(45));
    let redis_timeout = duration(table, "redis_timeout", default, MILLISECOND..=most);
    LimiterConfig { redis: redis.flatten(), on_redis_down, redis_timeout }
}

/// Reads `[limits]` and checks that its models are ones that a request can come to.
pub(super) fn limits(table: &mut Table<'_>, models: &HashMap<String, ModelInfo>) -> LimitsConfig {
    let policy = Policy {
        key: all_limits(&mut table.section("default_key")),
        user: all_limits(&mut table.section("default_user")),
        ip: all_limits(&mut table.section("ip")),
        models: limits_of_models(table.named("models"), models),
    };
    let assumed_output_tokens = table.whole("assumed_output_tokens", 1..=1_000_000).unwrap_or(512);
    LimitsConfig { policy, assumed_output_tokens, gate: gate(&mut table.section("gate")) }
}

fn gate(table: &mut Table<'_>) -> GateConfig {
    GateConfig {
        requests_per_second: table.whole("requests_per_second", 0..=MOST_OF_AN_ADDRESS).unwrap_or(0),
        failed_keys_per_minute: table.whole("failed_keys_per_minute", 0..=MOST_OF_AN_ADDRESS).unwrap_or(300),
    }
}

fn all_limits(table: &mut Table<'_>) -> Limits {
    Limits {
        rpm: table.whole("rpm", 0..=u32::MAX).filter(|n| *n > 0),
        tpm: table.whole("tpm", 0..=MAX_LIMIT).filter(|n| *n > 0),
        concurrency: table.whole("concurrency", 0..=u32::MAX).filter(|n| *n > 0),
        monthly_tokens: table.whole("monthly_tokens", 0..=MAX_LIMIT).filter(|n| *n > 0),
        monthly_nano_usd: table.decimal("monthly_usd", written::parse_usd).filter(|n| *n > 0),
    }
}

fn limits_of_models(tables: Vec<(&str, Table<'_>)>, models: &HashMap<String, ModelInfo>) -> Vec<ModelLimits> {
    let aliases: BTreeMap<&str, &str> = models
        .iter()
        .flat_map(|(name, info)| info.aliases.iter().map(move |alias| (alias.as_str(), name.as_str())))
        .collect();
    let entry = |(name, mut table): (&str, Table<'_>)| {
        if let Err(message) = written::check_model(name) {
            table.problem_at(table.place(), format!("{name:?} {message}"));
        } else if let Some(proper) = aliases.get(name) {
            let message = format!("{name:?} is an alias: limit the model by its proper name, {proper:?}");
            table.problem_at(table.place(), message);
        }
        ModelLimits { model: name.to_owned(), limits: all_limits(&mut table) }
    };
    tables.into_iter().map(entry).collect()
}
