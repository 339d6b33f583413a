//! The books agree: what upstreams produced, what the log says, and the sums.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tollgate::store::{AuditRow, GroupBy, UsageQuery};

use crate::support::{
    gateway::Gateway,
    mortal,
    openai::{DONE, event},
    postgres,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
const KINDS: [&str; 5] = ["json", "stream", "retried", "hangs_up", "refused"];

/// Requests and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    requests: i64,
    prompt: i64,
    completion: i64,
    cost: i64,
}

impl Sum {
    fn of<'r>(rows: impl IntoIterator<Item = &'r AuditRow>) -> Self {
        rows.into_iter().fold(Self::default(), |sum, row| Self {
            requests: sum.requests + 1,
            prompt: sum.prompt + row.prompt_tokens,
            completion: sum.completion + row.completion_tokens,
            cost: sum.cost + row.cost_nano_usd,
        })
    }
}

/// An upstream that notes what it reports to have produced; `fails`: not for those that are to be retried.
fn upstream(fails: bool, produced: &Arc<Mutex<Sum>>) -> Upstream {
    let (produced, mut count) = (Arc::clone(produced), 0);
    Upstream::start(Script::by(move |request| {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let kind = body["user"].as_str().unwrap();
        if fails && kind == "retried" {
            return Answer::json(500, &json!({ "error": { "message": "broken" } }));
        }
        if kind == "hangs_up" {
            return Answer::sse([event("one two", Some("null"))]).never_end();
        }
        if kind == "refused" {
            return Answer::json(400, &json!({ "error": { "message": "no", "code": "x" } }));
        }
        count += 1;
        let usage =
            json!({ "prompt_tokens": 100 + count, "completion_tokens": 7 * count, "total_tokens": 100 + 8 * count });
        let mut sum = produced.lock().unwrap();
        *sum = Sum {
            requests: sum.requests + 1,
            prompt: sum.prompt + 100 + count,
            completion: sum.completion + 7 * count,
            cost: sum.cost + (100 + count) * 2_000 + 7 * count * 8_000,
        };
        if body["stream"] == json!(true) {
            let last = json!({ "choices": [], "usage": usage });
            return Answer::sse([event("hi", Some("null")), format!("data: {last}\n\n"), DONE.to_owned()]);
        }
        Answer::json(200, &json!({ "choices": [], "usage": usage }))
    }))
}

async fn ask(gateway: &Gateway, n: usize) {
    let kind = KINDS[n % KINDS.len()];
    let streams = matches!(kind, "stream" | "hangs_up") || n.is_multiple_of(2);
    let model = ["gpt-4o", "m2"][n % 2];
    let body = json!({ "model": model, "user": kind, "stream": streams && kind != "refused",
                       "messages": [{ "role": "user", "content": "hello" }] });
    let mut response = gateway.post(CHAT).body_content_length(body.to_string()).send().await.unwrap();
    if kind == "hangs_up" {
        assert!(response.chunk().await.unwrap().is_ok());
        return;
    }
    let answer = response.whole().await;
    assert_eq!((answer.status.as_u16(), answer.error), (if kind == "refused" { 400 } else { 200 }, None), "{kind}");
}

async fn the_books_agree(store_url: Option<String>) {
    const ROUNDS: usize = 8;
    let produced = Arc::default();
    let (first, second) = (upstream(true, &produced), upstream(false, &produced));
    let price = "input_usd_per_mtok = 2\noutput_usd_per_mtok = 8\n";
    let mut builder = Gateway::builder()
        .tables("[breaker]\nfailures = 0\nfailure_percent = 0\n[retry]\nbudget_percent = 100")
        .tables(&format!("[models.\"gpt-4o\"]\n{price}[models.\"m2\"]\n{price}"))
        .upstream("first", &first.base_url(), "")
        .upstream("second", &second.base_url(), "priority = 1");
    if let Some(url) = &store_url {
        builder = builder.store(url);
    }
    let mut gateway = builder.start();
    for round in 0..ROUNDS {
        let asked = (0..KINDS.len()).map(|n| ask(&gateway, round * KINDS.len() + n));
        futures::future::join_all(asked).await;
    }
    first.wait_for_hang_ups(ROUNDS).await;
    gateway.stop().unwrap();

    let store = gateway.store().await;
    let rows = mortal::rows(&store).await;
    assert_eq!(rows.len(), ROUNDS * KINDS.len());
    let (estimated, exact): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.estimated);
    let (refused, answered): (Vec<_>, Vec<_>) = exact.into_iter().partition(|row| row.status == 400);
    assert_eq!(Sum::of(answered), *produced.lock().unwrap(), "the log says what the upstreams say");
    assert_eq!(Sum::of(refused), Sum { requests: ROUNDS as i64, ..Sum::default() });
    let hung_up = Sum::of(estimated.iter().copied());
    assert_eq!(hung_up.requests, ROUNDS as i64);
    assert!(estimated.iter().all(|row| row.code.as_deref() == Some("client_closed") && row.completion_tokens > 0));
    let retried =
        rows.iter().filter(|row| row.attempts.contains("\"status\":500") || row.attempts.contains("\"status\": 500"));
    assert_eq!(retried.count(), ROUNDS, "each was tried twice, and is one row");
    for by in [GroupBy::Day, GroupBy::Month, GroupBy::Model, GroupBy::Upstream] {
        let sums = store.usage(&UsageQuery::by(by)).await.unwrap();
        let sum = sums.iter().fold(Sum::default(), |sum, row| Sum {
            requests: sum.requests + row.requests,
            prompt: sum.prompt + row.prompt_tokens,
            completion: sum.completion + row.completion_tokens,
            cost: sum.cost + row.cost_nano_usd,
        });
        assert_eq!(sum, Sum::of(&rows), "{by:?}");
    }
    store.close().await;
}

#[tokio::test]
async fn sums_are_the_log_and_the_log_is_what_upstreams_produced() {
    the_books_agree(None).await;
    the_books_agree(Some(postgres::database())).await;
}
