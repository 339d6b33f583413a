//! Child processes under measurement: pinned to a core, read through `/proc`, gone when the comparison is gone.
//!
//! A child is started through `setpriv --pdeathsig` and `taskset` (util-linux, part of every Debian). Both `exec`, so
//! the child's id is the system's own, and the kernel ends it even if the comparison itself is killed.
//!
//! CPU time is user + system of `/proc/PID/stat`. It counts threads that have ended, which the finer per-thread
//! counters forget, and it ticks in hundredths of a second: below 1 % of a window of two CPU seconds.

use anyhow::{Context, bail};
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The core of the processes under test.
pub(crate) const CORE_UNDER_TEST: u32 = 1;
/// The core of the load generator and of the mock upstream.
pub(crate) const CORE_OF_LOAD: u32 = 0;

const TICKS_PER_SECOND: f64 = 100.0; // `USER_HZ`, the same on every Linux that Debian ships

/// A running child; dropping it ends it.
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts `command` (made by [`pinned`]) with its output in `log`.
    pub(crate) fn start(mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let log_file = File::create(log).with_context(|| format!("{}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            .spawn()
            .context("setpriv and taskset (package util-linux) are needed to pin processes to cores")?;
        Ok(Self { child })
    }

    /// Waits until the child accepts connections on `address`; `log` tells why it did not.
    pub(crate) fn wait_ready(&mut self, address: SocketAddr, log: &Path) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            if TcpStream::connect(address).is_ok() {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(log).unwrap_or_default();
                bail!("nothing listens on {address}; exit: {ended:?}; it said:\n{said}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// User and system time so far, of all threads, ended ones too.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu_of(&self.child.id().to_string())
    }

    /// Resident memory now (`VmRSS`) in MiB.
    pub(crate) fn resident_mib(&self) -> anyhow::Result<f64> {
        self.status_mib("VmRSS:")
    }

    /// The most that was ever resident (`VmHWM`) in MiB.
    pub(crate) fn peak_resident_mib(&self) -> anyhow::Result<f64> {
        self.status_mib("VmHWM:")
    }

    fn status_mib(&self, field: &str) -> anyhow::Result<f64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("{path}: the process has ended"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field in status")?;
        let kib: f64 = value.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already, and at this point there is nobody left to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time so far of this process.
pub(crate) fn own_cpu() -> anyhow::Result<Duration> {
    cpu_of("self")
}

/// For how long a core has been busy, or was taken away by a hypervisor. Soft interrupts count: they carry the loopback
/// traffic, and the kernel puts them on the account of the process that they interrupt.
pub(crate) fn core_busy(core: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let label = format!("cpu{core} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&label)).context("no such core in /proc/stat")?;
    let fields = line.split_whitespace().map(str::parse::<f64>).collect::<Result<Vec<_>, _>>()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields[..] else {
        bail!("/proc/stat is shorter than expected: {line}");
    };
    Ok(Duration::from_secs_f64((user + nice + system + irq + softirq + steal) / TICKS_PER_SECOND))
}

fn cpu_of(process: &str) -> anyhow::Result<Duration> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("{path}: the process has ended"))?;
    // The name, in parentheses, may itself hold blanks; utime and stime are the 12th and 13th fields after it.
    let (_, fields) = stat.rsplit_once(')').context("no process name in stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u32>).sum::<Result<u32, _>>()?;
    Ok(Duration::from_secs_f64(f64::from(ticks) / TICKS_PER_SECOND))
}

/// A command that will run `program` on `core` alone, and not outlive this process. Arguments may be added.
pub(crate) fn pinned(core: u32, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "taskset", "--cpu-list", &core.to_string()]).arg(program);
    command
}

/// Moves this process to the load's core. Threads that it starts later go there too.
pub(crate) fn pin_self() -> anyhow::Result<()> {
    let status = Command::new("taskset")
        .args(["--cpu-list", "--pid", &CORE_OF_LOAD.to_string(), &std::process::id().to_string()])
        .stdout(Stdio::null())
        .status()
        .context("taskset (package util-linux) is needed to pin processes to cores")?;
    anyhow::ensure!(status.success(), "this process could not be moved to core {CORE_OF_LOAD}");
    Ok(())
}

/// An address on loopback whose port was free a moment ago.
pub(crate) fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?)
}
