//! `[[upstream]]` and `[models.*]`: what is served, by whom, and what it costs.
//!
//! Besides each entry, their agreement is checked: names that are taken twice, aliases that hide a model, pools in which
//! nobody would get work.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use tollgate_core::{
    glob,
    id::check_name,
    secret::{Secret, Unsendable, check_sendable},
    snapshot::ModelInfo,
    upstream::{BaseUrl, Handling, ModelEntry, UpstreamKind},
};
use zeroize::Zeroizing;

use crate::credential;

use super::{
    CredentialSource, Secrets, UpstreamSpec, files,
    pool::{handling, strategy},
    prices,
    raw::{Place, Reader},
    table::Table,
};

/// What a credential in Fernet's ciphertext begins with.
const FERNET_MARK: &str = "fernet:";

/// Reads every `[[upstream]]`. One that lacks what it cannot do without is noted and left out.
pub(super) fn upstreams(
    reader: &Reader<'_>,
    tables: Vec<Table<'_>>,
    defaults: Handling,
    secrets: &Secrets,
) -> Vec<UpstreamSpec> {
    let mut names: HashMap<String, Place> = HashMap::new();
    let mut specs = Vec::new();
    for mut table in tables {
        let spec = upstream(&mut table, defaults, secrets);
        let Some(name) = spec.as_ref().map(|spec| spec.name.clone()) else { continue };
        match names.get(&name) {
            Some(first) => table.problem("name", format!("{name:?} is taken by {}: names are unique", shown(first))),
            None => drop(names.insert(name, table.place_of("name"))),
        }
        specs.extend(spec);
    }
    warn_of_idle_pools(reader, &specs);
    specs
}

fn upstream(table: &mut Table<'_>, defaults: Handling, secrets: &Secrets) -> Option<UpstreamSpec> {
    let name = required(table, "name", "name = \"openai-1\"", |text| check_name(text).map(|()| text.to_owned()));
    let kind = table.text("kind", str::parse::<UpstreamKind>).unwrap_or(UpstreamKind::OpenAi);
    let base_url = required(table, "base_url", "base_url = \"https://api.openai.com/v1\"", parse_base_url);
    let credential = credential(table, secrets);
    let models = table.list("models", ModelEntry::parse).unwrap_or_default();
    let weight = table.whole("weight", 0..=1000).unwrap_or(1);
    let priority = table.whole("priority", 0..=1000).unwrap_or(0);
    let api_version = table.text("api_version", parse_api_version);
    let enabled = table.boolean("enabled").unwrap_or(true);
    let ca_pem = table.text("ca_file", |path| files::read_authorities(Path::new(path)));
    let handling = handling(table, defaults);
    check_models(table, &models);
    if api_version.is_some() && kind != UpstreamKind::Azure {
        table.problem("api_version", "is for kind = \"azure\" only: remove it, or set the kind");
    }
    if weight == 0 && enabled {
        table.warning("weight", "is 0: this upstream gets no work; write enabled = false to switch it off");
    }
    let (name, base_url, credential) = (name?, base_url?, credential?);
    warn_of_exposed_secret(table, &base_url, &credential);
    let models = models.into_iter().map(|(entry, _)| entry).collect();
    let disabled = !enabled;
    Some(UpstreamSpec {
        name,
        kind,
        base_url,
        credential,
        models,
        weight,
        priority,
        api_version,
        disabled,
        ca_pem,
        handling,
    })
}

/// The credential, or the file that holds it: one of both.
fn credential(table: &mut Table<'_>, secrets: &Secrets) -> Option<CredentialSource> {
    let is_in_file = table.has("credential_file");
    if is_in_file && table.has("credential") {
        table.problem("credential_file", "stands beside credential: every [[upstream]] has one of both");
    }
    let file = table.text("credential_file", parse_credential_file);
    let parse = |text: &str| parse_credential(text, secrets);
    if is_in_file {
        // What is wrong with the other one is told as well.
        drop(table.text("credential", parse));
        return file;
    }
    required(table, "credential", "credential = \"${OPENAI_API_KEY}\" (or credential_file)", parse)
}

fn parse_credential_file(text: &str) -> Result<CredentialSource, String> {
    if text.is_empty() {
        return Err("names no file".to_owned());
    }
    let path = PathBuf::from(text);
    let secret = credential::read(&path)?;
    Ok(CredentialSource::File { path, secret })
}

fn required<T>(
    table: &mut Table<'_>,
    name: &'static str,
    example: &str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Option<T> {
    if !table.has(name) {
        table.problem(name, format!("is missing: every [[upstream]] needs one, such as {example}"));
    }
    table.text(name, parse)
}

fn parse_base_url(text: &str) -> Result<BaseUrl, String> {
    if text.contains('@') {
        // Not quoted: what stands before the @ may be a password.
        return Err("must not contain a user or password: use the credential setting".to_owned());
    }
    BaseUrl::parse(text)
}

fn parse_api_version(text: &str) -> Result<String, String> {
    let clean = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    clean.then(|| text.to_owned()).ok_or_else(|| format!("{text:?} is not an api-version, such as \"2024-10-21\""))
}

/// Never quotes the credential.
fn parse_credential(text: &str, secrets: &Secrets) -> Result<CredentialSource, String> {
    if let Some(token) = text.strip_prefix(FERNET_MARK) {
        check_credential(&decrypt(token, secrets)?)?;
        return Ok(CredentialSource::Fernet(token.to_owned()));
    }
    check_credential(text.as_bytes())?;
    Ok(CredentialSource::Plain(Secret::new(text.to_owned())))
}

fn decrypt(token: &str, secrets: &Secrets) -> Result<Zeroizing<Vec<u8>>, String> {
    if secrets.fernet_keys.is_empty() {
        let file = secrets.fernet_keys_file.display();
        return Err(format!(
            "is encrypted, but there is no Fernet key: {file} does not exist and TOLLGATE_FERNET_KEYS is not set"
        ));
    }
    let keys = secrets.fernet_keys.iter().filter_map(|key| fernet::Fernet::new(key.expose()));
    fernet::MultiFernet::new(keys.collect()).decrypt(token).map(Zeroizing::new).map_err(|_| {
        "cannot be decrypted with any of the Fernet keys: encrypt it again with `tollgate secret encrypt`".to_owned()
    })
}

fn check_credential(credential: &[u8]) -> Result<(), String> {
    check_sendable(credential).map_err(|unsendable| match unsendable {
        Unsendable::Empty => format!("{unsendable}: write the provider's secret, as ${{VARIABLE}} or fernet:..."),
        Unsendable::NotPrintable => format!("{unsendable}: is a line break at its end?"),
    })
}

fn check_models(table: &Table<'_>, models: &[(ModelEntry, Place)]) {
    let mut names = BTreeSet::new();
    for (entry, place) in models {
        if !names.insert(&entry.name) {
            table.problem_at(place, format!("{:?} is listed twice", entry.name));
        }
    }
}

fn warn_of_exposed_secret(table: &Table<'_>, base_url: &BaseUrl, credential: &CredentialSource) {
    let loopback =
        base_url.host == "localhost" || base_url.host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    if loopback {
        return;
    }
    if !base_url.tls {
        table.warning("base_url", format!("sends the credential to {} in clear text: use https://", base_url.host));
    }
    if matches!(credential, CredentialSource::Plain(_)) && table.is_literal("credential") {
        table.warning("credential", "stands in the file in clear text: use ${VARIABLE} or fernet:...");
    }
}

/// A model that only upstreams of weight 0 serve is served by nobody.
fn warn_of_idle_pools(reader: &Reader<'_>, upstreams: &[UpstreamSpec]) {
    let enabled = || upstreams.iter().filter(|upstream| !upstream.disabled);
    let names: BTreeSet<&str> = enabled().flat_map(served).collect();
    for name in names {
        let mut pool =
            enabled().filter(|upstream| served(upstream).any(|pattern| glob::matches(pattern, name))).peekable();
        if pool.peek().is_some() && pool.all(|upstream| upstream.weight == 0) {
            let place = Place { line: None, setting: "upstream".to_owned() };
            reader.warning(&place, format!("every upstream for the model {name:?} has the weight 0: nobody serves it"));
        }
    }
}

fn served(upstream: &UpstreamSpec) -> impl Iterator<Item = &str> {
    let everything = upstream.models.is_empty().then_some("*");
    upstream.models.iter().map(|entry| entry.name.as_str()).chain(everything)
}

/// Reads every `[models.*]` and checks that each name, alias or not, means one model.
pub(super) fn models(
    reader: &Reader<'_>,
    tables: Vec<(&str, Table<'_>)>,
    upstreams: &[UpstreamSpec],
) -> HashMap<String, ModelInfo> {
    let served: BTreeSet<&str> = upstreams.iter().flat_map(served).collect();
    let described: BTreeSet<&str> = tables.iter().map(|(name, _)| *name).collect();
    let mut taken: HashMap<String, String> = HashMap::new();
    let mut models = HashMap::new();
    for (name, mut table) in tables {
        if let Err(message) = check_model_name(name) {
            reader.problem(table.place(), message);
        }
        let price = prices::price(&mut table).map(Arc::new);
        let aliases =
            table.list("aliases", |text| check_model_name(text).map(|()| text.to_owned())).unwrap_or_default();
        for (alias, place) in &aliases {
            if described.contains(alias.as_str()) || served.contains(alias.as_str()) {
                reader.problem(place, format!("{alias:?} is a model of its own, which this alias would hide"));
            } else if let Some(other) = taken.insert(alias.clone(), name.to_owned()) {
                reader.problem(place, format!("{alias:?} is already an alias of {other:?}"));
            }
        }
        let aliases = aliases.into_iter().map(|(alias, _)| alias).collect();
        let strategy = strategy(&mut table);
        models.insert(name.to_owned(), ModelInfo { price, aliases, strategy });
    }
    models
}

pub(super) fn check_model_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['*', '=']) || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(format!("{name:?} is not the name of one model: no *, no =, no white space"));
    }
    Ok(())
}

fn shown(place: &Place) -> String {
    place.line.map_or_else(|| place.setting.clone(), |line| format!("{} in line {line}", place.setting))
}
