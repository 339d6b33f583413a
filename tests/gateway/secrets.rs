//! Secrets: who may read them, how they are renewed, and that nobody else ever sees one.

use std::{
    fs,
    time::{Duration, Instant},
};

use http::StatusCode;
use serde_json::{Value, json};
use tollgate::{
    config,
    secrets::{FernetKeys, generate_key},
};
use tollgate_core::secret::Secret;

use crate::support::{
    cli::Cli,
    client::h1,
    gateway::{Gateway, PATIENCE, block_on},
    openai::{chat, completion},
    postgres,
    program::{Program, Run},
    redis::Redis,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

fn keys(all: &[&Secret]) -> FernetKeys {
    FernetKeys::try_new(all.iter().copied()).unwrap()
}

#[tokio::test]
async fn credentials_are_rotated_to_the_first_key() {
    let (old, new) = (generate_key(), generate_key());
    let mut cli = Cli { fernet: keys(&[&old]), ..Cli::empty().await };
    cli.text("init").await;
    for name in ["a", "b", "removed"] {
        cli.run(&format!("upstream add --name {name}"), &format!("sk-{name}")).await.unwrap();
    }
    cli.text("upstream remove removed").await;
    let of_file = cli.fernet.encrypt(&Secret::new("sk-file".into()));
    cli.fernet = keys(&[&new, &old]);
    cli.run("upstream add --name c", "sk-c").await.unwrap();
    cli.encrypted_in_file = vec![("old", of_file), ("new", cli.fernet.encrypt(&Secret::new("sk-file".into())))];

    assert_eq!(
        cli.json("secret rotate").await,
        json!({"rotated": 2, "already": 1, "failed": 0, "failed_upstreams": [], "config_file": ["old"],
               "content": {"rotated": 0, "already": 0, "failed": 0}})
    );
    let text = cli.text("secret rotate").await;
    assert_eq!(
        text,
        "0 credentials encrypted with the first key; 3 had been already\n\
         The config file has credentials that need an older key: old. `tollgate secret encrypt` encrypts them anew.\n"
    );
    cli.fernet = keys(&[&new]);
    cli.text("init").await;
    for stored in cli.store.upstreams().await.unwrap() {
        let credential = cli.fernet.decrypt(&stored.spec.credential).unwrap();
        assert_eq!(credential.expose(), format!("sk-{}", stored.spec.name), "the first key does alone");
    }
    cli.fernet = keys(&[&old]);
    assert!(cli.fails("init", "").await.0.contains("do not fit this database"), "the old one does no more");
}

#[tokio::test]
async fn what_no_key_decrypts_is_named_after_the_others_were_rotated() {
    let (old, new) = (generate_key(), generate_key());
    let mut cli = Cli { fernet: keys(&[&old]), ..Cli::empty().await };
    cli.text("init").await;
    for name in ["damaged", "good", "foreign"] {
        cli.run(&format!("upstream add --name {name}"), "sk-1").await.unwrap();
    }
    let foreign = keys(&[&generate_key()]).encrypt(&Secret::new("sk-1".into()));
    for (name, ciphertext) in [("damaged", "gAAAA"), ("foreign", foreign.as_str())] {
        let id = cli.store.find_upstream(name).await.unwrap().id;
        cli.store.update_upstream(id, "test", |spec| spec.credential = ciphertext.to_owned()).await.unwrap();
    }
    cli.fernet = keys(&[&new, &old]);
    for (rotated, already) in [(1, 0), (0, 1)] {
        let (printed, error, exit) = cli.fails_with("secret rotate --json", "").await;
        let counts: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((&counts["rotated"], &counts["already"]), (&json!(rotated), &json!(already)));
        assert_eq!((&counts["failed"], &counts["failed_upstreams"]), (&json!(2), &json!(["damaged", "foreign"])));
        assert!(error.contains("damaged, foreign") && error.contains("--new-credential") && exit == 1, "{error}");
    }
    for name in ["damaged", "foreign"] {
        cli.run(&format!("upstream update {name} --new-credential"), "sk-2").await.unwrap();
    }
    assert_eq!(cli.json("secret rotate").await["already"], 3);
}

#[tokio::test]
async fn rotating_disturbs_no_gateway() {
    let upstream = Upstream::start(Script::by(|request| match request.header("authorization") {
        Some("Bearer sk-good") => completion(),
        _ => Answer::json(401, &json!({})),
    }));
    let mut gateway = Gateway::builder().start();
    let cli = Cli::beside(&gateway).await;
    let add = |name: &str, more: &str| format!("upstream add --name {name} --base-url {} {more}", upstream.base_url());
    cli.run(&add("bad", ""), "sk-bad").await.unwrap();
    cli.run(&add("good", "--priority 1"), "sk-good").await.unwrap();
    until_ok(&gateway, &chat()).await;
    let state = async |cli: &Cli, name: &str| cli.json(&format!("upstream show {name}")).await["state"].clone();
    assert_eq!((state(&cli, "bad").await, state(&cli, "good").await), (json!("quarantined"), json!("closed")));

    let file = gateway.dir().join("fernet.key");
    let old = fs::read_to_string(&file).unwrap();
    let new = generate_key().expose().to_owned();
    fs::write(&file, format!("{new}\n{old}")).unwrap();
    let cli = cli.with_keys_of(&file);
    let before = upstream.received().len();
    assert_eq!(cli.json("secret rotate").await["rotated"], 2);
    // Longer than the gateway takes to see a change, had there been one.
    let until = Instant::now() + Duration::from_millis(1_200);
    while Instant::now() < until {
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(state(&cli, "bad").await, "quarantined", "the same credential is as bad as it was");
    let sent = &upstream.received()[before..];
    assert!(sent.iter().all(|request| request.header("authorization") == Some("Bearer sk-good")));

    fs::write(&file, new).unwrap();
    gateway.restart();
    until_ok(&gateway, &chat()).await;
}

async fn until_ok(gateway: &Gateway, body: &Value) {
    let until = Instant::now() + PATIENCE;
    while gateway.ask(CHAT, body).await.status != StatusCode::OK {
        assert!(Instant::now() < until, "the change is not seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const SMALL: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\nadmin_listen = \"\"\n[store]\nurl = \"sqlite://DIR/db\"\n\
                     [secrets]\nfernet_keys_file = \"DIR/fernet.key\"\n";

/// The program with a database that has an upstream.
fn with_database() -> Program {
    let program = Program::new(SMALL);
    for (line, input) in [("init", ""), ("upstream add --name main", "sk-main-secret")] {
        let run = program.run(line, input);
        assert_eq!(run.code, 0, "{line}: {}", run.stderr);
    }
    program
}

/// `serve` must end at once, and say why.
fn refuses_to_start(program: &Program, code: i32, says: &[&str]) {
    let run = program.run("serve", "");
    assert_eq!(run.code, code, "{says:?}: {}", run.stderr);
    let all = run.stdout + &run.stderr;
    assert!(says.iter().all(|says| all.contains(says)), "{says:?}: {all}");
    assert!(!all.contains("sk-") && !all.contains("gAAAA") && !all.contains("panicked"), "{all}");
}

#[test]
fn wrong_fernet_keys_in_the_environment_stop_the_start() {
    let other = generate_key();
    let program = with_database().variable("TOLLGATE_FERNET_KEYS", other.expose());
    refuses_to_start(&program, 1, &["do not fit this database", "TOLLGATE_FERNET_KEYS"]);
    let program = program.variable("TOLLGATE_FERNET_KEYS", &format!("{},short", other.expose()));
    refuses_to_start(&program, 2, &["environment: TOLLGATE_FERNET_KEYS: key 2 is not a Fernet key", "secret generate"]);
    let program = program.variable("TOLLGATE_FERNET_KEYS", "");
    refuses_to_start(&program, 2, &["environment: TOLLGATE_FERNET_KEYS: holds no Fernet key"]);
}

#[test]
fn wrong_or_missing_fernet_keys_in_the_file_stop_the_start() {
    let program = with_database();
    let file = program.directory().join("fernet.key");
    let right = fs::read_to_string(&file).unwrap();
    program.write("fernet.key", generate_key().expose());
    refuses_to_start(&program, 1, &["do not fit this database", "[secrets] fernet_keys_file"]);
    program.write("fernet.key", "no key at all\n");
    refuses_to_start(&program, 2, &["secrets.fernet_keys_file", "key 1 is not a Fernet key"]);
    program.write("fernet.key", "# emptied\n");
    refuses_to_start(&program, 2, &["secrets.fernet_keys_file", "holds no Fernet key"]);
    fs::remove_file(&file).unwrap();
    refuses_to_start(&program, 1, &["bring back", "fernet.key", "TOLLGATE_FERNET_KEYS"]);
    assert!(!file.exists(), "a new key would hide that the old one is gone");
    program.write("fernet.key", &format!("{}\n{right}", generate_key().expose()));
    program.serve().stop();
}

#[test]
fn a_credential_that_no_key_decrypts_stops_the_start() {
    let program = with_database();
    let foreign = keys(&[&generate_key()]).encrypt(&Secret::new("sk-foreign".into()));
    let upstream = |token: &str| {
        format!("[[upstream]]\nname = 'filed'\nbase_url = 'https://a.example/v1'\ncredential = 'fernet:{token}'\n")
    };
    program.write("tollgate.toml", &format!("{SMALL}{}", upstream(&foreign)));
    let says = ["upstream[0].credential: cannot be decrypted with any of the Fernet keys", "tollgate secret encrypt"];
    refuses_to_start(&program, 2, &says);

    program.write("tollgate.toml", SMALL);
    block_on(async {
        let url = format!("sqlite://{}/db", program.directory().display());
        let store = tollgate::store::Store::open(&url).await.unwrap();
        let id = store.find_upstream("main").await.unwrap().id;
        store.update_upstream(id, "test", |spec| spec.credential.clone_from(&foreign)).await.unwrap();
        store.close().await;
    });
    let says = ["credential of the upstream \"main\" in the database cannot be decrypted", "--new-credential"];
    refuses_to_start(&program, 1, &says);
    let mended = program.run("upstream update main --new-credential", "sk-main-secret");
    assert_eq!(mended.code, 0, "{}", mended.stderr);
    program.serve().stop();
}

#[tokio::test]
async fn a_credential_file_is_read_anew_when_it_changes() {
    let upstream = Upstream::start(Script::by(|request| match request.header("authorization") {
        Some("Bearer sk-revoked") => Answer::json(401, &json!({})),
        _ => completion(),
    }));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("openai");
    fs::write(&file, "sk-one\n").unwrap();
    let more = format!("credential_file = \"{}\"", file.display());
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), &more).start();
    let next = async || {
        let status = gateway.ask(CHAT, &chat()).await.status;
        (status, upstream.received().last().unwrap().header("authorization").unwrap_or_default().to_owned())
    };
    let until = async |credential: &str| {
        let until = Instant::now() + PATIENCE;
        while next().await != (StatusCode::OK, format!("Bearer {credential}")) {
            assert!(Instant::now() < until, "{credential} is not used");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert_eq!(next().await, (StatusCode::OK, "Bearer sk-one".to_owned()));
    // In place, with the same length.
    fs::write(&file, "sk-two\n").unwrap();
    until("sk-two").await;
    // What cannot be used changes nothing.
    for bad in ["", "sk two", "\u{e9}"] {
        fs::write(&file, bad).unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(next().await, (StatusCode::OK, "Bearer sk-two".to_owned()), "{bad:?}");
    }
    fs::remove_file(&file).unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(next().await.0, StatusCode::OK);
    // Replaced, as mounted secrets are; the account is another one, so nothing is held against it.
    fs::write(directory.path().join("new"), "sk-revoked").unwrap();
    fs::rename(directory.path().join("new"), &file).unwrap();
    let quarantined = "tollgate_upstream_state{state=\"quarantined\",upstream=\"main\"}";
    let since = Instant::now();
    while gateway.metric(quarantined).await < 1.0 {
        assert!(since.elapsed() < PATIENCE, "the revoked credential is not used");
        next().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fs::write(directory.path().join("new"), "sk-three").unwrap();
    fs::rename(directory.path().join("new"), &file).unwrap();
    until("sk-three").await;
}

#[test]
fn a_credential_file_that_goes_bad_is_told_once() {
    let program = Program::new(&format!(
        "{SMALL}[[upstream]]\nname = 'main'\nbase_url = 'http://127.0.0.1:1/v1'\nmodels = ['m']\ncredential_file = 'DIR/key'\n"
    ));
    program.write("key", "sk-first-secret\n");
    let gateway = program.serve();
    program.write("key", "sk-first secret\n");
    let until = Instant::now() + PATIENCE;
    let trouble = "key contains white space or characters that cannot be sent in a header";
    while !gateway.log().contains(trouble) {
        assert!(Instant::now() < until, "{}", gateway.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(1_500));
    program.write("key", "sk-other-secret\n");
    while !gateway.log().contains("the credential in credential_file has changed") {
        assert!(Instant::now() < until, "{}", gateway.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = gateway.stop();
    assert_eq!(log.matches(trouble).count(), 1, "{log}");
    assert_eq!(log.matches("credential_file can be used again").count(), 1, "{log}");
    assert!(!log.contains("sk-"), "{log}");
}

/// A secret that is in use, and where it belongs.
struct Planted {
    what: &'static str,
    text: String,
}

/// What must never be seen, and everything that was.
struct Search {
    planted: Vec<Planted>,
    seen: Vec<(String, String)>,
}

impl Search {
    /// A new secret, as long and as strange as real ones.
    fn plant(&mut self, what: &'static str, before: &str) -> String {
        let random = generate_key();
        let text = format!("{before}{}", random.expose().replace(['-', '_', '='], "x"));
        self.know(what, &text);
        text
    }

    fn know(&mut self, what: &'static str, text: &str) {
        assert!(text.len() > 20, "{what} could be found by chance");
        self.planted.push(Planted { what, text: text.to_owned() });
    }

    fn see(&mut self, place: &str, text: impl Into<String>) {
        self.seen.push((place.to_owned(), text.into()));
    }

    fn see_run(&mut self, place: &str, run: &Run) {
        self.see(&format!("{place}, standard output"), run.stdout.clone());
        self.see(&format!("{place}, standard error"), run.stderr.clone());
    }

    /// Was this seen anywhere? Else the test would look where nothing is.
    fn has_seen(&self, text: &str) {
        assert!(self.seen.iter().any(|(_, seen)| seen.contains(text)), "{text:?} was never seen");
    }

    fn finds_nothing(&self) {
        for Planted { what, text } in &self.planted {
            // Part of a secret is too much as well; a key's prefix of eleven characters is meant to be shown.
            let part = &text[..text.len() / 2 + 4];
            for (place, seen) in &self.seen {
                assert!(!seen.contains(part), "{what} is seen in {place}: {}", seen.replace(part, "<HERE>"));
            }
        }
    }
}

/// Takes the one secret out of what a verb shows once.
fn shown_once(run: &Run, field: &str) -> (String, Run) {
    let object: Value = serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}", run.stderr));
    let secret = object[field].as_str().unwrap().to_owned();
    assert_eq!(run.stdout.matches(&secret).count(), 1);
    let stdout = run.stdout.replace(&secret, "");
    (secret, Run { code: run.code, stdout, stderr: run.stderr.clone() })
}

/// Everything that can be named of upstreams at once: each way of having a credential, each way of failing.
fn config_with_everything(database: &str, redis: &str, [echo, good]: [&str; 2], token: &str) -> String {
    format!(
        "[server]\nlisten = ['127.0.0.1:0']\nadmin_listen = '127.0.0.1:0'\n[store]\nurl = '{database}'\n\
         [limiter]\nredis = 'redis://:${{REDIS_PASSWORD}}@{redis}'\n[limits.ip]\nrpm = 1000\n[log]\nlevel = 'trace'\n\
         [[upstream]]\nname = 'good'\nbase_url = '{good}'\nmodels = ['good']\ncredential = '${{GOOD}}'\n\
         [[upstream]]\nname = 'echo'\nbase_url = '{echo}'\nmodels = ['echo*']\ncredential = '${{ECHO}}'\n\
         [[upstream]]\nname = 'gone'\nbase_url = 'http://127.0.0.1:1/v1'\nmodels = ['gone']\ncredential = '${{GONE}}'\n\
         probe_interval = '1s'\n\
         [[upstream]]\nname = 'filed'\nbase_url = '{echo}'\nmodels = ['filed']\ncredential_file = 'DIR/filed'\n\
         [[upstream]]\nname = 'encrypted'\nbase_url = '{echo}'\nmodels = ['encrypted']\ncredential = 'fernet:{token}'\n"
    )
}

/// A provider that shows everything it was sent, in a refusal.
fn echoing() -> Upstream {
    Upstream::without_list(Script::by(|request| {
        let sent = request.header("authorization").unwrap_or_default();
        let message = format!("Incorrect API key provided: {sent}. You can find your key at {sent}");
        let answer = Answer::json(401, &json!({"error": {"message": message, "code": sent, "type": sent}}));
        answer.header("x-echo", sent).header("x-request-id", sent).header("location", sent)
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_secret_is_seen_anywhere() {
    let mut search = Search { planted: Vec::new(), seen: Vec::new() };
    let (echo, good) = (echoing(), Upstream::start(completion()));
    let mut redis = Redis::start();
    let redis_password = search.plant("the password of Redis", "");
    redis.command::<()>(&["CONFIG", "SET", "requirepass", &redis_password]);
    let database_password = search.plant("the password of the database", "");
    let database = postgres::database().replace("postgres@", "postgres:${DB_PASSWORD}@");
    let (fernet, older) = (generate_key(), generate_key());
    search.know("the Fernet key", fernet.expose());
    search.know("the older Fernet key", older.expose());
    let encrypted = search.plant("an encrypted credential", "sk-proj-");
    let token = keys(&[&older]).encrypt(&Secret::new(encrypted));
    let credentials = ["GOOD", "ECHO", "GONE"].map(|name| (name, search.plant("a credential", "sk-")));
    let filed = search.plant("a credential in a file", "sk-");

    let address = redis.url().replace("redis://", "");
    let text = config_with_everything(&database, &address, [&echo.base_url(), &good.base_url()], &token);
    let mut program = Program::new(&text);
    for (name, value) in credentials.iter().map(|(name, value)| (*name, value.as_str())) {
        program = program.variable(name, value);
    }
    program = program
        .variable("DB_PASSWORD", &database_password)
        .variable("REDIS_PASSWORD", &redis_password)
        .variable("TOLLGATE_FERNET_KEYS", &format!("{},{}", fernet.expose(), older.expose()));
    program.write("filed", &format!("{filed}\n"));

    let (admin_token, init) = shown_once(&program.run("init --json", ""), "admin_token");
    search.know("the admin token", &admin_token);
    search.see_run("init", &init);
    search.see_run("user create", &program.run("user create --name alice", ""));
    let (key, created) = shown_once(&program.run("key create --user alice --name ci --json", ""), "key");
    search.know("a key", &key);
    search.see_run("key create", &created);
    let stored = search.plant("a credential in the database", "sk-");
    let add = format!("upstream add --name stored --base-url {} --models stored --json", echo.base_url());
    search.see_run("upstream add", &program.run(&add, &stored));

    let gateway = program.serve();
    let wrong_key = search.plant("a key that is none", "tg-");
    for model in ["good", "echo", "gone", "filed", "encrypted", "stored", "none"] {
        for bearer in [&key, &wrong_key] {
            let body = json!({"model": model, "messages": [{"role": "user", "content": "x"}]}).to_string();
            let request = h1(gateway.http()).post(CHAT).bearer(bearer).body_content_length(body);
            let answer = request.send().await.unwrap().whole().await;
            search.see(&format!("the answer for {model}"), format!("{:?} {:?}", answer.headers, answer.body));
        }
    }
    let request = h1(gateway.http()).get(&format!("/v1/models?api-key={wrong_key}")).header("api-key", &wrong_key);
    let answer = request.send().await.unwrap().whole().await;
    search.see("the list of models", format!("{:?} {:?}", answer.headers, answer.body));

    for line in [
        "check",
        "check --json",
        "user list",
        "key list --json",
        "key show ci",
        "upstream list",
        "upstream list --json",
        "upstream show stored",
        "upstream show encrypted --json",
        "upstream test good",
        "upstream test echo",
        "upstream test echo --json",
        "upstream test gone --json",
        "upstream test filed",
        "upstream test encrypted",
        "upstream test stored --json",
        "upstream update stored --weight 2 --json",
        "upstream drain stored --timeout 1s",
        "secret rotate",
        "secret rotate --json",
        "audit --json",
        "usage --by upstream",
        "upstream enable stored",
        "upstream add --name stored",
        "upstream remove nothing",
    ] {
        search.see_run(line, &program.run(line, &stored));
    }
    let newer = search.plant("a renewed credential", "sk-");
    search.see_run("renewing", &program.run("upstream update stored --new-credential --json", &newer));
    search.see_run("encrypting", &program.run("secret encrypt", &newer));
    let two = format!("{newer} {newer}");
    search.see_run("too much on standard input", &program.run("upstream update stored --new-credential", &two));

    // A file that goes bad, and a Redis that forgets its password and then goes away.
    program.write("filed", &format!("{filed} {filed}"));
    for restart in [true, false] {
        if restart {
            redis.restart();
        } else {
            redis.stop();
        }
        let request = h1(gateway.http()).post(CHAT).bearer(&key);
        let body = json!({"model": "good", "messages": []}).to_string();
        let request = request.body_content_length(body);
        let answer = request.send().await.unwrap().whole().await;
        search.see("an answer without Redis", format!("{:?} {:?}", answer.headers, answer.body));
        tokio::time::sleep(Duration::from_millis(1_200)).await;
    }
    for page in ["/metrics", "/healthz", "/readyz"] {
        let answer = h1(gateway.admin()).get(page).send().await.unwrap().whole().await;
        search.see(page, String::from_utf8_lossy(&answer.body));
    }
    search.see("the log", gateway.stop());

    // Starts that fail, each with a secret in hand.
    let environment = |name: &str| match name {
        "DB_PASSWORD" => Some(database_password.clone()),
        "REDIS_PASSWORD" => Some(redis_password.clone()),
        "TOLLGATE_FERNET_KEYS" => Some(format!("{},{}", fernet.expose(), older.expose())),
        name => credentials.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone()),
    };
    program.write("filed", &filed);
    let written = fs::read_to_string(program.directory().join("tollgate.toml")).unwrap();
    let parsed = config::parse(None, &written, &environment).unwrap_or_else(|errors| panic!("{errors}"));
    search.see("Debug of the configuration", format!("{parsed:?} {parsed:#?}"));
    let misplaced = written
        .replace("name = 'good'", "name = '${GOOD}'")
        .replace("models = ['good']", "models = ['${GOOD} x']\nkind = '${GOOD}'\napi_version = '${GOOD} x'")
        .replace("'127.0.0.1:0'", "'${GOOD}'")
        .replace("level = 'trace'", "level = '${GOOD}='\nformat = '${GOOD}'")
        .replace("redis = 'redis://:", "redis = 'http://:")
        .replace("url = 'postgres://postgres:", "url = 'mysql://postgres:")
        .replace("DIR/filed", "${GOOD}");
    program.write("misplaced.toml", &misplaced);
    for line in ["check", "check --json", "serve", "user list"] {
        search.see_run("secrets in wrong places", &program.run_with("misplaced.toml", line, ""));
    }
    let unreachable = written.replace("@localhost/", "@127.0.0.1:1/").replace("host=", "application_name=");
    program.write("unreachable.toml", &unreachable);
    search.see_run("a database that is not there", &program.run_with("unreachable.toml", "serve", ""));
    let program = program.variable("TOLLGATE_FERNET_KEYS", fernet.expose());
    search.see_run("without the older Fernet key", &program.run("serve", ""));
    let store = tollgate::store::Store::open(&database.replace("${DB_PASSWORD}", &database_password)).await.unwrap();
    search.see("the log of changes", format!("{:?}", store.admin_log(100).await.unwrap()));
    search.see("the rows of upstreams", format!("{:?}", store.upstreams().await.unwrap()));
    search.see("Debug of the store", format!("{store:?}"));
    store.close().await;

    for provoked in [
        "DEBUG",
        "quarantined",
        "Incorrect API key provided",
        "invalid_api_key",
        "the credential is not accepted",
        "credential_file: ",
        "nothing listens there",
        "tollgate_limiter_degraded 1",
        "is not a kind of upstream",
        "is not the URL of a database",
        "is not the URL of a Redis",
        "cannot be reached",
        "model_not_found",
        "cannot be decrypted with any of the Fernet keys",
        "File(",
    ] {
        search.has_seen(provoked);
    }
    search.finds_nothing();
}
