//! The real program, run as people run it: in a directory of its own, with an environment of its own.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

use super::{
    fleet::wait_for_address,
    gateway::PATIENCE,
    process::{Process, log},
};

/// A directory with a configuration, `tollgate.toml`.
pub(crate) struct Program {
    directory: TempDir,
    environment: Vec<(&'static str, String)>,
}

/// What a run left behind.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Program {
    /// `DIR` in the configuration stands for the directory.
    pub(crate) fn new(config: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("tollgate-program-").tempdir().unwrap();
        let program = Self { directory, environment: Vec::new() };
        program.write("tollgate.toml", config);
        program
    }

    /// Sets a variable of its environment.
    pub(crate) fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.to_owned()));
        self
    }

    /// Its directory.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a file of its directory.
    pub(crate) fn write(&self, name: &str, content: &str) {
        let directory = self.directory().display().to_string();
        fs::write(self.directory().join(name), content.replace("DIR", &directory)).unwrap();
    }

    fn command(&self, config: &str, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.arg("--config").arg(self.directory().join(config)).args(line.split_whitespace());
        command.env_clear().envs(self.environment.iter().cloned()).current_dir(self.directory());
        command
    }

    /// Runs it to its end, with `input` on standard input. Panics if it does not come to one.
    pub(crate) fn run(&self, line: &str, input: &str) -> Run {
        self.run_with("tollgate.toml", line, input)
    }

    /// The same, with another configuration of its directory.
    pub(crate) fn run_with(&self, config: &str, line: &str, input: &str) -> Run {
        let mut command = self.command(config, line);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program is built with its tests");
        // One that ends without reading is fine.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let all = |from: &mut dyn Read| {
            let mut text = String::new();
            from.read_to_string(&mut text).unwrap();
            text
        };
        std::thread::scope(|scope| {
            let stderr = scope.spawn(move || all(&mut stderr));
            let stdout = scope.spawn(move || all(&mut stdout));
            let start = Instant::now();
            let status = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break Some(status),
                    None if start.elapsed() > PATIENCE => break None,
                    None => std::thread::sleep(std::time::Duration::from_millis(5)),
                }
            };
            let _ = child.kill();
            let _ = child.wait();
            let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
            let status = status.unwrap_or_else(|| panic!("{line} does not end:\n{stdout}\n{stderr}"));
            Run { code: status.code().unwrap_or(-1), stdout, stderr }
        })
    }

    /// Starts it with its output in a pipe, to be read line by line.
    pub(crate) fn start(&self, line: &str) -> Started {
        let mut command = self.command("tollgate.toml", line);
        let said = self.directory().join("stderr");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&said).unwrap());
        let mut child = command.spawn().expect("the program is built with its tests");
        let lines = BufReader::new(child.stdout.take().unwrap());
        Started { child, lines: Some(lines), said }
    }

    /// Starts `serve`.
    pub(crate) fn serve(&self) -> Serving {
        let directory = self.directory().to_owned();
        let mut process = Process::start(self.command("tollgate.toml", "serve"), &directory, "it is built");
        let http = wait_for_address(&mut process, &directory);
        Serving { directory, process, http }
    }

    /// Everything that the gateway said that was started last.
    pub(crate) fn log(&self) -> String {
        log(self.directory())
    }
}

/// A run whose output is read while it is written.
pub(crate) struct Started {
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
    said: PathBuf,
}

impl Started {
    /// The next line; `None`: it has closed its output.
    pub(crate) fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let lines = self.lines.as_mut()?;
        if lines.buffer().is_empty() {
            let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(lines.get_ref(), PollFlags::IN)], Some(&patience)).unwrap();
            assert!(ready > 0, "it writes nothing:\n{}", fs::read_to_string(&self.said).unwrap());
        }
        let read = lines.read_line(&mut line).unwrap();
        (read > 0).then_some(line)
    }

    /// Closes the pipe.
    pub(crate) fn stop_reading(&mut self) {
        self.lines = None;
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The most memory that it has taken, in KiB.
    pub(crate) fn most_memory_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Its exit code, if it has ended; the inner `None`: a signal ended it.
    pub(crate) fn try_end(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().unwrap().map(|status| status.code())
    }

    /// Waits for its end; gives its exit code.
    pub(crate) fn end(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            match self.try_end() {
                Some(code) => return code,
                None => {
                    assert!(
                        start.elapsed() < PATIENCE,
                        "it does not end:\n{}",
                        fs::read_to_string(&self.said).unwrap()
                    );
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// What it said on standard error, as soon as there is something or it has ended.
    pub(crate) fn complaint(&mut self) -> String {
        let start = Instant::now();
        loop {
            let said = fs::read_to_string(&self.said).unwrap();
            if !said.is_empty() || self.try_end().is_some() || start.elapsed() > PATIENCE {
                return said;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A gateway in a process of its own.
pub(crate) struct Serving {
    directory: PathBuf,
    process: Process,
    http: SocketAddr,
}

impl Serving {
    /// Everything it said so far.
    pub(crate) fn log(&self) -> String {
        log(&self.directory)
    }

    /// Its plain listener.
    pub(crate) fn http(&self) -> SocketAddr {
        self.http
    }

    /// The memory that it takes, in KiB.
    pub(crate) fn resident_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Its admin listener.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.address("admin=Some(")
    }

    fn address(&self, before: &str) -> SocketAddr {
        let log = self.log();
        let found = log.lines().find_map(|line| line.split_once(before)?.1.split([']', ')']).next());
        found.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no {before} in {log}"))
    }

    /// Asks it to end, waits until it has, and gives everything it said.
    pub(crate) fn stop(mut self) -> String {
        self.process.signal(Signal::TERM);
        let start = Instant::now();
        while !self.process.has_ended() {
            assert!(start.elapsed() < PATIENCE * 2, "it does not end:\n{}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        self.log()
    }
}
