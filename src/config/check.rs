//! `tollgate check`: every problem of a configuration at once, or a summary of what it says.

use std::{fmt::Write as _, path::Path};

use serde::Serialize;

use super::{Config, Env, Problem, StoreKind, load};

#[derive(Serialize)]
struct Report<'p> {
    ok: bool,
    errors: &'p [Problem],
    warnings: &'p [Problem],
}

/// Loads the configuration like `serve` does and reports on it: the text to print, and the exit code (0, or 2 if anything
/// must be mended). With `json` the text is one object, `{"ok", "errors", "warnings"}`.
#[must_use]
pub fn check(path: Option<&Path>, env: Env<'_>, json: bool) -> (String, u8) {
    let loaded = load(path, env);
    let (errors, warnings) = match &loaded {
        Ok(config) => (&[][..], &config.warnings[..]),
        Err(errors) => (&errors.problems[..], &errors.warnings[..]),
    };
    let code = if errors.is_empty() { 0 } else { 2 };
    if json {
        let report = Report { ok: errors.is_empty(), errors, warnings };
        return (serde_json::json!(report).to_string() + "\n", code);
    }
    let mut text = String::new();
    let lines = errors.iter().map(|p| ("error", p)).chain(warnings.iter().map(|p| ("warning", p)));
    for (severity, problem) in lines {
        text += &format!("{severity}: {problem}\n");
    }
    match &loaded {
        Ok(config) => text += &summary(config),
        Err(errors) => text += &counted(errors.problems.len()),
    }
    (text, code)
}

fn counted(problems: usize) -> String {
    format!("{problems} {} to mend\n", if problems == 1 { "problem" } else { "problems" })
}

fn summary(config: &Config) -> String {
    let file = config.file.as_ref().map_or_else(|| "built-in defaults".to_owned(), |file| file.display().to_string());
    let mut text = format!("{file}: ok\n");
    let mut line = |label: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {label:<10} {value}");
    };
    let server = &config.server;
    for address in &server.listen {
        line("listen", &format!("http://{address}"));
    }
    for address in &server.tls_listen {
        line("listen", &format!("https://{address}"));
    }
    line("admin", &server.admin_listen.map_or_else(|| "off".to_owned(), |address| format!("http://{address}")));
    line("store", if config.store.kind == StoreKind::Sqlite { "SQLite" } else { "PostgreSQL" });
    line("limiter", if config.limiter.redis.is_some() { "Redis" } else { "memory of this process" });
    for upstream in &config.upstreams {
        let models: Vec<String> = upstream.models.iter().map(ToString::to_string).collect();
        let models = if models.is_empty() { "*".to_owned() } else { models.join(", ") };
        let off = if upstream.disabled { ", disabled" } else { "" };
        let (name, kind, url) = (&upstream.name, upstream.kind.as_str(), &upstream.base_url);
        line("upstream", &format!("{name}: {kind} at {url}, weight {}{off}; {models}", upstream.weight));
    }
    if config.upstreams.is_empty() {
        line("upstream", "none in the file");
    }
    let mut models: Vec<&str> = config.models.keys().map(String::as_str).collect();
    models.sort_unstable();
    line("models", &if models.is_empty() { "none described".to_owned() } else { models.join(", ") });
    text
}
