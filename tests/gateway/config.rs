//! The configuration: what it promises to those who write one.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, KeyPair};
use tollgate::config::{Config, ConfigErrors, CredentialSource, StoreKind, check, load, parse};
use tollgate_core::{price::Price, secret::Secret};

/// 32 zero bytes.
const FERNET_KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

fn env(name: &str) -> Option<String> {
    match name {
        "TOLLGATE_FERNET_KEYS" => Some(FERNET_KEY.into()),
        "OPENAI_API_KEY" => Some("sk-from-the-environment".into()),
        _ => None,
    }
}

fn read(text: &str) -> Result<Config, ConfigErrors> {
    parse(Some(Path::new("t.toml")), text, &env)
}

/// What is wrong with `text`, a problem per line.
fn problems(text: &str) -> String {
    read(text).map_or_else(|errors| errors.to_string(), |_| String::new())
}

fn warnings(text: &str) -> String {
    let config = read(text).unwrap();
    config.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn upstream(more: &str) -> String {
    format!("[[upstream]]\nname = 'a'\nbase_url = 'https://a.example/v1'\ncredential = '${{OPENAI_API_KEY}}'\n{more}\n")
}

fn repository(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

#[test]
fn the_embedded_defaults_can_be_run() {
    let config = parse(None, "", &env).unwrap();
    assert_eq!(config.server.listen, ["127.0.0.1:8080".parse().unwrap()]);
    assert_eq!(config.server.admin_listen, Some("127.0.0.1:9180".parse().unwrap()));
    assert_eq!(config.server.max_body_bytes, 64 << 20);
    assert!(config.server.threads >= 1);
    assert_eq!((config.store.kind, config.store.url.expose()), (StoreKind::Sqlite, "sqlite://data/tollgate.db"));
    assert_eq!(config.retry.attempts, 3);
    assert!(config.tls.is_none() && config.upstreams.is_empty() && config.warnings.is_empty());
}

#[test]
fn the_annotated_file_shows_the_embedded_defaults() {
    let annotated = load(Some(&repository("conf/tollgate.toml")), &env).unwrap();
    assert_eq!(Config { file: None, ..annotated }, parse(None, "", &env).unwrap());
}

#[test]
fn the_development_file_can_be_run() {
    let config = load(Some(&repository("conf/dev.toml")), &|_| None).unwrap();
    assert_eq!(config.upstreams[0].base_url.to_string(), "http://127.0.0.1:9100/v1");
    assert_eq!(config.warnings, []);
}

#[test]
fn settings_become_values() {
    let config = read(&format!(
        "[server]\nlisten = ['0.0.0.0:0', '[::1]:81']\nadmin_listen = ''\nmax_body = '1 MiB'\ngrace_period = '2m'\nthreads = 2\n\
         [upstream_defaults]\nconnect_timeout = '1s'\n{}[models.'gpt-4o']\ninput_usd_per_mtok = 2.5\noutput_usd_per_mtok = 10\n\
         aliases = ['fast']\n",
        upstream("kind = 'azure'\napi_version = 'preview'\nmodels = ['gpt-4o=prod', 'o*']\nweight = 7\npriority = 2\nread_timeout = '9s'")
    ))
    .unwrap();
    assert_eq!((config.server.listen.len(), config.server.admin_listen, config.server.threads), (2, None, 2));
    assert_eq!((config.server.max_body_bytes, config.server.grace_period), (1 << 20, Duration::from_secs(120)));
    let spec = &config.upstreams[0];
    assert_eq!((spec.weight, spec.priority, spec.api_version.as_deref()), (7, 2, Some("preview")));
    assert_eq!((spec.timeouts.connect, spec.timeouts.read), (Duration::from_secs(1), Duration::from_secs(9)));
    assert_eq!(spec.models.iter().map(ToString::to_string).collect::<Vec<_>>(), ["gpt-4o=prod", "o*"]);
    assert_eq!(spec.credential, CredentialSource::Plain(Secret::new("sk-from-the-environment".into())));
    let model = &config.models["gpt-4o"];
    assert_eq!(model.price, Price { input: 2_500_000, cached_input: 2_500_000, output: 10_000_000 });
    assert_eq!(model.aliases, ["fast"]);
}

#[test]
fn ten_mistakes_are_reported_at_once() {
    let text = r#"
[server]
lisen = ["127.0.0.1:8080"]
listen = ["localhost:8080"]
max_body = "64"
grace_period = 30

[store]
url = "mysql://root:hunter2@db/x"

[[upstream]]
name = "a"
base_url = "api.openai.com"
credential = "${NO_SUCH_KEY}"
weight = 2000
models = ["gpt 4"]

[models."gpt-4o"]
input_usd_per_mtok = "2.5"
output_usd_per_mtok = 10
"#;
    let expected = r#"
t.toml:3: server.lisen: unknown setting; did you mean `listen`?
t.toml:4: server.listen[0]: "localhost:8080" is not an IP address and port, such as "127.0.0.1:8080" or "[::1]:8080"
t.toml:5: server.max_body: "64" is not a size: write a whole number and B, KiB, MiB or GiB, such as "64 MiB"
t.toml:6: server.grace_period: must be a text in double quotes, not a whole number
t.toml:9: store.url: is not the URL of a database: write "sqlite://data/tollgate.db" or "postgres://user:password@host/database"
t.toml:13: upstream[0].base_url: "api.openai.com" must begin with https:// or http://
t.toml:14: upstream[0].credential: the environment variable NO_SUCH_KEY is not set: set it, or write $${ for a literal ${
t.toml:15: upstream[0].weight: 2000 is not between 0 and 1000
t.toml:16: upstream[0].models[0]: the model "gpt 4" contains white space
t.toml:19: models."gpt-4o".input_usd_per_mtok: must be a number without quotes, such as 2.5, not a text
"#;
    assert_eq!(problems(text), expected.trim());
}

#[test]
fn unknown_settings_are_errors() {
    assert_eq!(problems("[server]\nport = 1\n").lines().count(), 1);
    assert!(problems("[limiter]\nredis = ''\n").contains("t.toml:1: limiter: unknown setting"));
    assert!(problems("listen = ['127.0.0.1:1']\n").contains("`listen` belongs in [server]"));
    assert!(problems(&upstream("wieght = 3")).contains("upstream[0].wieght: unknown setting; did you mean `weight`?"));
    assert!(problems("[tls.acme]\ndomains = []\n").contains("tls.acme: unknown setting"));
    assert!(problems("[models.'a b']\nx = 1\n").contains(r#"models."a b".x: unknown setting"#));
}

#[test]
fn what_is_not_toml_is_reported_with_its_line_and_the_rest_is_checked() {
    let found = problems("[server]\nthreads = = 2\n[retry]\nattempts = 0\n");
    assert!(found.contains("t.toml:2: not valid TOML"), "{found}");
    assert!(found.contains("t.toml:4: retry.attempts: 0 is not between 1 and 10"), "{found}");
    assert!(problems("[server]\nthreads = 1\nthreads = 2\n").contains("t.toml:3: not valid TOML: duplicate key"));
    assert!(problems("server = 1\nupstream = 2\nmodels = []\n").lines().count() == 3);
    assert!(problems("[upstream]\nname = 'a'\n").contains("[[upstream]], with double brackets"));
}

#[test]
fn listeners_must_be_distinct_and_there_must_be_one() {
    assert!(problems("[server]\nlisten = ['127.0.0.1:1', '127.0.0.1:1']\n").contains("taken by server.listen[0]"));
    assert!(problems("[server]\nlisten = ['0.0.0.0:9180']\n").contains("127.0.0.1:9180 overlaps 0.0.0.0:9180"));
    assert!(problems("[server]\nlisten = []\n").contains("no listener"));
    assert!(problems("[server]\nlisten = [':8080']\n").contains("\"0.0.0.0:8080\" for every network"));
    assert_eq!(problems("[server]\nlisten = ['127.0.0.1:0', '127.0.0.1:0']\nadmin_listen = '127.0.0.1:0'\n"), "");
}

#[test]
fn limits_of_values_are_checked() {
    let cases = [
        ("[server]\nmax_body = '1 B'", "1 B is not between 1 KiB and 1 GiB"),
        ("[server]\nmax_body = '2 GiB'", "2 GiB is not between"),
        ("[server]\nclient_timeout = '0s'", "0s is not between 1ms and 1h"),
        ("[server]\ntrusted_proxies = ['10.0.0.0/99']", "server.trusted_proxies[0]"),
        ("[usage]\nflush_interval = '0ms'", "0s is not between"),
        ("[usage]\nbatch = 0", "0 is not between"),
        ("[usage]\nbatch = 99999999999999999999999", "is not between"),
        ("[upstream_defaults]\nconnect_timeout = '0s'", "0s is not between"),
        ("[log]\nformat = 'xml'", "use \"text\" or \"json\""),
        ("[log]\nlevel = 'inof'", "is not a log filter"),
        ("[models.a]\ninput_usd_per_mtok = -1\noutput_usd_per_mtok = 0", "is not between 0 and 1000000"),
        ("[models.a]\ninput_usd_per_mtok = nan\noutput_usd_per_mtok = 0", "is not between 0 and 1000000"),
        ("[models.a]\ninput_usd_per_mtok = 1", "models.\"a\".output_usd_per_mtok: is missing"),
    ];
    for (text, expected) in cases {
        let found = problems(text);
        assert!(found.contains(expected) && found.lines().count() == 1, "{text}: {found}");
    }
}

#[test]
fn upstreams_are_checked() {
    let found = problems("[[upstream]]\n");
    for name in ["name", "base_url", "credential"] {
        assert!(found.contains(&format!("t.toml:1: upstream[0].{name}: is missing")), "{found}");
    }
    assert!(problems(&upstream("api_version = '2024-10-21'")).contains("is for kind = \"azure\" only"));
    assert!(problems(&upstream("models = ['a', 'a=b']")).contains("upstream[0].models[1]: \"a\" is listed twice"));
    assert!(problems(&upstream("ca_file = '/no/such.pem'")).contains("/no/such.pem cannot be opened"));
    assert!(problems(&upstream("enabled = 'yes'")).contains("must be true or false"));
    let twice = upstream("") + &upstream("");
    assert!(problems(&twice).contains("t.toml:7: upstream[1].name: \"a\" is taken by upstream[0].name in line 2"));
}

#[test]
fn an_alias_means_one_model() {
    let models = "[models.a]\naliases = ['x', 'b']\n[models.b]\naliases = ['x', 'served', '*']\n";
    let found = problems(&(upstream("models = ['served']") + models));
    assert!(found.contains("models.\"a\".aliases[1]: \"b\" is a model of its own"), "{found}");
    assert!(found.contains("models.\"b\".aliases[0]: \"x\" is already an alias of \"a\""), "{found}");
    assert!(found.contains("models.\"b\".aliases[1]: \"served\" is a model of its own"), "{found}");
    assert!(found.contains("models.\"b\".aliases[2]: \"*\" is not the name of one model"), "{found}");
    assert_eq!(found.lines().count(), 4, "{found}");
}

#[test]
fn what_may_not_be_meant_is_a_warning() {
    assert_eq!(warnings(&upstream("")), "");
    let clear = upstream("").replace("${OPENAI_API_KEY}", "sk-literal");
    assert!(warnings(&clear).contains("t.toml:4: upstream[0].credential: stands in the file in clear text"));
    assert!(
        warnings(&upstream("").replace("https:", "http:")).contains("sends the credential to a.example in clear text")
    );
    let idle = warnings(&upstream("weight = 0\nmodels = ['m']"));
    assert!(idle.contains("upstream[0].weight: is 0") && idle.contains("\"m\" has the weight 0"), "{idle}");
    let helped = upstream("weight = 0\nmodels = ['m']") + &upstream("models = ['*']").replace("'a'", "'b'");
    assert!(!warnings(&helped).contains("nobody serves it"));
    let local = clear.replace("https://a.example", "http://127.0.0.1:9100");
    assert_eq!(warnings(&local), "");
}

#[test]
fn secrets_do_not_show() {
    let fernet = fernet::Fernet::new(FERNET_KEY).unwrap();
    let text = upstream("") + "[store]\nurl = 'postgres://u:hunter2@h/d'\n";
    let config = read(
        &(text
            + &upstream("")
                .replace("'a'", "'b'")
                .replace("${OPENAI_API_KEY}", &format!("fernet:{}", fernet.encrypt(b"sk-hidden")))),
    )
    .unwrap();
    let shown = format!("{config:?} {config:#?}");
    for secret in ["hunter2", "sk-from", "gAAAA", FERNET_KEY] {
        assert!(!shown.contains(secret), "{secret} in {shown}");
    }
    // Secrets that ended up in the wrong setting are not quoted either.
    for setting in ["api_version", "ca_file", "kind"] {
        let found = problems(&upstream(&format!("{setting} = '${{OPENAI_API_KEY}}x'")));
        assert!(found.contains(setting) && !found.contains("sk-from"), "{found}");
    }
    let found = problems(&upstream("").replace("https://a.example/v1", "https://me:hunter2@a.example"));
    assert!(found.contains("must not contain a user") && !found.contains("hunter2"), "{found}");
}

#[test]
fn credentials_are_plain_or_encrypted() {
    let with = |credential: &str| upstream("").replace("${OPENAI_API_KEY}", credential);
    let token = fernet::Fernet::new(FERNET_KEY).unwrap().encrypt(b"sk-hidden");
    let config = read(&with(&format!("fernet:{token}"))).unwrap();
    assert_eq!(config.upstreams[0].credential, CredentialSource::Fernet(token.clone()));
    assert_eq!(config.warnings, []);
    let foreign = fernet::Fernet::new(&fernet::Fernet::generate_key()).unwrap().encrypt(b"sk-hidden");
    assert!(problems(&with(&format!("fernet:{foreign}"))).contains("cannot be decrypted with any of the Fernet keys"));
    assert!(problems(&with("fernet:x")).contains("cannot be decrypted"));
    assert!(problems(&with("")).contains("upstream[0].credential: is empty"));
    assert!(problems(&with("sk-1 2")).contains("contains white space"));
    let text = with(&format!("fernet:{token}")) + "[secrets]\nfernet_keys_file = '/no/such/file'\n";
    let found = parse(None, &text, &|_| None).unwrap_err().to_string();
    assert!(found.contains("there is no Fernet key: /no/such/file does not exist"), "{found}");
}

#[test]
fn fernet_keys_come_from_the_environment_or_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fernet.key");
    let text = format!("[secrets]\nfernet_keys_file = '{}'\n", file.display());
    let keys = |env: &dyn Fn(&str) -> Option<String>| parse(None, &text, env).map(|config| config.secrets.fernet_keys);
    assert_eq!(keys(&|_| None).unwrap(), [], "the file may still be made");
    fs::write(&file, format!("{FERNET_KEY}\n{FERNET_KEY}\n")).unwrap();
    assert_eq!(keys(&|_| None).unwrap().len(), 2);
    assert_eq!(keys(&env).unwrap().len(), 1, "the environment takes its place");
    fs::write(&file, "secretish\n").unwrap();
    let found = keys(&|_| None).unwrap_err().to_string();
    assert!(found.contains("secrets.fernet_keys_file") && found.contains("key 1 is not a Fernet key"), "{found}");
    assert!(!found.contains("secretish"), "{found}");
    let found = keys(&|name| (name == "TOLLGATE_FERNET_KEYS").then(|| format!("{FERNET_KEY},short"))).unwrap_err();
    assert!(found.to_string().starts_with("environment: TOLLGATE_FERNET_KEYS: key 2 is not"), "{found}");
}

#[test]
fn what_cannot_be_stored_is_found_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let store = |path: &Path| problems(&format!("[store]\nurl = 'sqlite://{}'\n", path.display()));
    assert_eq!(store(&dir.path().join("not/yet/there.db")), "");
    assert!(store(&file.join("x.db")).contains("is a file, so nothing can be stored below it"));
    assert!(store(dir.path()).contains("is a directory"));
    for url in ["", "sqlite://", "mysql://x", "postgres://", "data.db"] {
        assert!(problems(&format!("[store]\nurl = '{url}'\n")).contains("store.url"), "{url}");
    }
    assert_eq!(problems("[store]\nurl = 'sqlite::memory:'\n"), "");
}

struct Pair {
    dir: tempfile::TempDir,
}

impl Pair {
    /// Writes a certificate that is valid for `days` from yesterday, and its key.
    fn new(days: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        let yesterday = SystemTime::now() - Duration::from_secs(86_400);
        params.not_before = yesterday.into();
        params.not_after = (yesterday + Duration::from_secs(days * 86_400 - 60)).into();
        let cert = params.self_signed(&key).unwrap();
        fs::write(dir.path().join("cert.pem"), cert.pem()).unwrap();
        fs::write(dir.path().join("key.pem"), key.serialize_pem()).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

fn tls(cert: &str, key: &str) -> String {
    format!("[server]\ntls_listen = ['127.0.0.1:0']\n[tls]\ncert = '{cert}'\nkey = '{key}'\n")
}

#[test]
fn a_certificate_is_read_with_its_key() {
    let pair = Pair::new(90);
    let config = read(&tls(&pair.path("cert.pem"), &pair.path("key.pem"))).unwrap();
    let tls_config = config.tls.unwrap();
    assert_eq!(tls_config.certified.cert.len(), 1);
    let left = tls_config.expires_at.duration_since(SystemTime::now()).unwrap().as_secs() / 86_400;
    assert_eq!((left, config.warnings.len()), (88, 0));
    let unused = tls(&pair.path("cert.pem"), &pair.path("key.pem")).replace("['127.0.0.1:0']", "[]");
    assert!(warnings(&unused).contains("tls.cert: is not used"));
}

#[test]
fn a_bad_certificate_is_found_before_the_start() {
    let (pair, other, old, soon) = (Pair::new(90), Pair::new(90), Pair::new(1), Pair::new(5));
    let (cert, key) = (pair.path("cert.pem"), pair.path("key.pem"));
    let cases = [
        (tls("", ""), "tls.cert: is missing: tls_listen needs a certificate"),
        (tls(&cert, ""), "tls.key: is missing"),
        (tls("", &key), "tls.cert: is missing: cert and key belong together"),
        (tls("/no/cert.pem", &key), "tls.cert: /no/cert.pem cannot be opened"),
        (tls(&key, &key), "holds no certificate"),
        (tls(&cert, &cert), "holds no private key"),
        (tls(&cert, &other.path("key.pem")), "tls.key: does not fit the certificate"),
        (tls(&old.path("cert.pem"), &old.path("key.pem")), "tls.cert: expired on"),
    ];
    for (text, expected) in cases {
        let found = problems(&text);
        assert!(found.contains(expected) && found.lines().count() == 1, "{expected}: {found}");
    }
    assert!(warnings(&tls(&soon.path("cert.pem"), &soon.path("key.pem"))).contains("tls.cert: expires on"));
    let both = problems(&tls("/no/cert.pem", "/no/key.pem"));
    assert_eq!(both.lines().count(), 2, "{both}");
    let encrypted = pair.path("encrypted.pem");
    fs::write(&encrypted, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
        .unwrap();
    assert!(problems(&tls(&cert, &encrypted)).contains("is protected by a passphrase"));
}

#[test]
fn a_private_authority_is_read() {
    let pair = Pair::new(90);
    let config = read(&upstream(&format!("ca_file = '{}'", pair.path("cert.pem")))).unwrap();
    assert!(config.upstreams[0].ca_pem.as_ref().unwrap().contains("BEGIN CERTIFICATE"));
    assert!(problems(&upstream(&format!("ca_file = '{}'", pair.path("key.pem")))).contains("holds no certificate"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (missing, binary) = (dir.path().join("missing.toml"), dir.path().join("binary.toml"));
    let message = |path: &Path| load(Some(path), &env).unwrap_err().to_string();
    assert_eq!(
        message(&missing),
        format!("{}: cannot be opened: No such file or directory (os error 2)", missing.display())
    );
    fs::write(&binary, b"# ok\nx = \"\xff\"\n").unwrap();
    assert!(message(&binary).contains("the first bad byte is in line 2"));
    assert!(message(dir.path()).contains("cannot be read"));
    if cfg!(target_os = "linux") {
        assert!(message(Path::new("/dev/zero")).contains("is larger than 4 MiB"));
    }
}

#[test]
fn check_prints_a_summary_or_every_problem() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.toml");
    fs::write(&file, upstream("models = ['m=n']\nweight = 2").replace("https:", "http:")).unwrap();
    let (text, code) = check(Some(&file), &env, false);
    let name = file.display();
    assert_eq!(code, 0);
    let expected = format!(
        "warning: {name}:3: upstream[0].base_url: sends the credential to a.example in clear text: use https://\n\
         {name}: ok\n  listen     http://127.0.0.1:8080\n  admin      http://127.0.0.1:9180\n  store      SQLite\n  \
         upstream   a: openai at http://a.example/v1, weight 2; m=n\n  models     none described\n"
    );
    assert_eq!(text, expected);
    fs::write(&file, "[retry]\nattempts = 0\n").unwrap();
    let (text, code) = check(Some(&file), &env, false);
    assert_eq!(code, 2);
    assert_eq!(text, format!("error: {name}:2: retry.attempts: 0 is not between 1 and 10\n1 problem to mend\n"));
}

#[test]
fn check_speaks_json() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.toml");
    fs::write(&file, upstream("weight = 0\npriority = -1")).unwrap();
    let (text, code) = check(Some(&file), &env, true);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &report["ok"]), (2, &serde_json::json!(false)));
    let expected = serde_json::json!([{
        "file": file.display().to_string(), "line": 6, "setting": "upstream[0].priority", "message": "-1 is not between 0 and 1000",
    }]);
    assert_eq!(report["errors"], expected);
    assert_eq!(report["warnings"].as_array().unwrap().len(), 2);
}
