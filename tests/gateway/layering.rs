//! Dependencies point one way. The compiler keeps I/O out of the core by its dependencies; what it cannot see inside one
//! package is checked here, by reading the sources: who may name the database, Redis, the environment, and whom.
//!
//! Paths are compared, imports with their groups taken apart and paths inside of code alike; comments and unit tests do
//! not count.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::{collections::BTreeSet, fs, path::Path};

/// Files under `src/proxy/` that all the others there may use.
const SHARED_BY_HOOKS: [&str; 8] = ["attempt", "body", "ctx", "downstream", "judge", "pick", "reply", "route"];
/// What would make the core impure.
const IMPURE: [&str; 13] = [
    "tokio",
    "sqlx",
    "redis",
    "rand",
    "getrandom",
    "std::env",
    "std::fs",
    "std::process",
    "SystemTime::now",
    "Instant::now",
    "Utc::now",
    "Local::now",
    "Uuid::now_v7",
];

/// The rules that `file` breaks with its `text`; `hooks` are the files under `src/proxy/`.
fn broken(file: &str, text: &str, hooks: &[String]) -> Vec<String> {
    let within = |places: &[&str]| places.iter().any(|place| file.starts_with(place));
    let in_proxy = within(&["src/proxy.rs", "src/proxy/"]);
    let mut forbidden: Vec<String> = Vec::new();
    let mut forbid = |names: &[&str]| forbidden.extend(names.iter().map(ToString::to_string));
    if within(&["crates/core/"]) {
        forbid(&IMPURE);
        forbid(&["pingora", "pingora_core", "pingora_limits", "pingora_proxy", "pingora_http"]);
    } else {
        (!within(&["src/store.rs", "src/store/"])).then(|| forbid(&["sqlx"]));
        (!within(&["src/limiter/redis"])).then(|| forbid(&["redis"]));
        (!within(&["src/limiter/gate.rs"])).then(|| forbid(&["pingora_limits"]));
        (!within(&["src/config.rs", "src/config/", "src/args.rs", "src/main.rs"])).then(|| forbid(&["std::env"]));
    }
    if in_proxy {
        forbid(&["crate::store", "crate::config", "super::super::store", "super::super::config"]);
    }
    if within(&["src/proxy/"]) {
        let others = hooks.iter().filter(|hook| !SHARED_BY_HOOKS.contains(&hook.as_str()));
        forbidden.extend(others.flat_map(|hook| [format!("super::{hook}"), format!("crate::proxy::{hook}")]));
    } else if in_proxy {
        forbid(&["super::store", "super::config"]);
    }
    let names = |path: &str, name: &str| {
        let tail = name.contains("::") && path.ends_with(&format!("::{name}"));
        path == name || path.starts_with(&format!("{name}::")) || tail
    };
    let breaks = |path: &String| forbidden.iter().any(|name| names(path, name));
    paths(text).into_iter().filter(breaks).map(|path| format!("{file} must not use {path}")).collect()
}

/// Every path in `text`, with `use a::{b, c::d}` as `a::b` and `a::c::d`.
fn paths(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let (mut imports, mut others, mut is_import) = (String::new(), String::new(), false);
    for line in code.lines().map(str::trim).filter(|line| !line.starts_with("//")) {
        let begins = ["use ", "pub use ", "pub(crate) use ", "pub(super) use "];
        is_import |= begins.iter().any(|begin| line.starts_with(begin));
        let of = if is_import { &mut imports } else { &mut others };
        *of += &format!("{line}\n");
        is_import &= !line.ends_with(';');
    }
    let trees = imports.split("use ").skip(1).filter_map(|rest| rest.split_once(';'));
    let imports = trees.flat_map(|(tree, _)| expand(tree));
    let inline = others
        .split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')
        .filter(|word| word.contains("::") && !word.ends_with("::"));
    imports.chain(inline.map(str::to_owned)).collect()
}

fn expand(tree: &str) -> Vec<String> {
    let Some((head, group)) = tree.split_once('{') else {
        return tree.split_whitespace().next().map(str::to_owned).into_iter().collect();
    };
    let (group, mut depth) = (group.rsplit_once('}').map_or(group, |(group, _)| group), 0);
    let parts = group.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    parts.flat_map(expand).map(|part| format!("{}{part}", head.trim())).collect()
}

/// Every Rust file under `dir` of the repository, by its path, with its text.
fn sources(dir: &str) -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)) else { return Vec::new() };
    let names = entries.map(|entry| format!("{dir}/{}", entry.unwrap().file_name().to_string_lossy()));
    let read = |name: String| match name.ends_with(".rs") {
        true => vec![(name.clone(), fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&name)).unwrap())],
        false => sources(&name),
    };
    names.flat_map(read).collect()
}

#[test]
fn dependencies_point_one_way() {
    let (ours, core) = (sources("src"), sources("crates/core/src"));
    assert!(ours.iter().any(|(file, _)| file == "src/lib.rs") && core.len() > 5, "the sources were not found");
    let stem = |(file, _): &(String, String)| file.strip_prefix("src/proxy/")?.strip_suffix(".rs").map(str::to_owned);
    let hooks: Vec<String> = ours.iter().filter_map(stem).collect();
    let all: Vec<String> = ours.iter().chain(&core).flat_map(|(file, text)| broken(file, text, &hooks)).collect();
    assert_eq!(all, Vec::<String>::new());
}

#[test]
fn a_broken_rule_is_seen() {
    let hooks = ["ctx", "meter", "finish", "downstream", "failure"].map(str::to_owned);
    let seen = |file: &str, text: &str| !broken(file, text, &hooks).is_empty();
    for (file, text) in [
        ("src/server.rs", "use sqlx::PgPool;"),
        ("src/server.rs", "fn f() { sqlx::query(\"\"); }"),
        ("src/limiter.rs", "use redis::Client;"),
        ("src/limiter/memory.rs", "use redis as r;"),
        ("src/limiter/redis.rs", "use pingora_limits::rate::Rate;"),
        ("src/proxy/route.rs", "fn f() { pingora_limits::rate::Rate::new(SECOND); }"),
        ("src/jobs/probe.rs", "use std::{\n    collections::HashMap,\n    env::{self, var},\n};"),
        ("src/proxy.rs", "use crate::{\n    shared::Shared,\n    config::Config,\n};"),
        ("src/proxy/peer.rs", "fn f(s: &crate::store::Store) {}"),
        ("src/proxy/peer.rs", "use super::{ctx::RequestCtx, meter};"),
        ("src/proxy/peer.rs", "use crate::proxy::{ctx::{A, B}, finish::f};"),
        ("src/proxy/peer.rs", "use super::failure::answer;"),
        ("crates/core/src/pool.rs", "use std::time::{Duration, Instant};\nfn f() { Instant::now(); }"),
        ("crates/core/src/pool.rs", "fn f() { std::time::SystemTime::now(); }"),
        ("crates/core/src/pool.rs", "use pingora_core::Error;"),
    ] {
        assert!(seen(file, text), "{file}: {text}");
    }
    for (file, text) in [
        ("src/store/user.rs", "use sqlx::PgPool;"),
        ("src/limiter/redis.rs", "use redis::Client;"),
        ("src/limiter/gate.rs", "use pingora_limits::rate::Rate;"),
        ("src/limiter.rs", "use crate::limiter::redis::RedisLimiter;"),
        ("src/args.rs", "use std::env;"),
        ("src/proxy.rs", "use crate::proxy::meter::Meter;"),
        ("src/proxy/peer.rs", "use super::{Gateway, ctx::RequestCtx};\n// unlike super::meter::Meter"),
        ("src/proxy/peer.rs", "use super::ctx;\n#[cfg(test)]\nmod tests { use super::super::meter; }"),
        ("src/proxy/body.rs", "use super::downstream::Handle;"),
        ("src/telemetry.rs", "const QUIET: &str = \"sqlx=warn\";"),
    ] {
        assert!(!seen(file, text), "{file}: {text}");
    }
}
