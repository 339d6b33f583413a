//! From the document to a [`Config`]: one function per section, each default in one place.
//!
//! A setting that is missing takes its default; one that is wrong is noted and takes its default too, so that everything
//! after it is still checked. A [`Config`] made that way is never run: `parse` hands it out only if nothing was noted.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use tollgate_core::{secret::Secret, upstream::Handling};
use tracing_subscriber::EnvFilter;

use crate::{
    journal::{Fsync, MIN_CAP, OnFull},
    telemetry::LogFormat,
};

use super::{
    Config, FERNET_KEYS_VARIABLE, Log, Secrets, Store, StoreKind, Usage, audit,
    expand::Env,
    files, limits, pool,
    raw::{Findings, Reader},
    server,
    table::Table,
    units::{parse_duration, parse_duration_within, parse_size, show_size},
    upstreams,
};

pub(super) const HOUR: Duration = Duration::from_secs(3600);
pub(super) const MILLISECOND: Duration = Duration::from_millis(1);

/// Reads a whole document. The config is usable only if the findings hold no problem.
pub(super) fn read(file: Option<&Path>, text: &str, env: Env<'_>) -> (Config, Findings) {
    let name = file.map_or_else(|| "built-in defaults".to_owned(), |file| file.display().to_string());
    let reader = Reader::new(&name, text, env);
    let document = reader.parse();
    let config = sections(&reader, &mut reader.root(document.get_ref()), file);
    drop(document);
    (config, reader.finish())
}

fn sections(reader: &Reader<'_>, root: &mut Table<'_>, file: Option<&Path>) -> Config {
    let server = server::server(reader, &mut root.section("server"));
    let tls = server::tls(&mut root.section("tls"), !server.tls_listen.is_empty());
    let secrets = secrets(reader, &mut root.section("secrets"));
    let upstream_defaults = pool::handling(&mut root.section("upstream_defaults"), Handling::default());
    let upstreams = upstreams::upstreams(reader, root.repeated("upstream"), upstream_defaults, &secrets);
    let models = upstreams::models(reader, root.named("models"), &upstreams);
    Config {
        file: file.map(Path::to_path_buf),
        server,
        tls,
        store: store(&mut root.section("store")),
        limiter: limits::limiter(&mut root.section("limiter")),
        limits: limits::limits(&mut root.section("limits"), &models),
        usage: usage(&mut root.section("usage")),
        audit: audit::audit(&mut root.section("audit")),
        secrets,
        log: log(&mut root.section("log")),
        retry: pool::retry(&mut root.section("retry")),
        pool: pool::pool(&mut root.section("pool")),
        breaker: pool::breaker(&mut root.section("breaker")),
        upstream_defaults,
        upstreams,
        models,
        warnings: Vec::new(),
    }
}

fn store(table: &mut Table<'_>) -> Store {
    let parsed = table.text("url", parse_store_url);
    parsed
        .unwrap_or_else(|| Store { kind: StoreKind::Sqlite, url: Secret::new("sqlite://data/tollgate.db".to_owned()) })
}

/// Never quotes the URL: it may hold a password.
fn parse_store_url(text: &str) -> Result<Store, String> {
    let kind = match text.split_once(':') {
        Some(("sqlite", rest)) => {
            let file = rest.strip_prefix("//").unwrap_or(rest).split('?').next().unwrap_or_default();
            match file {
                "" => return Err("names no file: write \"sqlite://data/tollgate.db\"".to_owned()),
                ":memory:" => {}
                file => files::check_can_be_made(Path::new(file))?,
            }
            StoreKind::Sqlite
        }
        Some(("postgres" | "postgresql", rest)) if rest.len() > 2 && rest.starts_with("//") => StoreKind::Postgres,
        _ => {
            let forms = "\"sqlite://data/tollgate.db\" or \"postgres://user:password@host/database\"";
            return Err(format!("is not the URL of a database: write {forms}"));
        }
    };
    Ok(Store { kind, url: Secret::new(text.to_owned()) })
}

fn usage(table: &mut Table<'_>) -> Usage {
    let journal = table.text("journal", |text| {
        if text.is_empty() { Err("names no directory".to_owned()) } else { files::check_directory(Path::new(text)) }
    });
    let on_full = table.text("on_journal_full", |text| match text {
        "refuse" => Ok(OnFull::Refuse),
        "drop_oldest" => Ok(OnFull::DropOldest),
        _ => Err(format!("{text:?} is not a choice: use \"refuse\" or \"drop_oldest\"")),
    });
    Usage {
        journal: journal.unwrap_or_else(|| PathBuf::from("data/journal")),
        journal_max_bytes: size(table, "journal_max", 1 << 30, MIN_CAP..=1 << 40),
        on_journal_full: on_full.unwrap_or(OnFull::Refuse),
        fsync: table.text("fsync", parse_fsync).unwrap_or(Fsync::Every(Duration::from_secs(1))),
        flush_interval: duration(table, "flush_interval", Duration::from_secs(1), MILLISECOND..=HOUR),
        batch: table.whole("batch", 1..=10_000).unwrap_or(8000),
    }
}

fn parse_fsync(text: &str) -> Result<Fsync, String> {
    match text {
        "never" => Ok(Fsync::Never),
        "always" => Ok(Fsync::Always),
        _ if parse_duration(text).is_ok() => parse_duration_within(text, MILLISECOND..=HOUR).map(Fsync::Every),
        _ => Err(format!("{text:?} is not a choice: use \"never\", \"always\", or a duration such as \"1s\"")),
    }
}

fn secrets(reader: &Reader<'_>, table: &mut Table<'_>) -> Secrets {
    let file = table.text("fernet_keys_file", |text| {
        if text.is_empty() { Err("names no file".to_owned()) } else { Ok(PathBuf::from(text)) }
    });
    let fernet_keys_file = file.unwrap_or_else(|| PathBuf::from("data/fernet.key"));
    let fernet_keys = if let Some(keys) = (reader.env)(FERNET_KEYS_VARIABLE) {
        let keys = Secret::new(keys);
        let parsed = files::parse_fernet_keys(keys.expose());
        parsed.map_err(|message| reader.variable_problem(FERNET_KEYS_VARIABLE, message))
    } else if fernet_keys_file.exists() {
        let text = files::read_text(&fernet_keys_file).map(Secret::new);
        let parsed = text.and_then(|text| files::parse_fernet_keys(text.expose()));
        let named = |message| format!("{} {message}", fernet_keys_file.display());
        parsed.map_err(|message| table.problem("fernet_keys_file", named(message)))
    } else {
        let free = files::check_can_be_made(&fernet_keys_file);
        free.map(|()| Vec::new()).map_err(|message| table.problem("fernet_keys_file", message))
    };
    Secrets { fernet_keys: fernet_keys.unwrap_or_default(), fernet_keys_file }
}

fn log(table: &mut Table<'_>) -> Log {
    let format = table.text("format", |text| match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("{text:?} is not a format: use \"text\" or \"json\"")),
    });
    let level = table.text("level", |text| check_level(text).map(|()| text.to_owned()));
    Log { format: format.unwrap_or(LogFormat::Text), level: level.unwrap_or_else(|| "info".to_owned()) }
}

/// Stricter than `tracing`, which takes a misspelt level for the name of a module and then logs nothing.
fn check_level(text: &str) -> Result<(), String> {
    let is_level = |part: &str| !part.is_empty() && part.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    let bad = text.split(',').map(str::trim).find(|part| !part.contains(['=', '[']) && !is_level(part));
    match (bad, EnvFilter::try_new(text)) {
        (None, Ok(_)) => Ok(()),
        _ => Err(format!(
            "{text:?} is not a log filter: use error, warn, info, debug, trace or off, or \"info,tollgate::proxy=debug\""
        )),
    }
}

/// A duration within `range`.
pub(super) fn duration(
    table: &mut Table<'_>,
    name: &'static str,
    default: Duration,
    range: RangeInclusive<Duration>,
) -> Duration {
    table.text(name, |text| parse_duration_within(text, range)).unwrap_or(default)
}

/// A size within `range`, in bytes.
pub(super) fn size(table: &mut Table<'_>, name: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
    let within = |bytes: u64| {
        let (least, most) = (show_size(*range.start()), show_size(*range.end()));
        let message = || format!("{} is not between {least} and {most}", show_size(bytes));
        range.contains(&bytes).then_some(bytes).ok_or_else(message)
    };
    table.text(name, |text| parse_size(text).and_then(within)).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The annotated file with every `#setting` switched on; `# prose` stays.
    fn annotated_in_full() -> String {
        let file = include_str!("../../conf/tollgate.toml");
        let switch_on = |line: &str| match line.strip_prefix('#') {
            Some(setting) if setting.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => {
                setting.to_owned() + "\n"
            }
            _ => line.to_owned() + "\n",
        };
        file.lines().map(switch_on).collect()
    }

    /// Every table that `section` stands for: `upstream[]` and `models.*` are several.
    fn tables<'t>(root: &'t toml::Table, section: &str) -> Vec<&'t toml::Table> {
        let parts = section.split('.').filter(|part| !part.is_empty());
        parts.fold(vec![root], |tables, part| {
            let below = |table: &'t toml::Table| match part.strip_suffix("[]") {
                Some(name) => table[name].as_array().unwrap().iter().collect(),
                None if part == "*" => table.values().collect(),
                None => vec![&table[part]],
            };
            tables.into_iter().flat_map(below).filter_map(toml::Value::as_table).collect()
        })
    }

    #[test]
    fn the_annotated_file_names_every_setting_and_its_examples_are_valid() {
        let full = annotated_in_full();
        let (_, findings) = read(Some(Path::new("full")), &full, &|_| Some("A".repeat(43) + "="));
        let problems: Vec<String> = findings.problems.iter().map(|p| p.setting.clone()).collect();
        let not_there = ["upstream[2].credential_file", "upstream[2].ca_file"];
        assert_eq!(problems, not_there, "only the files that are not there: {:#?}", findings.problems);

        let written: toml::Table = full.parse().unwrap();
        let mut missing = Vec::new();
        for (section, names) in &findings.known {
            let tables = tables(&written, section);
            let is_missing = |name: &&String| !tables.iter().any(|table| table.contains_key(*name));
            missing.extend(names.iter().filter(is_missing).map(|name| format!("{section}.{name}")));
        }
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn log_levels_are_levels() {
        for good in ["info", "off", "WARN", "info,tollgate::proxy=debug", "tollgate[span]=trace"] {
            assert_eq!(check_level(good), Ok(()), "{good}");
        }
        for bad in ["", "warn, hyper=error", "inof", "verbose", "info,tollgate=loud", "info,,x=", "x=y=z"] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }
}
