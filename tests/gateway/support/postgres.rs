//! A real PostgreSQL for tests: one server per test process, a fresh database per test. Tests that kill or freeze it have one
//! of their own ([`Own`]).
//!
//! The server lives below a shell that holds the other end of a pipe to the test process. When the process ends, in
//! whatever way, the pipe closes and the shell stops its server and removes the files: statics are never dropped, and a
//! killed process drops nothing.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::process::{Process, log};

const MISSING: &str = "these tests need PostgreSQL: `apt-get install postgresql` (or put initdb and postgres in PATH)";

struct Server {
    bin: PathBuf,
    directory: PathBuf,
    /// Its standard input is the pipe.
    _watchdog: Child,
}

/// The URL of a new, empty database. Starts the server when it is the first.
pub(crate) fn database() -> String {
    let (directory, name) = new_database();
    format!("postgres://postgres@localhost/{name}?host={}", directory.display())
}

/// The directory of the socket, and the name of a new, empty database.
pub(crate) fn new_database() -> (&'static Path, String) {
    static SERVER: OnceLock<Server> = OnceLock::new();
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let server = SERVER.get_or_init(Server::start);
    let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let created = tool(&server.bin, &server.directory, "createdb").arg(&name).output().expect("createdb starts");
    succeeded("createdb", &created);
    (&server.directory, name)
}

/// A server that a test may kill, freeze and start again.
pub(crate) struct Own {
    bin: PathBuf,
    directory: PathBuf,
    become_user: Vec<String>,
    process: Option<Process>,
}

impl Own {
    /// Starts one.
    pub(crate) fn start() -> Self {
        let (bin, directory, become_user) = init();
        let mut own = Self { bin, directory, become_user, process: None };
        own.restart();
        own
    }

    /// The URL of its database.
    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@localhost/postgres?host={}", self.directory.display())
    }

    /// Starts it again, after it was killed.
    pub(crate) fn restart(&mut self) {
        let mut command = become_user(&self.become_user);
        server(&mut command, &self.bin, &self.directory);
        self.process = Some(Process::start(command, &self.directory.join("log.d"), MISSING));
        wait_until_ready(&self.bin, &self.directory);
    }

    /// Kills it, with all that it is doing.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.process = None;
        // A server does not start where the processes of another are still at work.
        let start = Instant::now();
        while !self.workers().is_empty() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Freezes it: it is there, and answers nothing.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        for pid in self.workers() {
            // One that has just ended needs none.
            let _ = kill_process(pid, signal);
        }
    }

    /// Every process of it: they all work in its data directory.
    fn workers(&self) -> Vec<Pid> {
        let data = self.directory.join("data");
        let all = fs::read_dir("/proc").expect("/proc is there").filter_map(Result::ok);
        let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
        let is_ours = |pid: &i32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
        all.filter_map(number).filter(is_ours).filter_map(Pid::from_raw).collect()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Server {
    fn start() -> Self {
        let (bin, directory, user) = init();
        let mut watchdog = Command::new("sh");
        watchdog.arg("-c").arg(WATCHDOG).arg("watchdog").arg(&directory);
        watchdog.arg(if user.is_empty() { "env" } else { "setpriv" }).args(&user);
        let mut command = Command::new(bin.join("postgres"));
        server(&mut command, &bin, &directory);
        watchdog.arg(bin.join("postgres")).args(command.get_args().skip(1));
        let log = fs::File::create(directory.join("log")).expect("a log file");
        watchdog.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        let server = Self { _watchdog: watchdog.spawn().expect("sh starts"), bin, directory };
        wait_until_ready(&server.bin, &server.directory);
        server
    }
}

/// Makes a directory with an empty server in it; says how to become the user that may run it.
fn init() -> (PathBuf, PathBuf, Vec<String>) {
    let bin = find_bin().expect(MISSING);
    let directory = tempfile::Builder::new().prefix("tollgate-pg-").tempdir().expect("a directory").keep();
    fs::create_dir(directory.join("log.d")).expect("a directory");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("the directory's mode");
    // PostgreSQL refuses to run as root.
    let user = if is_root() { owner_of(&directory) } else { Vec::new() };
    let mut initdb = become_user(&user);
    initdb.arg(bin.join("initdb"));
    initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync", "--pgdata"]);
    initdb.arg(directory.join("data"));
    succeeded("initdb", &initdb.output().expect(MISSING));
    (bin, directory, user)
}

fn become_user(user: &[String]) -> Command {
    let mut command = Command::new(if user.is_empty() { "env" } else { "setpriv" });
    command.args(user);
    command
}

/// Adds the program and its arguments.
fn server(command: &mut Command, bin: &Path, directory: &Path) {
    command.arg(bin.join("postgres")).arg("-D").arg(directory.join("data")).arg("-k").arg(directory);
    for setting in ["listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=200"] {
        command.arg("-c").arg(setting);
    }
}

fn wait_until_ready(bin: &Path, directory: &Path) {
    let start = Instant::now();
    while !tool(bin, directory, "pg_isready").output().expect("pg_isready starts").status.success() {
        let log = || fs::read_to_string(directory.join("log")).unwrap_or_else(|_| log(&directory.join("log.d")));
        assert!(start.elapsed() < Duration::from_secs(60), "PostgreSQL does not start:\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client program, told where the server is.
fn tool(bin: &Path, directory: &Path, name: &str) -> Command {
    let mut command = Command::new(bin.join(name));
    command.arg("-h").arg(directory).args(["-U", "postgres"]);
    command
}

/// Runs the server beside itself, waits for the end of its standard input, then cleans up.
const WATCHDOG: &str = r#"
    directory=$1; shift
    "$@" </dev/null & server=$!
    cat >/dev/null
    kill -TERM $server; wait $server
    rm -rf "$directory"
"#;

/// The directory of PostgreSQL's programs: from PATH, else the newest that Debian has installed.
fn find_bin() -> Option<PathBuf> {
    // Links in PATH may lead to some of the programs only; their targets stand beside all of them.
    let home = |directory: PathBuf| fs::canonicalize(directory.join("initdb")).ok()?.parent().map(Path::to_path_buf);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).find_map(home).or_else(|| {
        let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
        let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u32>().ok();
        versions
            .filter_map(|version| Some(version.ok()?.path()))
            .max_by_key(number)
            .map(|newest| newest.join("bin"))
            .and_then(home)
    })
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Gives `directory` to the user `postgres`, else `nobody`; says how `setpriv` becomes that user.
fn owner_of(directory: &Path) -> Vec<String> {
    let id = |flag, user| Command::new("id").args([flag, user]).output().ok().filter(|done| done.status.success());
    let number = |done: Output| String::from_utf8_lossy(&done.stdout).trim().parse::<u32>().ok();
    let (uid, gid) = ["postgres", "nobody"]
        .iter()
        .find_map(|user| Some((number(id("-u", user)?)?, number(id("-g", user)?)?)))
        .expect("a user postgres or nobody, because PostgreSQL does not run as root");
    chown(directory, Some(uid), Some(gid)).expect("root may give a directory away");
    vec![format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]
}

fn succeeded(what: &str, done: &Output) {
    let text = io::read_to_string(&*done.stderr).unwrap_or_default();
    assert!(done.status.success(), "{what} failed ({}): {text}", done.status);
}
