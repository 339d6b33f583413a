//! The verbs of the command line, against SQLite: what they print, what they store, what they refuse.

use std::sync::Arc;

use clap::Parser;
use serde_json::{Value, json};
use tollgate::{
    args::Args,
    secrets::{FernetKeys, generate_key},
};
use tollgate_core::{
    key::{KEY_LEN, KeyHash},
    secret::Secret,
    upstream::{BaseUrl, Handling, Upstream, UpstreamKind},
};

use crate::support::{
    cli::Cli,
    upstream::{Answer, Upstream as Scripted},
};

#[tokio::test]
async fn init_makes_the_tables_and_one_token_and_can_be_repeated() {
    let cli = Cli::empty().await;
    let (error, code) = cli.fails("user list", "").await;
    assert!(error.contains("tollgate init") && code == 1, "{error}");

    let first = cli.json("init").await;
    assert!(first["admin_token"].as_str().is_some_and(|token| token.starts_with("tgadmin-") && token.len() == 51));
    let again = cli.json("init").await;
    assert_eq!(again["admin_token"], Value::Null);
    assert!(again["message"].as_str().unwrap().contains("--new-admin-token"), "{again}");
    let another = cli.json("init --new-admin-token").await;
    assert_ne!(another["admin_token"], first["admin_token"]);
    assert_eq!(cli.store.admin_tokens().await.unwrap().len(), 2);

    let other = Cli { fernet: FernetKeys::try_new([&generate_key()]).unwrap(), ..cli };
    let (error, code) = other.fails("init", "").await;
    assert!(error.contains("do not fit this database") && code == 1, "{error}");
}

#[tokio::test]
async fn a_user_is_created_shown_changed_and_disabled() {
    let cli = Cli::new().await;
    assert_eq!(cli.text("user create --name alice").await, "created user alice (id 1)\n");
    let bob = cli.json("user create --name bob --rpm 60 --tpm 0 --monthly-tokens 1000 --monthly-usd 12.5").await;
    let created_at = bob["created_at"].clone();
    assert_eq!(
        bob,
        json!({"id": 2, "name": "bob", "disabled": false, "rpm": 60, "tpm": 0, "concurrency": null,
               "monthly_tokens": 1000, "monthly_nano_usd": 12_500_000_000_u64, "audit_content": null, "created_at": created_at,
               "disabled_at": null})
    );
    assert_eq!(cli.json("user show bob").await, bob);
    assert_eq!(cli.json("user show 2").await, bob);
    assert_eq!(cli.json("user list").await[1], bob);
    let table = cli.text("user list").await;
    assert!(table.lines().nth(2).is_some_and(|line| line.contains("bob") && line.contains("12.50")), "{table}");

    let carol = cli.json("user update bob --name carol --rpm default --concurrency 3").await;
    assert_eq!((&carol["name"], &carol["rpm"], &carol["concurrency"]), (&json!("carol"), &Value::Null, &json!(3)));
    assert_eq!(carol["monthly_tokens"], 1000, "what is not named stays");
    let carol = cli.json("user update carol --monthly-tokens default --monthly-usd 0").await;
    assert_eq!((&carol["monthly_tokens"], &carol["monthly_nano_usd"]), (&Value::Null, &json!(0)));
    assert_eq!(cli.json("user disable 2").await["disabled"], true);
    assert_eq!(cli.json("user enable carol").await["disabled_at"], Value::Null);

    for (line, says, code) in [
        ("user create --name alice", "a user named \"alice\" exists already", 1),
        ("user create --name 7", "taken for an id", 1),
        ("user show nobody", "tollgate user list", 1),
        ("user update alice", "--help", 2),
    ] {
        let (error, exit) = cli.fails(line, "").await;
        assert!(error.contains(says) && exit == code, "{line}: {error} ({exit})");
    }
}

#[tokio::test]
async fn a_key_is_shown_once_and_stored_as_its_hash() {
    let cli = Cli::new().await;
    cli.text("user create --name alice").await;
    let made = cli
        .json("key create --user alice --name ci --models gpt-4o,o3* --allow-ip 10.0.0.0/8,::1 --rpm 5 --expires 30d")
        .await;
    let secret = made["key"].as_str().unwrap().to_owned();
    assert_eq!(secret.len(), KEY_LEN);
    assert!(secret.starts_with(made["prefix"].as_str().unwrap()) && secret.starts_with("tg-"));
    assert_eq!((&made["id"], &made["name"], &made["user"]), (&json!(1), &json!("ci"), &json!("alice")));
    assert_eq!((&made["models"], &made["state"]), (&json!(["gpt-4o", "o3*"]), &json!("live")));
    assert_eq!(made["allow_ip"], json!(["10.0.0.0/8", "::1/128"]));
    let directory = cli.store.changes_since(0).await.unwrap().keys;
    assert_eq!(directory[0].0, KeyHash::of(secret.as_bytes()));
    let expires = directory[0].1.expires_at.unwrap() - chrono::Utc::now();
    assert!((29..=30).contains(&expires.num_days()), "{expires}");

    for line in ["key show ci", "key list", "key list --user alice"] {
        let shown = cli.json(line).await.to_string() + &cli.text(line).await;
        assert!(!shown.contains(&secret) && shown.contains("ci"), "{line}: {shown}");
    }
    let changed = cli.json("key update alice/ci --models * --allow-ip any --expires never --tpm 9").await;
    assert_eq!((&changed["models"], &changed["allow_ip"]), (&json!(["*"]), &json!([])));
    assert_eq!((&changed["expires_at"], &changed["tpm"], &changed["rpm"]), (&Value::Null, &json!(9), &json!(5)));

    let rotated = cli.json("key rotate 1").await;
    assert_eq!((&rotated["id"], &rotated["name"]), (&json!(1), &json!("ci")));
    assert_ne!(rotated["key"], made["key"]);
    let directory = cli.store.changes_since(0).await.unwrap().keys;
    assert_eq!(directory[0].0, KeyHash::of(rotated["key"].as_str().unwrap().as_bytes()));

    assert_eq!(cli.json("key revoke ci").await["state"], "revoked");
    let text = cli.text("key create --user 1").await;
    assert!(text.starts_with("created key default of user alice (id 2, tg-"), "{text}");
    assert!(text.lines().nth(1).is_some_and(|line| line.len() == KEY_LEN), "{text}");

    for (line, says, code) in [
        ("key create --user nobody", "tollgate user list", 1),
        ("key create --user alice", "choose another name", 1),
        ("key create --user alice --name x --expires 2020-01-01", "in the past", 2),
        ("key create --user alice --name x --models a,,b", "is not a model", 1),
        ("key rotate ci", "revoked", 1),
        ("key update ci", "--help", 2),
        ("key show nothing", "tollgate key list", 1),
    ] {
        let (error, exit) = cli.fails(line, "").await;
        assert!(error.contains(says) && exit == code, "{line}: {error} ({exit})");
    }
}

#[tokio::test]
async fn a_key_has_limits_of_its_own_and_of_models() {
    let cli = Cli::new().await;
    cli.text("user create --name alice").await;
    let made = cli
        .json(
            "key create --user alice --name ci --rpm 5 --tpm 0 --monthly-tokens 9 --monthly-usd 1.5 \
             --model-limits gpt-4o=rpm:10,tpm:1000,monthly-usd:1.50 --model-limits o3*=concurrency:2,monthly-tokens:7",
        )
        .await;
    let models = json!([
        {"model": "gpt-4o", "rpm": 10, "tpm": 1000, "concurrency": null, "monthly_tokens": null,
         "monthly_nano_usd": 1_500_000_000},
        {"model": "o3*", "rpm": null, "tpm": null, "concurrency": 2, "monthly_tokens": 7, "monthly_nano_usd": null},
    ]);
    assert_eq!(made["model_limits"], models);
    let fields = ["rpm", "tpm", "concurrency", "monthly_tokens", "monthly_nano_usd"];
    let values = |key: &Value| fields.map(|field| key[field].clone());
    assert_eq!(values(&made), [json!(5), json!(0), Value::Null, json!(9), json!(1_500_000_000)]);
    assert_eq!(cli.json("key list").await[0]["model_limits"], models);
    let shown = cli.text("key show ci").await;
    let words = "gpt-4o=rpm:10,tpm:1000,monthly-usd:1.50 o3*=concurrency:2,monthly-tokens:7\n";
    assert!(shown.contains(words), "{shown}");
    assert!(cli.text("key list").await.contains("1.50"));

    let kept = cli.json("key update ci --rpm default --monthly-usd default --monthly-tokens 0").await;
    assert_eq!(values(&kept), [Value::Null, json!(0), Value::Null, json!(0), Value::Null]);
    assert_eq!(kept["model_limits"], models, "what is not named stays");
    let replaced = cli.json("key update ci --model-limits *=rpm:0").await;
    assert_eq!(replaced["model_limits"].as_array().unwrap().len(), 1);
    assert_eq!((&replaced["model_limits"][0]["model"], &replaced["model_limits"][0]["rpm"]), (&json!("*"), &json!(0)));
    let (hash, entry) = &cli.store.changes_since(0).await.unwrap().keys[0];
    assert_eq!((entry.model_limits.len(), entry.limits.tpm), (1, Some(0)), "{hash:?}");
    assert_eq!(cli.json("key update ci --model-limits none").await["model_limits"], json!([]));
    assert!(cli.text("key show ci").await.lines().any(|line| line.split_whitespace().eq(["model_limits", "-"])));

    for (line, says, code) in [
        ("key update ci --model-limits a=rpm:1 --model-limits a=tpm:1", "\"a\" is limited twice", 1),
        ("key update ci --model-limits a=rpm:1 --model-limits none", "stands alone", 2),
    ] {
        let (error, exit) = cli.fails(line, "").await;
        assert!(error.contains(says) && exit == code, "{line}: {error} ({exit})");
    }
    for (line, says) in [
        ("key update ci --tpm 1000000000000001", "it is more than 1000000000000000"),
        ("key update ci --monthly-usd 1000000.01", "it is more than 1000000 dollars"),
        ("user update alice --rpm 1.5", "it is not a whole number"),
        ("key update ci --model-limits gpt-4o=rps:1", "there are rpm, tpm, concurrency"),
    ] {
        let words = std::iter::once("tollgate").chain(line.split_whitespace());
        let error = Args::try_parse_from(words).expect_err(line).to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
}

fn in_file(name: &str) -> Arc<Upstream> {
    Arc::new(Upstream {
        id: None,
        name: name.to_owned(),
        kind: UpstreamKind::OpenAi,
        base_url: BaseUrl::parse("http://127.0.0.1:1/v1").unwrap(),
        credential: Secret::new("sk-in-file".to_owned()),
        models: Vec::new(),
        weight: 1,
        priority: 0,
        api_version: None,
        handling: Handling::default(),
        ca_pem: None,
        disabled: false,
    })
}

#[tokio::test]
async fn an_upstream_takes_its_credential_from_standard_input_or_the_environment() {
    let mut cli = Cli::new().await;
    let add = "upstream add --name main --models gpt-4o,a=b --weight 3";
    for (input, says) in [("", "is empty"), (" \n", "is empty"), ("sk 1\n", "white space"), ("sk-\u{e9}\n", "header")] {
        let (error, exit) = cli.fails(add, input).await;
        assert!(error.contains(says) && error.contains("standard input") && exit == 1, "{input:?}: {error}");
    }
    assert_eq!(
        cli.run(add, "  sk-one \nmore\n").await.unwrap(),
        "added upstream main (id 1, https://api.openai.com/v1)\n"
    );
    let stored = cli.store.find_upstream("main").await.unwrap();
    assert_eq!(cli.fernet.decrypt(&stored.spec.credential).unwrap().expose(), "sk-one");

    cli.environment = Some(Secret::new("sk-two".to_owned()));
    cli.run("upstream update 1 --weight 4", "").await.unwrap();
    let credential = cli.store.find_upstream("main").await.unwrap().spec.credential;
    assert_eq!(credential, stored.spec.credential, "a credential changes only when that is asked for");
    let shown = cli.json("upstream update main --new-credential --name first").await;
    assert_eq!(
        (&shown["name"], &shown["weight"], &shown["models"]),
        (&json!("first"), &json!(4), &json!(["gpt-4o", "a=b"]))
    );
    let credential = cli.store.find_upstream("first").await.unwrap().spec.credential;
    assert_eq!(cli.fernet.decrypt(&credential).unwrap().expose(), "sk-two");
    let printed = cli.text("upstream list").await + &cli.json("upstream show 1").await.to_string();
    assert!(!printed.contains("sk-") && !printed.contains("gAAAA"), "{printed}");

    assert_eq!(cli.json("upstream disable first").await["disabled"], true);
    assert_eq!(cli.json("upstream enable first").await["disabled"], false);
    cli.text("upstream remove first").await;
    assert_eq!(cli.json("upstream list").await, json!([]));
    let (error, exit) = cli.fails("upstream add --name az --kind azure", "").await;
    assert!(error.contains("--base-url") && exit == 2, "{error}");
}

#[tokio::test]
async fn an_upstream_is_handled_as_it_is_told() {
    let mut cli = Cli::new().await;
    let added = "upstream add --name main --connect-timeout 500ms --total-timeout 0s --rpm 500 --probe-interval 30s";
    cli.run(added, "sk-1").await.unwrap();
    let handling = async |cli: &Cli| cli.json("upstream show main").await["handling"].clone();
    let said = json!({"connect_timeout_ms": 500, "total_timeout_ms": 0, "rpm": 500, "probe_interval_ms": 30_000});
    assert_eq!(handling(&cli).await, said);
    assert_eq!(cli.json("upstream list").await[0]["handling"], said);
    let shown = cli.text("upstream show main").await;
    let line = "handling     connect_timeout=500ms total_timeout=0s rpm=500 probe_interval=30s";
    assert!(shown.lines().any(|shown| shown.trim_end() == line), "{shown}");
    let detail: Value = serde_json::from_str(&cli.store.admin_log(1).await.unwrap()[0].detail).unwrap();
    assert_eq!(detail["handling"], said, "who looks for a cause finds it in the log of changes");

    let update = "upstream update main --rpm default --tpm 0 --first-byte-timeout 2m --chunk-timeout 30s";
    let updated = cli.json(update).await;
    let now = json!({"connect_timeout_ms": 500, "first_byte_timeout_ms": 120_000, "chunk_timeout_ms": 30_000,
                     "total_timeout_ms": 0, "tpm": 0, "probe_interval_ms": 30_000});
    assert_eq!(updated["handling"], now, "what is not named stays");
    let stored = cli.store.find_upstream("main").await.unwrap();
    let seen = stored.to_upstream(Secret::default(), Handling { rpm: 7, tpm: 9, ..Handling::default() }).handling;
    assert_eq!((seen.rpm, seen.tpm, seen.timeouts.total), (7, 0, None));
    let all = "connect first-byte chunk total".split(' ').map(|name| format!("--{name}-timeout default"));
    let all = all.chain(["--tpm default --probe-interval default".to_owned()]).collect::<Vec<_>>().join(" ");
    assert_eq!(cli.json(&format!("upstream update main {all}")).await["handling"], json!({}));
    assert!(cli.text("upstream show main").await.contains("handling     -"));

    let in_file = Upstream { handling: Handling { rpm: 3, ..Handling::default() }, ..(*in_file("fixed")).clone() };
    cli.file_upstreams = vec![Arc::new(in_file)];
    assert_eq!(cli.json("upstream show fixed").await["handling"], json!({"rpm": 3}));
}

#[tokio::test]
async fn without_a_gateway_its_view_is_not_known() {
    let mut cli = Cli::new().await;
    cli.run("upstream add --name main", "sk-1").await.unwrap();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (admin, silence) in
        [(None, "admin_listen is off".to_owned()), (Some(gone), format!("no gateway answers at {gone}"))]
    {
        cli.admin = admin;
        let row = cli.json("upstream list").await[0].clone();
        assert_eq!((&row["state"], &row["in_flight"]), (&Value::Null, &Value::Null));
        let table = cli.text("upstream list").await;
        assert!(table.lines().next().is_some_and(|line| line.ends_with("disabled  state  in_flight")), "{table}");
        assert!(table.lines().nth(1).is_some_and(|line| line.ends_with("-      -")), "{table}");
        let drained = cli.text("upstream drain main").await;
        assert!(drained.starts_with("disabled upstream main (id 1,") && drained.contains(&silence), "{drained}");
        let drained = cli.json("upstream drain 1").await;
        assert_eq!((&drained["disabled"], &drained["drained"]), (&json!(true), &Value::Null));
        assert_eq!(drained["in_flight"], Value::Null);
    }
    let changes = cli.store.admin_log(9).await.unwrap();
    assert_eq!(changes.iter().filter(|row| row.action == "upstream.update").count(), 1, "it was disabled once");
    assert!(cli.fails("upstream drain nothing", "").await.0.contains("tollgate upstream list"));
}

#[tokio::test]
async fn upstreams_of_the_file_are_listed_but_changed_there() {
    let mut cli = Cli::new().await;
    cli.file_upstreams = vec![in_file("fixed")];
    cli.run("upstream add --name main", "sk-1").await.unwrap();
    let list = cli.json("upstream list").await;
    assert_eq!((&list[0]["name"], &list[0]["source"], &list[0]["id"]), (&json!("fixed"), &json!("file"), &Value::Null));
    assert_eq!((&list[1]["name"], &list[1]["source"]), (&json!("main"), &json!("database")));
    assert_eq!(cli.json("upstream show fixed").await["source"], "file");
    let drain = "upstream drain fixed";
    for line in ["upstream disable fixed", "upstream remove fixed", "upstream update fixed --weight 2", drain] {
        assert!(cli.fails(line, "").await.0.contains("comes from the config file"), "{line}");
    }
    assert!(cli.fails("upstream add --name fixed", "sk-1").await.0.contains("config file"));
    assert!(cli.fails("upstream show nothing", "").await.0.contains("tollgate upstream list"));
}

#[tokio::test]
async fn testing_an_upstream_asks_for_its_models_with_its_credential() {
    let cli = Cli::new().await;
    let list = json!({"object": "list", "data": [{"id": "gpt-4o"}, {"id": "o3"}]});
    let refusal = json!({"error": {"message": "Incorrect API key provided: sk-right"}});
    let upstream =
        Scripted::without_list([Answer::json(200, &list), Answer::json(401, &refusal), Answer::json(200, &list)]);
    let base = format!("http://{}", upstream.addr());
    cli.run(&format!("upstream add --name main --base-url {base}/v1"), "sk-right").await.unwrap();
    let tested = cli.json("upstream test main").await;
    assert_eq!((&tested["ok"], &tested["models"]), (&json!(true), &json!(["gpt-4o", "o3"])));
    assert!(tested["latency_ms"].is_u64());
    assert_eq!((&tested["account"], &tested["limits"], &tested["error"]), (&json!("ok"), &Value::Null, &Value::Null));
    let (error, exit) = cli.fails("upstream test main", "").await;
    assert!(error.contains("401") && error.contains("--new-credential") && exit == 1, "{error}");
    assert!(!error.contains("sk-right"), "{error}");
    cli.run(&format!("upstream add --name az --kind azure --base-url {base}"), "azure-key").await.unwrap();
    cli.text("upstream test az").await;

    let received = upstream.wait_for(3).await;
    assert_eq!(received[0].target, "/v1/models");
    assert_eq!(received[0].header("authorization"), Some("Bearer sk-right"));
    assert!(received[2].target.starts_with("/openai/models?api-version="), "{}", received[2].target);
    assert_eq!((received[2].header("api-key"), received[2].header("authorization")), (Some("azure-key"), None));
}

#[tokio::test]
async fn testing_an_upstream_tells_how_the_account_stands() {
    let cli = Cli::new().await;
    let list = json!({"object": "list", "data": [{"id": "gpt-4o"}]});
    let error = |code: &str| json!({"error": {"message": "no", "type": code, "code": code}});
    let limited = |answer: Answer| {
        let answer = answer.header("x-ratelimit-limit-requests", "500").header("x-ratelimit-reset-requests", "120ms");
        answer.header("x-ratelimit-remaining-requests", "499").header("x-ratelimit-remaining-tokens", "7")
    };
    let upstream = Scripted::without_list([
        limited(Answer::json(200, &list)),
        limited(Answer::json(200, &list)),
        Answer::json(401, &error("invalid_api_key")),
        Answer::json(403, &error("unsupported_country_region_territory")),
        limited(Answer::json(429, &error("rate_limit_exceeded"))),
        Answer::json(429, &error("insufficient_quota")),
        Answer::json(500, &error("server_error")),
        Answer::text(200, "text/html", "<html>sk-1</html>"),
    ]);
    cli.run(&format!("upstream add --name main --base-url {}", upstream.base_url()), "sk-1").await.unwrap();
    let limits = json!({"requests": {"limit": 500, "remaining": 499, "reset_ms": 120},
                        "tokens": {"limit": null, "remaining": 7, "reset_ms": null}});
    assert_eq!(cli.json("upstream test main").await["limits"], limits);
    let text = cli.text("upstream test main").await;
    let account = "account: ok; requests: 499 of 500 left, all again in 120ms; tokens: 7 left";
    assert_eq!(text.lines().nth(1), Some(account), "{text}");
    for (account, says) in [
        (json!("refused"), "the credential is not accepted; renew it with `tollgate upstream update --new-credential`"),
        (json!("refused"), "the credential may not do this"),
        (json!("rate_limited"), "the account is at its rate limit"),
        (json!("exhausted"), "the quota of the account is used up"),
        (Value::Null, "the provider cannot answer now"),
        (Value::Null, "this is no list of models"),
    ] {
        let (printed, error, exit) = cli.fails_with("upstream test main --json", "").await;
        let object: Value = serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
        assert_eq!((&object["ok"], &object["models"], &object["account"]), (&json!(false), &Value::Null, &account));
        assert!(object["latency_ms"].is_u64() && object["error"].as_str().is_some_and(|text| text.contains(says)));
        assert!(error.contains(says) && exit == 1, "{error} ({exit})");
        assert!(!printed.contains("sk-1") && !error.contains("sk-1"), "{printed} {error}");
        let expected = if account == json!("rate_limited") { limits.clone() } else { Value::Null };
        assert_eq!(object["limits"], expected);
    }
}

#[tokio::test]
async fn an_upstream_that_cannot_be_reached_says_why() {
    let mut cli = Cli::new().await;
    cli.file_upstreams = vec![in_file("refused")];
    let (printed, error, exit) = cli.fails_with("upstream test refused --json", "").await;
    let object: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&object["ok"], &object["account"], exit), (&json!(false), &Value::Null, 1));
    assert!(error.contains("nothing listens there"), "{error}");
    cli.run("upstream add --name lost --base-url http://no.such.host.invalid/v1", "sk-1").await.unwrap();
    let (error, _) = cli.fails("upstream test lost", "").await;
    assert!(error.contains("no.such.host.invalid") && error.contains("cannot be resolved"), "{error}");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let plain = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 16]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    cli.run(&format!("upstream add --name plain --base-url https://{plain}/v1"), "sk-1").await.unwrap();
    let (error, _) = cli.fails("upstream test plain", "").await;
    assert!(error.contains("TLS failed"), "{error}");
    let other = Scripted::without_list(Answer::json(200, &json!({"hello": 1})));
    cli.run(&format!("upstream update plain --base-url http://{}", other.addr()), "").await.unwrap();
    let (error, _) = cli.fails("upstream test plain", "").await;
    assert!(error.contains("no list of models"), "{error}");
}

#[tokio::test]
async fn usage_and_audit_show_what_was_recorded() {
    let cli = Cli::new().await;
    cli.text("user create --name alice").await;
    cli.text("key create --user alice --name ci").await;
    cli.store
        .write_usage([
            crate::store::record(1, "2026-11-22T10:00:00Z"),
            crate::store::record(2, "2026-11-23T23:59:59Z"),
            tollgate_core::usage::UsageRecord { status: 429, ..crate::store::record(3, "2026-11-24T00:00:00.5Z") },
        ])
        .await
        .unwrap();
    let sums = |n: i64| {
        json!({"requests": n, "prompt_tokens": 10 * n, "completion_tokens": 5 * n,
                               "total_tokens": 15 * n, "cached_tokens": 4 * n, "cost_nano_usd": 1000 * n})
    };
    let row = |about: Value, n: i64| {
        let mut row = about;
        row.as_object_mut().unwrap().extend(sums(n).as_object().unwrap().clone());
        row
    };
    assert_eq!(cli.json("usage").await, json!([row(json!({"month": "2026-11"}), 3)]));
    assert_eq!(cli.json("usage --by user").await, json!([row(json!({"user": "alice", "user_id": 1}), 3)]));
    assert_eq!(
        cli.json("usage --by key --until 2026-11-23").await,
        json!([row(json!({"key": "ci", "key_id": 1, "user": "alice"}), 2)]),
        "the last day is included"
    );
    assert_eq!(
        cli.json("usage --by day --since 2026-11-23 --until 2026-11-23").await,
        json!([row(json!({"day": "2026-11-23"}), 1)])
    );
    assert!(cli.text("usage --by upstream").await.contains("main"));
    assert!(cli.text("usage --by model").await.starts_with("model "));

    let all = cli.json("audit").await;
    assert_eq!(all.as_array().unwrap().len(), 3);
    assert_eq!(all[0]["request_id"], "00000000-0000-0000-0000-000000000003", "newest first");
    assert_eq!((&all[0]["user"], &all[0]["key"], &all[0]["status"]), (&json!("alice"), &json!("ci"), &json!(429)));
    assert_eq!(all[0]["attempts"][0]["upstream"], "main");
    assert_eq!(all[0]["started_at"], "2026-11-24T00:00:00.500000Z");
    let count = async |line: &str| cli.json(line).await.as_array().unwrap().len();
    assert_eq!(count("audit --limit 2").await, 2);
    assert_eq!(count("audit --status 200").await, 2);
    assert_eq!(count("audit --user alice --key alice/ci --model gpt-4o").await, 3);
    assert_eq!(count("audit --since 2026-11-23 --until 2026-11-23").await, 1);
    assert!(cli.fails("audit --user nobody", "").await.0.contains("tollgate user list"));
    assert!(cli.text("audit").await.lines().nth(1).is_some_and(|line| line.contains("429")));
}

#[tokio::test]
async fn following_the_log_prints_rows_as_they_come_once() {
    let cli = Arc::new(Cli::new().await);
    let now = chrono::Utc::now();
    let record = |n: u128, seconds: i64| tollgate_core::usage::UsageRecord {
        started_at: now - chrono::TimeDelta::seconds(seconds),
        ..crate::store::record(n, "2026-11-23T00:00:00Z")
    };
    cli.store.write_usage([record(1, 30), record(2, 20)]).await.unwrap();
    let out = Shared::default();
    let mut to = out.clone();
    let following = async { cli.run_into("audit --follow --json", "", &mut to).await.unwrap() };
    let writing = async {
        while out.ids().len() < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        // One that began before those that are printed already.
        cli.store.write_usage([record(3, 25)]).await.unwrap();
        while out.ids().len() < 3 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    };
    tokio::select! { () = following => panic!("it ends only when nobody reads"), () = writing => {} }
    assert_eq!(out.ids(), ["1", "2", "3"]);
}

/// An output that can be read while it is written.
#[derive(Clone, Default)]
struct Shared(Arc<std::sync::Mutex<Vec<u8>>>);

impl Shared {
    /// The last digits of the request ids on the lines so far.
    fn ids(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let id =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["request_id"].as_str().unwrap()[35..].to_owned();
        text.lines().map(id).collect()
    }
}

impl std::io::Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn output_that_nobody_reads_any_more_is_no_failure() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let cli = Cli::new().await;
    for line in ["user list", "audit --json", "upstream list"] {
        cli.run_into(line, "", &mut Closed).await.unwrap();
    }
}

#[tokio::test]
async fn secrets_are_generated_and_encrypted_for_the_config_file() {
    let cli = Cli::new().await;
    let key = cli.json("secret generate").await["fernet_key"].as_str().unwrap().to_owned();
    FernetKeys::parse(&Secret::new(key)).expect("a generated key is a key");
    let text = cli.run("secret encrypt", "sk-1\n").await.unwrap();
    let ciphertext = text.trim_end().strip_prefix("fernet:").unwrap();
    assert_eq!(cli.fernet.decrypt(ciphertext).unwrap().expose(), "sk-1");
    assert!(cli.fails("secret encrypt", "").await.0.contains("is empty"));
}

#[tokio::test]
async fn changes_are_logged_with_their_author() {
    let cli = Cli::new().await;
    cli.text("user create --name alice").await;
    cli.run("upstream add --name main", "sk-1").await.unwrap();
    let log = cli.store.admin_log(9).await.unwrap();
    let seen: Vec<_> = log.iter().map(|row| (row.action.as_str(), row.actor.as_str())).collect();
    assert_eq!(seen, ["upstream.add", "user.create", "admin_token.create"].map(|action| (action, "cli:test")));
}
