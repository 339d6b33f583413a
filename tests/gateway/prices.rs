//! What requests cost: by the price that holds when they begin, wherever it comes from.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tollgate::store::{AuditRow, KeySpec};
use tollgate_core::{
    limit::Limits,
    price::{Price, Rates},
    snapshot::ModelInfo,
};

use crate::support::{
    cli::Cli,
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, chat_stream, event},
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
/// Between two questions whether a price is known.
const PAUSE: Duration = Duration::from_millis(50);

fn asking(model: &str) -> Value {
    let mut body = chat();
    body["model"] = json!(model);
    body
}

/// An answer with this usage, and more members.
fn using(usage: &Value, more: &Value) -> Answer {
    let mut answer = json!({ "id": "c1", "object": "chat.completion", "usage": usage,
        "choices": [{ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": "hi" } }] });
    answer.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Answer::json(200, &answer)
}

fn thousand() -> Answer {
    using(&json!({ "prompt_tokens": 1000, "completion_tokens": 1000 }), &json!({}))
}

/// The row of the last request.
async fn last(gateway: &Gateway, count: usize) -> AuditRow {
    gateway.rows(count).await.remove(0)
}

#[tokio::test]
async fn what_is_shipped_holds_for_models_and_their_snapshots() {
    let upstream = Upstream::start(thousand());
    let gateway = Gateway::before(&upstream.base_url());
    for (n, (model, cost)) in [
        ("gpt-4o", 2_500_000 + 10_000_000),
        ("gpt-4o-2024-08-06", 2_500_000 + 10_000_000),
        ("gpt-4o-2024-05-13", 5_000_000 + 15_000_000),
        ("gpt-4o-mini-2099-01-01", 150_000 + 600_000),
        ("nobody-knows", 0),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(gateway.ask(CHAT, &asking(model)).await.status, 200);
        let row = last(&gateway, n + 1).await;
        assert_eq!((row.model.as_str(), row.cost_nano_usd), (model, cost));
    }
    let unpriced = |model: &str| format!("tollgate_unpriced_requests_total{{model=\"{model}\"}}");
    assert_eq!(gateway.metric(&unpriced("nobody-knows")).await, 1.0);
    assert_eq!(gateway.metric(&unpriced("gpt-4o")).await, 0.0);
}

#[tokio::test]
async fn every_kind_of_token_and_the_tier_are_in_the_row_and_in_the_cost() {
    let usage = json!({ "prompt_tokens": 1000, "completion_tokens": 100,
        "prompt_tokens_details": { "cached_tokens": 300, "cache_write_tokens": 200, "audio_tokens": 100, "image_tokens": 50 },
        "completion_tokens_details": { "reasoning_tokens": 30, "audio_tokens": 20, "image_tokens": 7 } });
    let more = |tier: &str| json!({ "model": "m-2026-01-01", "service_tier": tier });
    let streamed =
        json!({ "id": "c1", "choices": [], "model": "m-2026-01-01", "service_tier": "flex", "usage": usage });
    let upstream = Upstream::start([
        using(&usage, &more("default")),
        using(&usage, &more("priority")),
        Answer::sse([event("a", Some("null")), format!("data: {streamed}\n\n"), DONE.to_owned()]),
    ]);
    let prices = "[models.\"gpt-4o\"]\ninput_usd_per_mtok = 2\noutput_usd_per_mtok = 10\ncached_input_usd_per_mtok = 0.1\n\
        cache_write_usd_per_mtok = 2.5\naudio_input_usd_per_mtok = 32\naudio_output_usd_per_mtok = 64\n\
        image_input_usd_per_mtok = 5\nimage_output_usd_per_mtok = 40\nflex = { percent = 50 }\npriority = { percent = 200 }";
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), "").tables(prices).start();
    let usual = 300 * 100 + 200 * 2500 + 350 * 2000 + 100 * 32_000 + 50 * 5000 + 20 * 64_000 + 7 * 40_000 + 73 * 10_000;
    for (n, (body, tier, cost)) in
        [(chat(), "default", usual), (chat(), "priority", 2 * usual), (chat_stream(), "flex", usual / 2)]
            .into_iter()
            .enumerate()
    {
        gateway.ask(CHAT, &body).await;
        let row = last(&gateway, n + 1).await;
        assert_eq!((row.service_tier.as_deref(), row.cost_nano_usd), (Some(tier), cost));
        assert_eq!(row.served_model.as_deref(), Some("m-2026-01-01"));
        assert_eq!((row.prompt_tokens, row.completion_tokens, row.cached_tokens), (1000, 100, 300));
        assert_eq!((row.cache_write_tokens, row.reasoning_tokens), (200, 30));
        assert_eq!((row.audio_tokens, row.output_audio_tokens), (120, 20));
        assert_eq!((row.image_tokens, row.output_image_tokens, row.estimated), (57, 7, false));
    }
    assert_eq!(gateway.metric("tollgate_tokens_total{kind=\"image\",model=\"gpt-4o\"}").await, 171.0);
}

#[tokio::test]
async fn a_client_that_hangs_up_pays_in_the_tier_it_asked_for() {
    let first = json!({ "model": "m-1", "choices": [{ "index": 0, "delta": { "content": "one two three" } }] });
    let upstream = Upstream::start(Answer::sse([format!("data: {first}\n\n")]).never_end());
    let prices = "[models.\"gpt-4o\"]\ninput_usd_per_mtok = 2\noutput_usd_per_mtok = 10\nflex = { percent = 50 }";
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), "").tables(prices).start();
    let mut body = chat_stream();
    body["service_tier"] = json!("flex");
    let request = gateway.post(CHAT).body_content_length(body.to_string());
    let mut response = request.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_ok());
    drop(response);
    upstream.wait_for_hang_ups(1).await;
    let row = last(&gateway, 1).await;
    assert_eq!((row.served_model.as_deref(), row.service_tier.as_deref(), row.estimated), (Some("m-1"), None, true));
    assert_eq!((row.prompt_tokens, row.completion_tokens, row.cost_nano_usd), (9, 3, 9 * 1000 + 3 * 5000));
}

#[tokio::test]
async fn absurd_usage_breaks_nothing_and_is_not_believed() {
    let absurd = [
        json!({ "prompt_tokens": 9_223_372_036_854_775_808_u64, "completion_tokens": 1 }),
        json!({ "prompt_tokens": 1e300, "completion_tokens": 1 }),
        json!({ "prompt_tokens": -5, "completion_tokens": 1 }),
        json!({ "prompt_tokens": "7", "completion_tokens": 1 }),
        json!({ "prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": { "image_tokens": -1 } }),
        json!({ "prompt_tokens": 1, "completion_tokens": 1, "completion_tokens_details": { "audio_tokens": 1e300 } }),
        json!([1, 2]),
        json!("many"),
    ];
    let (mut next, script) = (0, absurd.clone());
    let upstream = Upstream::start(Script::by(move |request| {
        let (usage, body) = (&script[next / 2], serde_json::from_slice::<Value>(&request.body).unwrap());
        next += 1;
        if body["stream"] == json!(true) {
            let last = json!({ "choices": [], "usage": usage });
            return Answer::sse([event("hi", Some("null")), format!("data: {last}\n\n"), DONE.to_owned()]);
        }
        using(usage, &json!({ "model": [], "service_tier": 7 }))
    }));
    let gateway = Gateway::before(&upstream.base_url());
    for _ in &absurd {
        for body in [chat(), chat_stream()] {
            let answer = gateway.ask(CHAT, &body).await;
            assert_eq!((answer.status.as_u16(), answer.error), (200, None));
        }
    }
    let rows = gateway.rows(2 * absurd.len()).await;
    for row in rows {
        assert!(row.estimated && row.prompt_tokens < 20 && row.completion_tokens < 20, "{row:?}");
        assert_eq!((row.served_model, row.service_tier), (None, None));
    }
}

/// A file that says what `gpt-4o` costs.
fn file(effective: &str, input: &str) -> String {
    let effective = if effective.is_empty() { String::new() } else { format!("effective = \"{effective}\"\n") };
    format!("{effective}[models.\"gpt-4o\"]\ninput_usd_per_mtok = {input}\noutput_usd_per_mtok = 0\n")
}

/// Asks until the newest row costs `cost`; gives how many rows there are then.
async fn until_it_costs(gateway: &Gateway, model: &str, mut rows: usize, cost: i64) -> usize {
    let start = Instant::now();
    loop {
        gateway.ask(CHAT, &asking(model)).await;
        rows += 1;
        if last(gateway, rows).await.cost_nano_usd == cost {
            return rows;
        }
        assert!(start.elapsed() < PATIENCE, "the price is not seen");
        tokio::time::sleep(PAUSE).await;
    }
}

#[tokio::test]
async fn a_running_gateway_learns_prices_and_history_stays() {
    let upstream = Upstream::start(thousand());
    let gateway = Gateway::before(&upstream.base_url());
    let cli = Cli::beside(&gateway).await;
    let rows = until_it_costs(&gateway, "gpt-4o", 0, 12_500_000).await;
    let before: Vec<_> = gateway.rows(rows).await.iter().map(|row| row.cost_nano_usd).collect();

    cli.run("prices import", &file("", "7")).await.unwrap();
    let rows = until_it_costs(&gateway, "gpt-4o", rows, 7_000_000).await;
    // What is known early waits for its day, and what comes late changes nothing that is booked.
    cli.run("prices import", &file("2099-01-01", "900")).await.unwrap();
    cli.run("prices import", &file("2001-01-01", "3")).await.unwrap();
    cli.run("prices import --effective 2002-01-01T00:00:00Z", &file("2099-01-01", "4")).await.unwrap();
    // Who has seen this one has seen those before it.
    cli.run("prices import", &file("", "5").replace("gpt-4o", "marker")).await.unwrap();
    let rows = until_it_costs(&gateway, "marker", rows, 5_000_000).await + 1;
    gateway.ask(CHAT, &chat()).await;
    assert_eq!(last(&gateway, rows).await.cost_nano_usd, 7_000_000);
    let all: Vec<_> = gateway.rows(rows).await.iter().map(|row| row.cost_nano_usd).collect();
    assert_eq!(&all[all.len() - before.len()..], before, "no row that was there has changed");

    let list = cli.json("prices list --model gpt-4o --all").await;
    let prices = list.as_array().unwrap();
    let inputs: Vec<_> = prices.iter().map(|price| price["input_usd_per_mtok"].clone()).collect();
    assert_eq!(inputs, [json!(3), json!(4), json!(7), json!(900)]);
    assert_eq!(cli.json("prices list --model gpt-4o").await.as_array().unwrap().len(), 2, "now, and to come");
    // A correction takes the place of what was said for the same time.
    cli.run("prices import", &file("2099-01-01", "800")).await.unwrap();
    let list = cli.json("prices list --model gpt-4o-2024-08-06").await;
    assert_eq!(list[1]["input_usd_per_mtok"], json!(800), "a snapshot shows what holds for it");
}

#[tokio::test]
async fn the_config_file_goes_before_the_database() {
    let upstream = Upstream::start(thousand());
    let prices = "[models.\"gpt-4o\"]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 0\naliases = [\"smart\"]";
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), "").tables(prices).start();
    let mut cli = Cli::beside(&gateway).await;
    let price = Some(Arc::new(Price::of(Rates::flat(1_000_000, 0))));
    cli.models = [("gpt-4o".to_owned(), ModelInfo { price, ..ModelInfo::default() })].into();
    let text = "[models.\"gpt-4o\"]\ninput_usd_per_mtok = 50\noutput_usd_per_mtok = 50\n\
        [models.\"other\"]\ninput_usd_per_mtok = 3\noutput_usd_per_mtok = 0\n";
    let done = cli.run("prices import --json", text).await.unwrap();
    let done: Value = serde_json::from_str(&done).unwrap();
    assert_eq!((&done["imported"], &done["hidden_by_config"]), (&json!(2), &json!(["gpt-4o"])));
    let mut rows = until_it_costs(&gateway, "other", 0, 3_000_000).await;
    for asked in ["gpt-4o", "smart"] {
        gateway.ask(CHAT, &asking(asked)).await;
        rows += 1;
        assert_eq!(last(&gateway, rows).await.cost_nano_usd, 1_000_000, "{asked}");
    }
    let list = cli.json("prices list").await;
    let of = |model: &str| list.as_array().unwrap().iter().find(|row| row["model"] == json!(model)).unwrap().clone();
    assert_eq!((&of("gpt-4o")["source"], &of("other")["source"]), (&json!("config"), &json!("database")));
    assert_eq!(of("gpt-4.1")["source"], json!("shipped"));
}

#[tokio::test]
async fn a_quota_of_dollars_goes_by_shipped_and_imported_prices_before_anything_is_sent() {
    let upstream = Upstream::start(thousand());
    let limits = Limits { monthly_nano_usd: Some(50_000_000), ..Limits::default() };
    let key = KeySpec { limits, ..KeySpec::default() };
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), "").key(key).start();
    let with = |model: &str, max_tokens: u64, tier: &str| {
        let mut body = asking(model);
        (body["max_tokens"], body["service_tier"]) = (json!(max_tokens), json!(tier));
        body
    };
    // Ten thousand tokens of an answer of gpt-4o may cost ten cents, and half of that would just do.
    for (body, status) in [
        (with("gpt-4o", 10_000, "default"), 429),
        (with("gpt-4o", 2_900, "priority"), 200),
        (with("gpt-4o", 2_900, "priority"), 429),
        (with("free", 10_000, "default"), 200),
    ] {
        let answer = gateway.ask(CHAT, &body).await;
        assert_eq!(answer.status, status, "{body}");
        if status == 429 {
            assert_eq!(answer.json()["error"]["code"], "insufficient_quota");
        }
    }
    assert_eq!(upstream.received().len(), 2, "what is refused is not sent");
    let cli = Cli::beside(&gateway).await;
    let price = "[models.\"free\"]\ninput_usd_per_mtok = 0\noutput_usd_per_mtok = 900000\n";
    cli.run("prices import", price).await.unwrap();
    let start = Instant::now();
    while gateway.ask(CHAT, &with("free", 10_000, "default")).await.status != 429 {
        assert!(start.elapsed() < PATIENCE, "the price is not seen");
        tokio::time::sleep(PAUSE).await;
    }
}

#[tokio::test]
async fn an_import_shows_what_changes_and_takes_all_or_nothing() {
    let cli = Cli::new().await;
    let text = "effective = \"2026-12-01\"\n[models.\"gpt-4o\"]\ninput_usd_per_mtok = 2\noutput_usd_per_mtok = 8\n\
        [models.\"new\"]\ninput_usd_per_mtok = 0.05\ncached_input_usd_per_mtok = 0.005\noutput_usd_per_mtok = 0.4\n\
        batch = { percent = 50 }\n";
    let dry = cli.run("prices import --dry-run", text).await.unwrap();
    assert!(dry.ends_with("2 prices would be imported: 1 new, 1 changed, 0 as before; 0 are there already\n"), "{dry}");
    let row = dry.lines().find(|line| line.starts_with("gpt-4o")).unwrap();
    let cells: Vec<_> = row.split_whitespace().collect();
    let differs =
        "audio_input,audio_output,batch,cache_write,cached_input,image_input,image_output,input,output,priority";
    let expected = ["gpt-4o", "2026-12-01", "00:00:00", "changed", "2", "8", "2.5", "10", differs];
    assert_eq!(cells, expected, "what was stands beside it");
    assert_eq!(cli.store.prices().await.unwrap(), []);

    cli.run("prices import", text).await.unwrap();
    let stored = cli.store.prices().await.unwrap();
    assert_eq!(stored.iter().map(|price| price.model.as_str()).collect::<Vec<_>>(), ["gpt-4o", "new"]);
    let rates = Rates { cached_input: 5_000, ..Rates::flat(50_000, 400_000) };
    assert_eq!(stored[1].price, Price { batch: Some(rates.percent(50)), ..Price::of(rates) });
    let again = cli.run("prices import --json", text).await.unwrap();
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!((&again["imported"], &again["unchanged"]), (&json!(0), &json!(2)));
    let log = cli.store.admin_log(9).await.unwrap();
    assert_eq!(log[0].action, "prices.import");
    assert!(log[0].detail.contains("2026-12-01T00:00:00Z") && log[1].action != "prices.import", "{}", log[0].detail);

    let snapshot = text.replace("\"new\"", "\"new-2026-12-24\"");
    let done = cli.run("prices import --json --dry-run", &snapshot).await.unwrap();
    let done: Value = serde_json::from_str(&done).unwrap();
    let changes: Vec<_> = done["prices"].as_array().unwrap().iter().map(|row| row["change"].clone()).collect();
    assert_eq!(changes, [json!("there already"), json!("as before")], "its family costs the same, but it may change");

    let bad = "[models.\"a\"]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1\n[models.\"b\"]\ninput_usd = 2\n";
    for (line, input, says, code) in [
        ("prices import", bad, "standard input:5: models.\"b\".input_usd", 2),
        ("prices import -", "", "names no model", 2),
        ("prices import /no/such/file", "", "/no/such/file cannot be opened", 1),
    ] {
        let (error, exit) = cli.fails(line, input).await;
        assert!(error.contains(says) && exit == code, "{line}: {error} ({exit})");
    }
    assert_eq!(cli.store.prices().await.unwrap().len(), 2, "a file with a mistake changes nothing");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("prices.toml");
    std::fs::write(&path, "[models.\"a\"]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1\n").unwrap();
    let done = cli.text(&format!("prices import {}", path.display())).await;
    assert!(done.contains("1 prices imported: 1 new"), "{done}");
    let table = cli.text("prices list").await;
    let cells = |model: &str| -> Vec<String> {
        let line = table.lines().find(|line| line.starts_with(&format!("{model} "))).unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(cells("gpt-4.1-nano"), ["gpt-4.1-nano", "shipped", "-", "0.1", "0.025", "0.4", "0.05", "0.2"]);
}
