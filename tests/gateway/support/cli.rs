//! The command line, in this process: a database, its keys, and what is typed and printed.

use std::{collections::HashMap, io::Write, net::SocketAddr, path::Path, sync::Arc};

use clap::Parser;
use serde_json::Value;
use tempfile::TempDir;
use tollgate::{
    args::{Args, Command},
    cli::{self, CliContext, SecretSource},
    secrets::{FernetKeys, generate_key},
    store::Store,
};
use tollgate_core::{
    secret::Secret,
    snapshot::ModelInfo,
    upstream::{Handling, Upstream},
};

use super::gateway::Gateway;

/// Runs verbs.
pub(crate) struct Cli {
    pub(crate) store: Store,
    pub(crate) fernet: FernetKeys,
    pub(crate) file_upstreams: Vec<Arc<Upstream>>,
    pub(crate) encrypted_in_file: Vec<(&'static str, String)>,
    pub(crate) models: HashMap<String, ModelInfo>,
    pub(crate) environment: Option<Secret>,
    pub(crate) admin: Option<SocketAddr>,
    pub(crate) _directory: TempDir,
}

impl Cli {
    /// Before `tollgate init`.
    pub(crate) async fn empty() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/db", directory.path().display());
        Self::on(&url, FernetKeys::try_new([&generate_key()]).unwrap(), directory).await
    }

    /// On a database of its own.
    pub(crate) async fn new() -> Self {
        let cli = Self::empty().await;
        cli.run("init", "").await.unwrap();
        cli
    }

    /// On the database of a running gateway, beside it.
    pub(crate) async fn beside(gateway: &Gateway) -> Self {
        let keys = FernetKeys::from_file(&gateway.dir().join("fernet.key")).unwrap();
        let cli = Self::on(&gateway.store_url, keys, tempfile::tempdir().unwrap()).await;
        Self { admin: gateway.addresses.admin, ..cli }
    }

    async fn on(url: &str, fernet: FernetKeys, directory: TempDir) -> Self {
        Self {
            store: Store::open(url).await.unwrap(),
            fernet,
            file_upstreams: Vec::new(),
            encrypted_in_file: Vec::new(),
            models: HashMap::new(),
            environment: None,
            admin: None,
            _directory: directory,
        }
    }

    /// Uses the keys of a file as it is now.
    pub(crate) fn with_keys_of(self, file: &Path) -> Self {
        Self { fernet: FernetKeys::from_file(file).unwrap(), ..self }
    }

    /// Runs a command line, with `input` on standard input; gives what it printed.
    pub(crate) async fn run(&self, line: &str, input: &str) -> anyhow::Result<String> {
        let mut out = Vec::new();
        self.run_into(line, input, &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// Runs a command line that prints into `out`.
    pub(crate) async fn run_into(&self, line: &str, input: &str, out: &mut dyn Write) -> anyhow::Result<()> {
        let words = std::iter::once("tollgate").chain(line.split_whitespace());
        let args = Args::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        let Command::Verb(verb) = args.command else { panic!("{line} is no verb") };
        let encrypted: Vec<(&str, &str)> =
            self.encrypted_in_file.iter().map(|(name, token)| (*name, token.as_str())).collect();
        let mut input = input.as_bytes();
        let ctx = CliContext {
            store: self.store.clone(),
            fernet: self.fernet.clone(),
            file_upstreams: &self.file_upstreams,
            encrypted_in_file: &encrypted,
            handling: Handling::default(),
            models: &self.models,
            admin: self.admin,
            actor: "cli:test".to_owned(),
            secret: SecretSource { environment: self.environment.clone(), input: &mut input, is_terminal: false },
            json: args.json,
            out,
            reader_is_gone: &|| false,
        };
        cli::run(verb, ctx).await
    }

    /// What a command line prints that must succeed.
    pub(crate) async fn text(&self, line: &str) -> String {
        self.run(line, "").await.unwrap_or_else(|error| panic!("{line}: {error:#}"))
    }

    /// The same with `--json`, parsed.
    pub(crate) async fn json(&self, line: &str) -> Value {
        let text = self.text(&format!("{line} --json")).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
    }

    /// What a command line that must fail says, and its exit code.
    pub(crate) async fn fails(&self, line: &str, input: &str) -> (String, u8) {
        let (_, error, code) = self.fails_with(line, input).await;
        (error, code)
    }

    /// What a command line that must fail prints all the same, what it says, and its exit code.
    pub(crate) async fn fails_with(&self, line: &str, input: &str) -> (String, String, u8) {
        let mut out = Vec::new();
        let error = self.run_into(line, input, &mut out).await.expect_err(line);
        (String::from_utf8(out).unwrap(), format!("{error:#}"), cli::exit_code(&error))
    }
}
