//! Content of requests.

use tollgate::store::ContentRow;
use tollgate_core::{content::ContentMode, usage::UsageRecord};
use uuid::Uuid;

use super::{Database, at, on_both_databases, record, write};

on_both_databases! {
    content_is_kept_once_and_found_by_its_request,
    content_is_sealed_anew_page_by_page,
    only_ciphertext_is_taken_for_content,
}

/// An id of a request that began at `time`, as the gateway makes them.
fn id_at(time: &str, n: u8) -> Uuid {
    let ms = u64::try_from(at(time).timestamp_millis()).unwrap();
    uuid::Builder::from_unix_timestamp_millis(ms, &[n; 10]).into_uuid()
}

fn content(n: u8, time: &str, mode: ContentMode) -> ContentRow {
    ContentRow {
        request_id: id_at(time, n),
        started_at: at(time),
        mode,
        prompt_hash: [n % 2; 32],
        sealed: mode.keeps_bodies().then(|| vec![0x80, n, 0, 0xff]),
        request_bytes: u64::from(n) + 1,
        answer_bytes: u64::MAX,
        truncated: n.is_multiple_of(2),
    }
}

async fn content_is_kept_once_and_found_by_its_request(database: Database) {
    let store = database.store().await;
    let modes = [ContentMode::Hash, ContentMode::Redacted, ContentMode::Full];
    let rows: Vec<_> = (0..3).zip(modes).map(|(n, mode)| content(n, "2026-11-23T10:00:00.123456Z", mode)).collect();
    store.write_contents(&rows).await.unwrap();
    let again: Vec<_> = rows.iter().map(|row| ContentRow { request_bytes: 99, ..row.clone() }).collect();
    store.write_contents(&again).await.unwrap();
    store.write_contents(&[]).await.unwrap();
    for row in &rows {
        let stored = ContentRow { answer_bytes: i64::MAX as u64, ..row.clone() };
        assert_eq!(store.find_content(row.request_id).await.unwrap(), Some(stored));
    }
    assert_eq!(store.find_content(id_at("2026-11-23T10:00:00Z", 9)).await.unwrap(), None);
    let error = store.find_content(Uuid::from_u128(7)).await.unwrap_err();
    assert!(error.to_string().contains("is no id of a request: `tollgate audit` shows them"), "{error}");
    let same: Vec<String> = [2, 0].map(|n| rows[n].request_id.hyphenated().to_string()).into();
    let mut found = store.requests_of_prompt(&[0; 32], 9).await.unwrap();
    found.sort_by(|a, b| b.cmp(a));
    assert_eq!(found, same);
    assert_eq!(store.requests_of_prompt(&[0; 32], 1).await.unwrap().len(), 1);

    let logged = UsageRecord { request_id: rows[0].request_id, ..record(1, "2026-11-23T10:00:00.123456Z") };
    write(&store, &[logged]).await;
    let row = store.find_request(rows[0].request_id).await.unwrap();
    assert_eq!(row.request_id, rows[0].request_id.hyphenated().to_string());
    let error = store.find_request(rows[1].request_id).await.unwrap_err().to_string();
    assert!(error.contains("ask again in a moment"), "{error}");
    store.note_content_read(rows[0].request_id, "cli:test").await.unwrap();
    let log = store.admin_log(1).await.unwrap().remove(0);
    assert_eq!((log.action.as_str(), log.actor.as_str(), log.subject_id), ("content.read", "cli:test", None));
    assert!(log.detail.contains(&rows[0].request_id.hyphenated().to_string()), "{}", log.detail);
}

async fn content_is_sealed_anew_page_by_page(database: Database) {
    let store = database.store().await;
    let mut rows: Vec<_> = (0..6).map(|n| content(n, "2026-11-23T10:00:00Z", ContentMode::Redacted)).collect();
    rows.push(content(6, "2026-11-23T10:00:01Z", ContentMode::Full));
    rows.push(content(7, "2026-11-23T10:00:01Z", ContentMode::Hash));
    store.write_contents(&rows).await.unwrap();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.contents_after(after.as_ref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.started_at, last.request_id.clone()));
        let anew: Vec<_> = page.iter().map(|old| (old.clone(), [&old.content[..], b"x"].concat())).collect();
        store.replace_contents(&anew).await.unwrap();
        seen.extend(page.into_iter().map(|old| old.content));
    }
    assert_eq!(seen, rows[..7].iter().map(|row| row.sealed.clone().unwrap()).collect::<Vec<_>>());
    for row in &rows {
        let now = store.find_content(row.request_id).await.unwrap().unwrap();
        assert_eq!(now.sealed, row.sealed.as_ref().map(|sealed| [&sealed[..], b"x"].concat()));
    }
}

async fn only_ciphertext_is_taken_for_content(database: Database) {
    let store = database.store().await;
    let row = |mode, sealed: Option<&[u8]>| ContentRow {
        sealed: sealed.map(<[u8]>::to_vec),
        ..content(1, "2026-11-23T10:00:00Z", mode)
    };
    for bad in [
        row(ContentMode::Full, Some(b"{\"messages\":[]}")),
        row(ContentMode::Full, None),
        row(ContentMode::Hash, Some(&[0x80])),
        row(ContentMode::None, None),
    ] {
        store.write_contents(std::slice::from_ref(&bad)).await.expect_err("it must be refused");
        assert_eq!(store.find_content(bad.request_id).await.unwrap(), None);
    }
}
