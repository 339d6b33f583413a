//! The configuration: what it promises to those who write one.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, KeyPair};
use tollgate::{
    config::{Config, ConfigErrors, CredentialSource, GateConfig, OnRedisDown, StoreKind, check, load, parse},
    journal::{Fsync, OnFull},
};
use tollgate_core::{
    limit::{Limits, MAX_LIMIT, policy::Policy},
    price::Price,
    secret::Secret,
};

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
    assert_eq!((config.limiter.redis, config.limiter.on_redis_down), (None, OnRedisDown::Local));
    assert_eq!((config.limits.policy, config.limits.assumed_output_tokens), (Policy::default(), 512));
    assert_eq!(config.limits.gate, GateConfig { requests_per_second: 0, failed_keys_per_minute: 300 });
    let usage = config.usage;
    assert_eq!((usage.journal.to_str(), usage.journal_max_bytes), (Some("data/journal"), 1 << 30));
    assert_eq!((usage.on_journal_full, usage.fsync), (OnFull::Refuse, Fsync::Every(Duration::from_secs(1))));
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
         [usage]\njournal = 'j'\njournal_max = '2 MiB'\non_journal_full = 'drop_oldest'\nfsync = 'always'\n\
         [upstream_defaults]\nconnect_timeout = '1s'\n{}[models.'gpt-4o']\ninput_usd_per_mtok = 2.5\noutput_usd_per_mtok = 10\n\
         aliases = ['fast']\n",
        upstream("kind = 'azure'\napi_version = 'preview'\nmodels = ['gpt-4o=prod', 'o*']\nweight = 7\npriority = 2\nfirst_byte_timeout = '9s'")
    ))
    .unwrap();
    assert_eq!((config.server.listen.len(), config.server.admin_listen, config.server.threads), (2, None, 2));
    assert_eq!((config.server.max_body_bytes, config.server.grace_period), (1 << 20, Duration::from_secs(120)));
    assert_eq!((config.usage.journal.to_str(), config.usage.journal_max_bytes), (Some("j"), 2 << 20));
    assert_eq!((config.usage.on_journal_full, config.usage.fsync), (OnFull::DropOldest, Fsync::Always));
    let spec = &config.upstreams[0];
    assert_eq!((spec.weight, spec.priority, spec.api_version.as_deref()), (7, 2, Some("preview")));
    assert_eq!(
        (spec.handling.timeouts.connect, spec.handling.timeouts.first_byte),
        (Duration::from_secs(1), Duration::from_secs(9))
    );
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
    assert!(problems("[dashboard]\ntitle = ''\n").contains("t.toml:1: dashboard: unknown setting"));
    assert!(problems("[limits]\nrpm = 1\n").contains("t.toml:2: limits.rpm: unknown setting here; `rpm` belongs in ["));
    assert!(
        problems("[limits.models.m]\ntmp = 1\n")
            .contains("limits.models.\"m\".tmp: unknown setting; did you mean `tpm`?")
    );
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
        ("[usage]\njournal = ''", "names no directory"),
        ("[usage]\njournal = '/dev/null/journal'", "/dev/null is a file, so it cannot be a directory"),
        ("[usage]\njournal_max = '1 KiB'", "1 KiB is not between 1 MiB and 1024 GiB"),
        ("[usage]\non_journal_full = 'wait'", "use \"refuse\" or \"drop_oldest\""),
        ("[usage]\nfsync = 'often'", "use \"never\", \"always\", or a duration such as \"1s\""),
        ("[usage]\nfsync = '2h'", "2h is not between 1ms and 1h"),
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
fn limits_become_values() {
    let config = read(
        "[limits]\nassumed_output_tokens = 1_000\n\
         [limits.default_key]\nrpm = 60\ntpm = 1_000_000_000_000_000\nconcurrency = 0\nmonthly_usd = 12.5\n\
         [limits.default_user]\nmonthly_tokens = 0x10\nmonthly_usd = 1_000_000\n\
         [limits.ip]\nrpm = 4_294_967_295\ntpm = 7\nconcurrency = 2\nmonthly_tokens = 9\nmonthly_usd = 1\n\
         [limits.models.'gpt-4o']\nrpm = 1\n[limits.models.'gpt-4*']\nmonthly_usd = 0.000_000_001\n\
         [limits.gate]\nrequests_per_second = 50\nfailed_keys_per_minute = 0\n",
    )
    .unwrap();
    let Policy { key, user, ip, models } = config.limits.policy;
    let none = Limits::default();
    assert_eq!(
        key,
        Limits { rpm: Some(60), tpm: Some(MAX_LIMIT), monthly_nano_usd: Some(12_500_000_000), ..none },
        "0 is none"
    );
    assert_eq!(user, Limits { monthly_tokens: Some(16), monthly_nano_usd: Some(MAX_LIMIT), ..none });
    let rates = Limits { rpm: Some(u32::MAX), tpm: Some(7), concurrency: Some(2), ..none };
    assert_eq!(ip, Limits { monthly_tokens: Some(9), monthly_nano_usd: Some(1_000_000_000), ..rates });
    let mut models: Vec<_> = models.into_iter().map(|entry| (entry.model, entry.limits)).collect();
    models.sort_by(|a, b| a.0.cmp(&b.0));
    let (pattern, name) = (Limits { monthly_nano_usd: Some(1), ..none }, Limits { rpm: Some(1), ..none });
    assert_eq!(models, [("gpt-4*".to_owned(), pattern), ("gpt-4o".to_owned(), name)]);
    assert_eq!(config.limits.assumed_output_tokens, 1_000);
    assert_eq!(config.limits.gate, GateConfig { requests_per_second: 50, failed_keys_per_minute: 0 });
}

#[test]
fn limits_are_checked() {
    let cases = [
        ("[limits.default_key]\nrpm = -1", "t.toml:2: limits.default_key.rpm: -1 is not between 0 and 4294967295"),
        ("[limits.default_key]\nrpm = 1.5", "t.toml:2: limits.default_key.rpm: must be a whole number without quotes"),
        ("[limits.default_key]\nrpm = '60'", "must be a whole number without quotes, not a text"),
        ("[limits.default_key]\nrpm = 4294967296", "4294967296 is not between 0 and 4294967295"),
        ("[limits.default_key]\nconcurrency = 4294967296", "4294967296 is not between 0 and 4294967295"),
        ("[limits.default_key]\ntpm = 1000000000000001", "is not between 0 and 1000000000000000"),
        ("[limits.default_user]\nmonthly_tokens = 99999999999999999999", "is not between 0 and 1000000000000000"),
        ("[limits.default_user]\nmonthly_usd = -1", "default_user.monthly_usd: -1 is not an amount of dollars: write"),
        ("[limits.default_user]\nmonthly_usd = 1e3", "1e3 is not an amount of dollars"),
        ("[limits.default_user]\nmonthly_usd = nan", "nan is not an amount of dollars"),
        ("[limits.default_user]\nmonthly_usd = 0.0000000001", "write up to nine decimals"),
        ("[limits.default_user]\nmonthly_usd = 1000000.5", "is more than 1000000 dollars, the most that can be set"),
        ("[limits.default_user]\nmonthly_usd = '20'", "must be a number without quotes, such as 2.5, not a text"),
        ("[limits.ip]\nrpm = -1", "t.toml:2: limits.ip.rpm: -1 is not between"),
        ("[limits.models.'']\nrpm = 1", "limits.models.\"\": \"\" is not a model: write a name, or a pattern with *"),
        ("[limits.models.'gpt 4']\nrpm = 1", "t.toml:1: limits.models.\"gpt 4\": \"gpt 4\" is not a model"),
        ("[limits.models.'a=b']\nrpm = 1", "\"a=b\" is not a model"),
        ("[limits.models]\n'gpt-4o' = 1", "limits.models.\"gpt-4o\": must be a section, not a whole number"),
        ("[limits.models.m]\nrpm = -1", "t.toml:2: limits.models.\"m\".rpm: -1 is not between"),
        (
            "[models.m]\naliases = ['smart']\n[limits.models.smart]\nrpm = 1",
            "t.toml:3: limits.models.\"smart\": \"smart\" is an alias: limit the model by its proper name, \"m\"",
        ),
        ("[limits]\nassumed_output_tokens = 0", "limits.assumed_output_tokens: 0 is not between 1 and 1000000"),
        ("[limits]\nassumed_output_tokens = 1000001", "1000001 is not between 1 and 1000000"),
        ("[limits.gate]\nrequests_per_second = 1000001", "limits.gate.requests_per_second: 1000001 is not between 0"),
        ("[limits.gate]\nfailed_keys_per_minute = -1", "limits.gate.failed_keys_per_minute: -1 is not between 0"),
        ("[limits]\nip = 600", "t.toml:2: limits.ip: must be a section, [ip], not a whole number"),
    ];
    for (text, expected) in cases {
        let found = problems(text);
        assert!(found.contains(expected) && found.lines().count() == 1, "{text}: {found}");
    }
}

#[test]
fn redis_is_named_by_its_url() {
    let limiter = |text: &str| read(&format!("[limiter]\n{text}\n")).unwrap().limiter;
    let both =
        limiter("redis = 'rediss://:${OPENAI_API_KEY}@a, rediss://:${OPENAI_API_KEY}@b'\non_redis_down = 'deny'");
    let expected = "rediss://:sk-from-the-environment@a,rediss://:sk-from-the-environment@b";
    assert_eq!((both.redis.unwrap().expose(), both.on_redis_down), (expected, OnRedisDown::Deny));
    assert!(limiter("redis = 'unix:///run/redis.sock'").redis.is_some());
    for (text, expected) in [
        ("redis = 'localhost:6379'", "t.toml:2: limiter.redis: is not the URL of a Redis: write \"redis://host:6379\""),
        ("redis = 'http://:hunter2@h'", "limiter.redis: is not the URL of a Redis"),
        ("redis = 'redis://:hunter2/x@h'", "limiter.redis: names no host"),
        ("redis = 'redis://:hunter2@h:x'", "limiter.redis: has no port"),
        ("redis = 'redis://:hunter2@a,redis://b'", "limiter.redis: must have the same scheme, user and password"),
        ("redis = 'redis://${OPENAI_API_KEY}@'", "limiter.redis: names no host"),
        ("redis = '${NO_SUCH_URL}'", "limiter.redis: the environment variable NO_SUCH_URL is not set"),
        ("redis = 6379", "limiter.redis: must be a text"),
        ("on_redis_down = 'allow'", "t.toml:2: limiter.on_redis_down: \"allow\" is not a choice: use \"local\" or"),
    ] {
        let found = problems(&format!("[limiter]\n{text}\n"));
        assert!(found.contains(expected) && found.lines().count() == 1, "{text}: {found}");
        assert!(!found.contains("hunter2") && !found.contains("sk-from"), "{text}: {found}");
    }
    let unused = warnings("[limiter]\non_redis_down = 'deny'\n");
    assert!(unused.contains("t.toml:2: limiter.on_redis_down: is not used"), "{unused}");
    assert_eq!(warnings("[limiter]\nredis = 'redis://h'\non_redis_down = 'deny'\n"), "");
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
    let text = upstream("") + "[store]\nurl = 'postgres://u:hunter2@h/d'\n[limiter]\nredis = 'redis://:hunter2@h'\n";
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
fn a_credential_may_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("openai");
    let with = |more: &str| {
        format!(
            "[[upstream]]\nname = 'a'\nbase_url = 'https://a.example/v1'\ncredential_file = '{}'\n{more}",
            path.display()
        )
    };
    fs::write(&path, "sk-in-a-file\n").unwrap();
    let config = read(&with("")).unwrap();
    let secret = Secret::new("sk-in-a-file".into());
    assert_eq!(config.upstreams[0].credential, CredentialSource::File { path: path.clone(), secret });
    assert_eq!(config.warnings, []);
    let shown = format!("{config:?}");
    assert!(shown.contains(&format!("File({path:?})")) && !shown.contains("sk-in"), "{shown}");

    let both = problems(&with("credential = '${OPENAI_API_KEY}'"));
    let says = "t.toml:4: upstream[0].credential_file: stands beside credential: every [[upstream]] has one of both";
    assert_eq!(both, says);
    assert!(problems("[[upstream]]\n").contains("upstream[0].credential: is missing: every [[upstream]] needs one"));
    for (content, says) in [
        ("", "/openai is empty: write the provider's secret into it"),
        ("sk-in a-file", "/openai contains white space or characters that cannot be sent in a header"),
    ] {
        fs::write(&path, content).unwrap();
        let found = problems(&with(""));
        assert!(found.contains(&format!("upstream[0].credential_file: {}", dir.path().display())), "{found}");
        assert!(found.contains(says) && !found.contains("sk-in") && found.lines().count() == 1, "{found}");
    }
    fs::remove_file(&path).unwrap();
    assert!(problems(&with("")).contains("/openai cannot be read: No such file"));
    assert!(problems(&with("").replace("/openai", "")).contains("is no regular file: name the file"));
    assert!(problems("[[upstream]]\ncredential_file = ''\n").contains("upstream[0].credential_file: names no file"));
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
         limiter    memory of this process\n  upstream   a: openai at http://a.example/v1, weight 2; m=n\n  models     none described\n"
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
