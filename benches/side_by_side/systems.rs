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
    /// Resident memory of the fresh process, in MiB.
    pub(crate) idle_mib: f64,
}

pub(crate) const DIRECT: &str = "direct";
pub(crate) const BARE: &str = "bare Pingora";
pub(crate) const GATEWAY: &str = "tollgate";
pub(crate) const NGINX: &str = "nginx";

/// What all requests carry where no gateway made a key.
const NO_KEY: &str = "tg-none";

/// The running systems, the mock upstream first, and the key that the gateway accepts.
pub(crate) struct Systems {
    pub(crate) all: Vec<System>,
    pub(crate) key: String,
}

/// Starts the mock upstream and what the options and the machine allow. Every file goes into `directory`.
pub(crate) fn start(options: &Options, binaries: &Binaries, directory: &Path) -> anyhow::Result<Systems> {
    let mock = free_address()?;
    let mut command = pinned(CORE_OF_LOAD, &std::env::current_exe()?);
    command.args(["--bench", "--mock", &mock.to_string()]);
    let mut all = vec![launch(DIRECT, mock, command, directory)?];

    let bare = free_address()?;
    let mut command = pinned(CORE_UNDER_TEST, &binaries.bare_pingora);
    command.args([bare.to_string(), mock.to_string()]);
    all.push(launch(BARE, bare, command, directory)?);

    let mut key = NO_KEY.to_owned();
    if let Some(gateway) = &binaries.gateway {
        let (system, made_key) = start_gateway(gateway, mock, directory)?;
        all.push(system);
        key = made_key;
    }
    if !options.without.contains(&Optional::Nginx) {
        all.extend(start_nginx(mock, directory)?);
    }
    Ok(Systems { all, key })
}

fn launch(name: &'static str, address: SocketAddr, command: Command, directory: &Path) -> anyhow::Result<System> {
    let log = directory.join(format!("{}.log", name.replace(' ', "_")));
    let mut process = Process::start(command, &log)?;
    process.wait_ready(address, &log).with_context(|| format!("{name} did not start"))?;
    thread::sleep(IDLE);
    let idle_mib = process.resident_mib()?;
    Ok(System { name, address, process, idle_mib })
}

/// The gateway with everything on: keys, prices, accounting in SQLite, an access log line per request.
fn start_gateway(binary: &Path, mock: SocketAddr, directory: &Path) -> anyhow::Result<(System, String)> {
    let (address, admin) = (free_address()?, free_address()?);
    let config = directory.join("tollgate.toml");
    fs::write(
        &config,
        format!(
            r#"[server]
listen = ["{address}"]
admin_listen = "{admin}"
threads = 1

[[upstream]]
name = "mock"
kind = "openai"
base_url = "http://{mock}/v1"
credential = "${{SIDE_BY_SIDE_CREDENTIAL}}"
models = ["gpt-4o"]

[models."gpt-4o"]
input_usd_per_mtok = 2.5
cached_input_usd_per_mtok = 1.25
output_usd_per_mtok = 10.0
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
    let key = made["key"].as_str().context("`key create --json` printed no `key`")?.to_owned();
    Ok((launch(GATEWAY, address, run(&["serve"]), directory)?, key))
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
    launch(NGINX, address, command, directory).map(Some)
}
