//! Processes that tests start: servers of others, and gateways of our own.
//!
//! A process ends when it is dropped. Should the test process be killed, which drops nothing, a shell that waits for the
//! end of a pipe ends it and removes its files.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

/// Where a process says what it has to say, in its directory.
const LOG: &str = "log";

/// What the process of this directory said.
pub(crate) fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join(LOG)).unwrap_or_default()
}

/// A process that ends when it is dropped, or when we end without a chance to drop it.
pub(crate) struct Process {
    server: Child,
    /// Its standard input is the pipe.
    watchdog: Child,
}

/// Waits for the end of its standard input, then kills the process and removes the directory it was told.
const WATCHDOG: &str = r#"read -r _; kill -KILL "$1"; rm -rf "$2""#;

impl Process {
    /// Starts it; its files are in `directory`. `missing` says what to do if there is no such program.
    pub(crate) fn start(mut command: Command, directory: &Path, missing: &str) -> Self {
        fs::create_dir_all(directory).unwrap();
        let log = File::create(directory.join(LOG)).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let server = command.spawn().expect(missing);
        let mut watchdog = Command::new("sh");
        watchdog
            .arg("-c")
            .arg(WATCHDOG)
            .arg("watchdog")
            .arg(server.id().to_string())
            .arg(directory)
            .stdin(Stdio::piped());
        Self { server, watchdog: watchdog.spawn().expect("sh starts") }
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.server.id()
    }

    /// Has it ended by itself?
    pub(crate) fn has_ended(&mut self) -> bool {
        self.server.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The watchdog first: once the server is gone, its id may be another's.
        for child in [&mut self.watchdog, &mut self.server] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
