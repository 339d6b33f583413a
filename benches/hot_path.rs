//! What the gateway itself does for a request, step by step, without a network.

use std::{collections::HashMap, hint::black_box, net::Ipv4Addr, sync::Arc};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tollgate::{limiter::memory::Memory, shared::KeyDirectory};
use tollgate_core::{
    breaker::Outcome,
    health::Health,
    id::{KeyId, UserId},
    key::{ApiKey, KeyEntry, KeyHash},
    limit::{
        Amount, Caps, Limits, MAX_LIMIT, Subject,
        state::{Circumstances, Demand, Need, Share},
    },
    openai::{
        request::parse,
        response::JsonMeter,
        rewrite::{Edits, rewrite},
        sse::StreamMeter,
    },
    pool::{Place, Pool, Strategy, sticky_hash},
    price::book::PriceBook,
    route::Dialect,
    snapshot::{Member, Snapshot},
    upstream::{BaseUrl, Handling, ModelEntry, Upstream, UpstreamKind},
    user::User,
};

const CHUNK: &str = r#"data: {"id":"chatcmpl-9x2","object":"chat.completion.chunk","created":1760000000,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_1","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null}

"#;

fn body() -> Bytes {
    let messages: Vec<_> = (0..6)
        .map(
            |n| serde_json::json!({ "role": "user", "content": format!("message {n}: {}", "lorem ipsum ".repeat(10)) }),
        )
        .collect();
    serde_json::json!({ "messages": messages, "model": "gpt-4o", "stream": true }).to_string().into()
}

fn answer() -> Bytes {
    serde_json::json!({
        "id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-4o",
        "choices": [{ "index": 0, "finish_reason": "stop",
            "message": { "role": "assistant", "content": "lorem ipsum ".repeat(60) } }],
        "usage": { "prompt_tokens": 20, "completion_tokens": 120, "total_tokens": 140,
            "prompt_tokens_details": { "cached_tokens": 0 } },
    })
    .to_string()
    .into()
}

fn entry() -> KeyEntry {
    KeyEntry {
        id: KeyId(1),
        name: "bench".into(),
        prefix: "tg-bench".into(),
        user: Arc::new(User {
            id: UserId(1),
            name: "bench".into(),
            disabled: false,
            limits: Limits::default(),
            audit_content: None,
        }),
        models: vec![],
        allow_ip: vec![],
        limits: Limits::default(),
        model_limits: vec![],
        audit_content: None,
        expires_at: None,
        revoked_at: None,
    }
}

fn member(name: String) -> Member {
    Member {
        upstream: Arc::new(Upstream {
            id: None,
            name,
            kind: UpstreamKind::OpenAi,
            base_url: BaseUrl::parse("https://api.openai.com/v1").expect("a fixed URL"),
            credential: tollgate_core::secret::Secret::default(),
            models: vec![ModelEntry { name: "gpt-*".into(), upstream_name: None }],
            weight: 1,
            priority: 0,
            api_version: None,
            handling: Handling::default(),
            ca_pem: None,
            disabled: false,
        }),
        state: Arc::default(),
    }
}

fn request(c: &mut Criterion) {
    let body = body();
    let mut group = c.benchmark_group("request");
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("parse head", |b| b.iter(|| parse(black_box(&body))));
    let Ok(head) = parse(&body) else { unreachable!("the body is well-formed") };
    let edits = Edits { model: Some("gpt-4o-2024-08-06"), ask_usage: true };
    group.bench_function("rewrite", |b| b.iter(|| rewrite(black_box(&body), &head, &edits)));
    group.finish();
}

fn directory(c: &mut Criterion) {
    let keys = KeyDirectory::default();
    for n in 0..10_000_i64 {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&n.to_le_bytes());
        keys.put(ApiKey::from_random(&seed).hash(), Arc::new(KeyEntry { id: KeyId(n), ..entry() }));
    }
    let presented = ApiKey::from_random(&[0; 32]);
    c.bench_function("authenticate among 10,000 keys", |b| {
        b.iter(|| keys.get(&KeyHash::of(black_box(presented.expose().as_bytes()))));
    });
    let snapshot = Snapshot::new(
        1,
        (0..10).map(|n| member(format!("u{n}"))).collect(),
        HashMap::new(),
        PriceBook::default(),
        Strategy::Weighted,
    );
    let key = entry();
    let now = chrono::DateTime::UNIX_EPOCH;
    c.bench_function("resolve a model over 10 upstreams", |b| {
        b.iter(|| snapshot.resolve(black_box("gpt-4o"), &key, now));
    });
    let place = |index: usize| Place { index, priority: 0, weight: 1, identity: sticky_hash(&index.to_le_bytes()) };
    let pool = Pool::new((0..10).map(place));
    let healths: Vec<Arc<Health>> = (0..10).map(|_| Arc::default()).collect();
    for strategy in Strategy::ALL {
        c.bench_function(&format!("pick and enter one of 10, {}", strategy.as_str()), |b| {
            b.iter(|| {
                let fit = |index: usize| healths[index].fitness(black_box(1_000), 100);
                let index = pool.pick(strategy, Some(7), fit, |index| healths[index].in_flight()).unwrap_or(0);
                healths[index].enter(1_000, 100).map(|attempt| attempt.record(Outcome::Success, 1_000, 0.0))
            });
        });
    }
}

fn answers(c: &mut Criterion) {
    let answer = answer();
    c.bench_function("meter a 1 KB JSON answer", |b| {
        b.iter(|| {
            let mut meter = JsonMeter::new(Dialect::Chat);
            meter.feed(black_box(&answer));
            meter.finish()
        });
    });
    let chunk = Bytes::from_static(CHUNK.as_bytes());
    let mut group = c.benchmark_group("stream");
    group.throughput(Throughput::Bytes(chunk.len() as u64));
    for (name, hide) in [("chunk, usage hidden", true), ("chunk, passed as it is", false)] {
        let mut meter = StreamMeter::new(Dialect::Chat, hide);
        group.bench_function(name, |b| b.iter(|| meter.feed(black_box(chunk.clone()))));
    }
    group.finish();
}

/// Five subjects with every kind of limit, as one request of a busy gateway has them (and a model more).
fn five_subjects(n: i64) -> Vec<Demand> {
    let (user, key) = (UserId(n), KeyId(n));
    let caps = Caps {
        rpm: MAX_LIMIT,
        tpm: MAX_LIMIT,
        concurrency: MAX_LIMIT,
        monthly_tokens: MAX_LIMIT,
        monthly_nano_usd: MAX_LIMIT,
    };
    let subjects = [
        Subject::Ip(Ipv4Addr::from_bits(u32::try_from(n).unwrap_or(0)).into()),
        Subject::User(user),
        Subject::Key(user, key),
        Subject::KeyModel(user, key, "gpt-4o".into()),
        Subject::KeyModel(user, key, "gpt-4o-mini".into()),
    ];
    subjects.into_iter().map(|subject| Demand { subject, caps }).collect()
}

fn limits(c: &mut Criterion) {
    let memory = Memory::default();
    let all: Vec<Vec<Demand>> = (0..2000).map(five_subjects).collect();
    let need = Need::from(Amount { tokens: 100, nano_usd: 100_000 });
    let booked = |_: &Demand| Amount::default();
    let mut n = 0_u64;
    c.bench_function("admission of five subjects among 10,000", |b| {
        b.iter(|| {
            n += 1;
            let demands = &all[usize::try_from(n % 2000).unwrap_or(0)];
            memory.admit(black_box(demands), booked, need, Circumstances::alone(n / 10, Share::WHOLE))
        });
    });
    c.bench_function("admission of five subjects, always the same", |b| {
        b.iter(|| {
            n += 1;
            memory.admit(black_box(&all[0]), booked, need, Circumstances::alone(n / 10, Share::WHOLE))
        });
    });
}

criterion_group!(benches, request, directory, answers, limits);
criterion_main!(benches);
