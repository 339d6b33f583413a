//! Builds what is to be measured, in the profile in which it is shipped.
//!
//! `cargo bench` compiles its own targets with unwinding panics whatever the profile says, so the binaries that it
//! would hand us are not the released ones. They are built here by a cargo of their own, which finds the build lock
//! free: cargo lets go of it before it runs a bench.

use anyhow::{Context, bail, ensure};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The released executables.
pub(crate) struct Binaries {
    pub(crate) bare_pingora: PathBuf,
    pub(crate) gateway: Option<PathBuf>,
}

/// Builds the yardstick and, if it takes part, the gateway.
pub(crate) fn build(with_gateway: bool) -> anyhow::Result<Binaries> {
    let mut wanted = vec!["--example", "bare_pingora"];
    if with_gateway {
        wanted.extend(["--bin", "tollgate"]);
    }
    println!("building (release): {}", wanted.join(" "));
    let mut cargo = Command::new(env!("CARGO"));
    // What the outer cargo tells a bench about its package would look to build scripts like a changed environment, and
    // have half of the dependencies built anew.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    let output = cargo
        .args(["build", "--release", "--message-format=json-render-diagnostics"])
        .args(&wanted)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo could not be started")?;
    ensure!(output.status.success(), "the release build failed ({})", output.status);
    let artifacts = String::from_utf8(output.stdout).context("cargo's messages are not UTF-8")?;
    let gateway = if with_gateway { Some(executable(&artifacts, "tollgate")?) } else { None };
    Ok(Binaries { bare_pingora: executable(&artifacts, "bare_pingora")?, gateway })
}

/// Finds the path of `name` in cargo's JSON messages, so that no target directory has to be guessed.
fn executable(messages: &str, name: &str) -> anyhow::Result<PathBuf> {
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo's message is not JSON")?;
        if message["target"]["name"] == name
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo built no executable named {name}")
}
