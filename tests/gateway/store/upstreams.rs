//! Upstreams and their ciphertexts.

use tollgate::store::{StoreError, UpstreamSpec};
use tollgate_core::upstream::{BaseUrl, Overrides, UpstreamKind};

use super::{Database, on_both_databases, openai};

on_both_databases! {
    upstreams_keep_what_was_said_and_only_ciphertext,
    a_ciphertext_is_replaced_unless_it_changed,
}

async fn upstreams_keep_what_was_said_and_only_ciphertext(database: Database) {
    let store = database.store().await;
    let upstream = store.create_upstream(&openai(), "test").await.unwrap();
    assert_eq!(upstream.spec, openai());
    assert_eq!(store.find_upstream("main").await.unwrap(), upstream);
    let plain = UpstreamSpec { name: "other".into(), credential: "sk-plain".into(), ..openai() };
    let error = store.create_upstream(&plain, "test").await.unwrap_err();
    assert!(matches!(error, StoreError::Database(_)), "{error:?}");

    let changed = store
        .update_upstream(upstream.id, "test", |spec| {
            spec.kind = UpstreamKind::Azure;
            spec.api_version = Some("2024-10-21".into());
            spec.disabled = true;
        })
        .await
        .unwrap();
    assert_eq!(store.upstreams().await.unwrap(), [changed]);
    store.remove_upstream(upstream.id, "test").await.unwrap();
    assert_eq!(store.upstreams().await.unwrap(), []);
    assert!(store.find_upstream("main").await.unwrap_err().to_string().contains("tollgate upstream list"));
    store.create_upstream(&openai(), "test").await.expect("a removed upstream gives its name free");
}

async fn a_ciphertext_is_replaced_unless_it_changed(database: Database) {
    let store = database.store().await;
    let spec = |name: &str| UpstreamSpec {
        name: name.into(),
        kind: UpstreamKind::OpenAi,
        base_url: BaseUrl::parse("https://a.example/v1").unwrap(),
        credential: format!("gAAAA-old-{name}"),
        models: vec![],
        weight: 1,
        priority: 0,
        api_version: None,
        overrides: Overrides::default(),
        disabled: false,
    };
    let a = store.create_upstream(&spec("a"), "test").await.unwrap();
    let b = store.create_upstream(&spec("b"), "test").await.unwrap();
    let gone = store.create_upstream(&spec("gone"), "test").await.unwrap();
    let all = store.credentials().await.unwrap();
    assert_eq!(
        all.iter().map(|c| (c.id, c.ciphertext.as_str())).collect::<Vec<_>>()[..2],
        [(a.id, "gAAAA-old-a"), (b.id, "gAAAA-old-b")]
    );
    store.remove_upstream(gone.id, "test").await.unwrap();
    store.update_upstream(b.id, "test", |spec| spec.credential = "gAAAA-renewed".into()).await.unwrap();
    let seq = store.changes_since(0).await.unwrap().seq;

    assert!(store.replace_ciphertext(&all[0], "gAAAA-new-a", "cli:me").await.unwrap());
    assert!(!store.replace_ciphertext(&all[1], "gAAAA-new-b", "cli:me").await.unwrap(), "it was renewed meanwhile");
    assert!(!store.replace_ciphertext(&all[2], "gAAAA-new-gone", "cli:me").await.unwrap(), "it was removed meanwhile");
    let now = store.credentials().await.unwrap();
    assert_eq!(now.iter().map(|c| c.ciphertext.as_str()).collect::<Vec<_>>(), ["gAAAA-new-a", "gAAAA-renewed"]);
    assert!(
        store.changes_since(seq).await.unwrap().is_empty(),
        "it is the same credential: nothing to tell the gateways"
    );
    let log = store.admin_log(1).await.unwrap().remove(0);
    let logged = (log.action.as_str(), log.actor.as_str(), log.subject_id, log.detail.as_str());
    assert_eq!(logged, ("upstream.rotate_credential", "cli:me", Some(a.id.0), r#"{"name":"a"}"#));

    store.meta_or_insert("fact", "old").await.unwrap();
    store.replace_meta("fact", "another", "new").await.unwrap();
    assert_eq!(store.meta("fact").await.unwrap().as_deref(), Some("old"));
    store.replace_meta("fact", "old", "new").await.unwrap();
    assert_eq!(store.meta("fact").await.unwrap().as_deref(), Some("new"));
}
