//! From the command line to the verb: configuration first, then what was asked for.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong use or wrong configuration.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tollgate_core::secret::Secret;

use crate::{
    args::{Args, CREDENTIAL_VARIABLE, Command, SecretVerb, Verb},
    cli::{self, CliContext, SecretSource},
    config::{self, Config, CredentialSource, Env, UpstreamSpec},
    drain::Signals,
    mock, secrets,
    server::{Assembly, file_upstreams},
    store::Store,
    telemetry,
};

/// Exit code for a wrong configuration.
const WRONG_CONFIG: u8 = 2;

/// Does what `args` say.
#[must_use]
pub fn run(args: Args, env: Env<'_>) -> ExitCode {
    let path = args.config.as_deref();
    match args.command {
        Command::Check => check(path, env, args.json),
        Command::Mock(args) => done(on_runtime(mock::run(args))),
        Command::Serve => with_config(path, env, serve),
        // Works before there is a configuration, which may be waiting for this very key.
        Command::Verb(Verb::Secret(SecretVerb::Generate)) => done(cli::generate_secret(args.json, &mut io::stdout())),
        Command::Verb(verb) => with_config(path, env, |config| on_runtime(work(verb, &config, env, args.json))),
    }
}

fn check(path: Option<&Path>, env: Env<'_>, json: bool) -> ExitCode {
    let (text, code) = config::check(path, env, json);
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Ok(()) => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

fn with_config(path: Option<&Path>, env: Env<'_>, verb: impl FnOnce(Config) -> anyhow::Result<()>) -> ExitCode {
    match config::load(path, env) {
        Ok(config) => done(verb(config)),
        Err(errors) => {
            complain(&errors.to_string());
            ExitCode::from(WRONG_CONFIG)
        }
    }
}

fn serve(config: Config) -> anyhow::Result<()> {
    let _log = telemetry::start(config.log.format, &config.log.level)?;
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    Assembly::build(config)?.run(Box::new(Signals))
}

async fn work(verb: Verb, config: &Config, env: Env<'_>, json: bool) -> anyhow::Result<()> {
    let store = Store::open(config.store.url.expose()).await?;
    store.migrate().await?;
    let fernet = secrets::keys_for(&config.secrets.fernet_keys, &config.secrets.fernet_keys_file, &store).await?;
    let file_upstreams = file_upstreams(&config.upstreams, &fernet)?;
    let encrypted_in_file: Vec<_> = config.upstreams.iter().filter_map(encrypted).collect();
    let input = io::stdin();
    let context = CliContext {
        store: store.clone(),
        fernet,
        file_upstreams: &file_upstreams,
        encrypted_in_file: &encrypted_in_file,
        handling: config.upstream_defaults,
        models: &config.models,
        admin: config.server.admin_listen.filter(|address| address.port() != 0),
        actor: format!("cli:{}", env("USER").filter(|user| !user.is_empty()).unwrap_or_else(|| "unknown".to_owned())),
        secret: SecretSource {
            environment: env(CREDENTIAL_VARIABLE).map(Secret::new),
            is_terminal: input.is_terminal(),
            input: &mut input.lock(),
        },
        json,
        out: &mut io::stdout(),
        reader_is_gone: &reader_is_gone,
    };
    let done = cli::run(verb, context).await;
    store.close().await;
    done
}

/// A pipe tells when its other end was closed, though nothing be written.
fn reader_is_gone() -> bool {
    let stdout = io::stdout();
    let mut watched = [PollFd::new(&stdout, PollFlags::empty())];
    let told = poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    told.is_ok() && watched[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL)
}

fn encrypted(upstream: &UpstreamSpec) -> Option<(&str, &str)> {
    match &upstream.credential {
        CredentialSource::Fernet(token) => Some((&upstream.name, token)),
        _ => None,
    }
}

fn on_runtime(future: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}

fn done(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::from(cli::exit_code(&error))
        }
    }
}

fn complain(message: &str) {
    // There is nowhere left to tell that standard error is closed.
    drop(writeln!(io::stderr(), "tollgate: {message}"));
}
