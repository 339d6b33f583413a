//! The systems that are compared: how each is configured and started, in front of the same upstream.

use crate::binaries::Binaries;
use crate::options::{IDLE, Optional, Options};
use crate::process::{CORE_OF_LOAD, CORE_UNDER_TEST, Process, free_address, pinned};
use anyhow::{Context, ensure};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::thread;

/// One system, running.
pub(crate) struct System {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) process: Process,
    /// What its callers present.
    pub(crate) key: String,
    /// Resident memory of the fresh process, in MiB.
    pub(crate) idle_mib: f64,
}

pub(crate) const DIRECT: &str = "direct";
pub(crate) const BARE: &str = "bare Pingora";
pub(crate) const GATEWAY: &str = "tollgate";
pub(crate) const WITH_REDIS: &str = "tollgate+Redis";
pub(crate) const NGINX: &str = "nginx";

/// What all requests carry where no gateway made a key.
const NO_KEY: &str = "tg-none";

/// The running systems, the mock upstream first.
pub(crate) struct Systems {
    pub(crate) all: Vec<System>,
    /// The Redis server, on the core of the load, if it takes part.
    pub(crate) redis: Option<Process>,
}

/// Starts the mock upstream and what the options and the machine allow. Every file goes into `directory`.
pub(crate) fn start(options: &Options, binaries: &Binaries, directory: &Path) -> anyhow::Result<Systems> {
    let mock = free_address()?;
    let mut command = pinned(CORE_OF_LOAD, &std::env::current_exe()?);
    command.args(["--bench", "--mock", &mock.to_string()]);
    let mut all = vec![launch(DIRECT, mock, command, NO_KEY, directory)?];

    let bare = free_address()?;
    let mut command = pinned(CORE_UNDER_TEST, &binaries.bare_pingora);
    command.args([bare.to_string(), mock.to_string()]);
    all.push(launch(BARE, bare, command, NO_KEY, directory)?);

    let mut redis = None;
    if let Some(gateway) = &binaries.gateway {
        all.push(start_gateway(GATEWAY, gateway, mock, "", directory)?);
        if !options.without.contains(&Optional::Redis)
            && let Some((server, address)) = start_redis(directory)?
        {
            let limiter = format!("[limiter]\nredis = \"redis://{address}\"");
            all.push(start_gateway(WITH_REDIS, gateway, mock, &limiter, directory)?);
            redis = Some(server);
        }
    }
    if !options.without.contains(&Optional::Nginx) {
        all.extend(start_nginx(mock, directory)?);
    }
    Ok(Systems { all, redis })
}

/// A Redis server without persistence, on the core of the load, as if it were another machine; nothing if there is none.
fn start_redis(directory: &Path) -> anyhow::Result<Option<(Process, SocketAddr)>> {
    let binary = Path::new("/usr/bin/redis-server");
    if !binary.exists() {
        println!("no {}: going on without Redis (apt-get install redis-server adds it)", binary.display());
        return Ok(None);
    }
    let address = free_address()?;
    let mut command = pinned(CORE_OF_LOAD, binary);
    command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", "", "--appendonly", "no"]);
    let log = directory.join("redis.log");
    let mut server = Process::start(command, &log)?;
    server.wait_ready(address, &log).context("Redis did not start")?;
    Ok(Some((server, address)))
}

fn launch(
    name: &'static str,
    address: SocketAddr,
    command: Command,
    key: &str,
    directory: &Path,
) -> anyhow::Result<System> {
    let log = directory.join(format!("{}.log", name.replace(' ', "_")));
    let mut process = Process::start(command, &log)?;
    process.wait_ready(address, &log).with_context(|| format!("{name} did not start"))?;
    thread::sleep(IDLE);
    let idle_mib = process.resident_mib()?;
    Ok(System { name, address, process, key: key.to_owned(), idle_mib })
}

/// How many upstreams the gateway chooses from; all of them are the mock.
const UPSTREAMS: u32 = 10;

fn upstream(weight: u32, mock: SocketAddr) -> String {
    format!(
        r#"[[upstream]]
name = "mock-{weight}"
base_url = "http://{mock}/v1"
credential = "${{SIDE_BY_SIDE_CREDENTIAL}}"
models = ["gpt-4o"]
weight = {weight}

"#
    )
}

/// The gateway with everything on: a pool of [`UPSTREAMS`], keys, prices, limits and quotas of four subjects, accounting in SQLite, an access log
/// line per request. `more` are further lines of its configuration.
fn start_gateway(
    name: &'static str,
    binary: &Path,
    mock: SocketAddr,
    more: &str,
    directory: &Path,
) -> anyhow::Result<System> {
    let directory = &directory.join(name);
    fs::create_dir(directory)?;
    let (address, admin) = (free_address()?, free_address()?);
    let config = directory.join("tollgate.toml");
    let pool: String = (1..=UPSTREAMS).map(|weight| upstream(weight, mock)).collect();
    fs::write(
        &config,
        format!(
            r#"[server]
listen = ["{address}"]
admin_listen = "{admin}"
threads = 1

{pool}
[models."gpt-4o"]
input_usd_per_mtok = 2.5
cached_input_usd_per_mtok = 1.25
output_usd_per_mtok = 10.0

[limits.default_key]
rpm = 1_000_000_000
tpm = 1_000_000_000_000
concurrency = 1_000_000
monthly_tokens = 1_000_000_000_000
monthly_usd = 1_000_000

[limits.default_user]
rpm = 1_000_000_000
tpm = 1_000_000_000_000

[limits.ip]
rpm = 1_000_000_000

[limits.models."gpt-4o"]
rpm = 1_000_000_000
tpm = 1_000_000_000_000

{more}
"#
        ),
    )?;
    let run = |arguments: &[&str]| {
        let mut command = pinned(CORE_UNDER_TEST, binary);
        command.arg("--config").arg(&config).args(arguments).current_dir(directory);
        command.env("SIDE_BY_SIDE_CREDENTIAL", "sk-side-by-side");
        command
    };
    json_of(run(&["init", "--json"]))?;
    json_of(run(&["user", "create", "--name", "bench", "--json"]))?;
    let made = json_of(run(&["key", "create", "--user", "bench", "--json"]))?;
    let key = made["key"].as_str().context("`key create --json` printed no `key`")?;
    launch(name, address, run(&["serve"]), key, directory)
}

/// Runs a verb of the gateway and reads the one JSON object that it prints.
fn json_of(mut command: Command) -> anyhow::Result<serde_json::Value> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}:\n{complaint}", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("{command:?} did not print JSON:\n{complaint}"))
}

/// nginx as a pass-through with keep-alive to the upstream; nothing if the machine has none.
fn start_nginx(mock: SocketAddr, directory: &Path) -> anyhow::Result<Option<System>> {
    let binary = Path::new("/usr/sbin/nginx");
    if !binary.exists() {
        println!("no {}: going on without nginx (apt-get install nginx-light adds it)", binary.display());
        return Ok(None);
    }
    let address = free_address()?;
    let config = directory.join("nginx.conf");
    // One process, no master: its id is then the one to measure. `keepalive_requests` would end connections at 1,000.
    fs::write(
        &config,
        format!(
            "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr warn;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n  access_log off;\n  tcp_nodelay on;\n  keepalive_requests 1000000000;\n\
             \x20 client_body_temp_path body;\n  proxy_temp_path proxy;\n  fastcgi_temp_path fastcgi;\n\
             \x20 uwsgi_temp_path uwsgi;\n  scgi_temp_path scgi;\n\
             \x20 upstream mock {{ server {mock}; keepalive 128; keepalive_requests 1000000000; }}\n\
             \x20 server {{\n    listen {address};\n    location / {{\n      proxy_pass http://mock;\n\
             \x20     proxy_http_version 1.1;\n      proxy_set_header Connection \"\";\n      proxy_buffering off;\n    }}\n  }}\n}}\n"
        ),
    )?;
    let mut command = pinned(CORE_UNDER_TEST, binary);
    command.arg("-p").arg(directory).arg("-c").arg(&config);
    launch(NGINX, address, command, NO_KEY, directory).map(Some)
}
