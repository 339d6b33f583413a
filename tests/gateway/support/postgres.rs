//! A real PostgreSQL for tests: one server per test process, a fresh database per test.
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

const MISSING: &str = "these tests need PostgreSQL: `apt-get install postgresql` (or put initdb and postgres in PATH)";

struct Server {
    bin: PathBuf,
    directory: PathBuf,
    /// Its standard input is the pipe.
    _watchdog: Child,
}

/// The URL of a new, empty database. Starts the server when it is the first.
pub(crate) fn database() -> String {
    static SERVER: OnceLock<Server> = OnceLock::new();
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let server = SERVER.get_or_init(Server::start);
    let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let created = server.tool("createdb").arg(&name).output().expect("createdb starts");
    succeeded("createdb", &created);
    format!("postgres://postgres@localhost/{name}?host={}", server.directory.display())
}

impl Server {
    fn start() -> Self {
        let bin = find_bin().expect(MISSING);
        let directory = tempfile::Builder::new().prefix("tollgate-pg-").tempdir().expect("a directory").keep();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("the directory's mode");
        // PostgreSQL refuses to run as root.
        let become_user = is_root().then(|| owner_of(&directory));
        let data = directory.join("data");
        let mut initdb = Command::new(if become_user.is_some() { "setpriv" } else { "env" });
        initdb.args(become_user.iter().flatten()).arg(bin.join("initdb"));
        initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync", "--pgdata"]).arg(&data);
        succeeded("initdb", &initdb.output().expect(MISSING));

        let mut watchdog = Command::new("sh");
        watchdog.arg("-c").arg(WATCHDOG).arg("watchdog").arg(&directory);
        watchdog.arg(if become_user.is_some() { "setpriv" } else { "env" }).args(become_user.iter().flatten());
        watchdog.arg(bin.join("postgres")).arg("-D").arg(&data).arg("-k").arg(&directory);
        for setting in ["listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=200"] {
            watchdog.arg("-c").arg(setting);
        }
        let log = fs::File::create(directory.join("log")).expect("a log file");
        watchdog.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        let server = Self { bin, _watchdog: watchdog.spawn().expect("sh starts"), directory };
        server.wait_until_ready();
        server
    }

    fn wait_until_ready(&self) {
        let start = Instant::now();
        while !self.tool("pg_isready").output().expect("pg_isready starts").status.success() {
            let log = || fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            assert!(start.elapsed() < Duration::from_secs(60), "PostgreSQL does not start:\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A client program, told where the server is.
    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        command.arg("-h").arg(&self.directory).args(["-U", "postgres"]);
        command
    }
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
