//! Users and their keys.

use std::sync::Arc;

use chrono::Utc;
use tollgate::store::{KeySpec, StoreError, UserSpec};
use tollgate_core::{
    content::ContentMode,
    id::UserId,
    key::IpNet,
    limit::{Limits, MAX_LIMIT, ModelLimits},
};

use super::{Database, alice, api_key, model_limits, on_both_databases, openai};

on_both_databases! {
    users_keep_what_was_said_about_them,
    names_are_unique_and_checked,
    keys_keep_what_was_said_about_them,
    limits_of_models_are_checked,
    a_key_is_found_by_id_name_and_owner,
}

async fn users_keep_what_was_said_about_them(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    // A number too large for the column becomes the largest that fits.
    let stored = UserSpec { limits: Limits { tpm: Some(i64::MAX as u64), ..alice().limits }, ..alice() };
    assert_eq!(user.spec, stored);
    assert!((Utc::now() - user.created_at).num_seconds() < 60);
    assert_eq!(store.find_user("alice").await.unwrap(), user);
    assert_eq!(store.find_user(&user.id.to_string()).await.unwrap(), user);
    assert_eq!(store.users().await.unwrap().as_slice(), std::slice::from_ref(&user));

    let changed = store
        .update_user(user.id, "test", |spec| {
            spec.disabled = true;
            spec.limits.tpm = None;
            spec.limits.monthly_nano_usd = Some(0);
            spec.audit_content = None;
        })
        .await
        .unwrap();
    let limits = Limits { tpm: None, monthly_nano_usd: Some(0), ..stored.limits };
    assert_eq!(changed.spec, UserSpec { disabled: true, limits, audit_content: None, ..stored });
    assert_eq!((user.to_user().audit_content, changed.to_user().audit_content), (Some(ContentMode::Redacted), None));
    assert_eq!(changed.to_user().limits, limits);
    let again = store.update_user(user.id, "test", |spec| spec.disabled = true).await.unwrap();
    assert_eq!(again.disabled_at, changed.disabled_at, "disabling again keeps the time");
    assert_eq!(store.find_user("alice").await.unwrap(), again);
    assert!(again.to_user().disabled);
    assert_eq!(store.update_user(user.id, "test", |spec| spec.disabled = false).await.unwrap().disabled_at, None);
}

async fn names_are_unique_and_checked(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let bob = store.create_user(&UserSpec { name: "bob".into(), ..alice() }, "test").await.unwrap();
    let text = |error: StoreError| {
        assert!(error.is_client_error(), "{error:?}");
        error.to_string()
    };
    let taken = "a user named \"alice\" exists already";
    assert_eq!(text(store.create_user(&alice(), "test").await.unwrap_err()), taken);
    assert_eq!(text(store.update_user(bob.id, "test", |b| b.name = "alice".into()).await.unwrap_err()), taken);
    assert!(text(store.find_user("carol").await.unwrap_err()).contains("tollgate user list"));
    assert!(text(store.update_user(UserId(99), "test", |_| {}).await.unwrap_err()).contains("99"));
    assert!(
        text(store.create_user(&UserSpec { name: "42".into(), ..alice() }, "test").await.unwrap_err()).contains("id")
    );

    let spec = KeySpec { name: "ci".into(), ..KeySpec::default() };
    let key = store.create_key(user.id, &spec, &api_key(1), "test").await.unwrap();
    assert!(text(store.create_key(user.id, &spec, &api_key(2), "test").await.unwrap_err()).contains("\"ci\" already"));
    store.revoke_key(key.id, "test").await.unwrap();
    store.create_key(user.id, &spec, &api_key(2), "test").await.expect("a revoked key gives its name free");
    store.create_upstream(&openai(), "test").await.unwrap();
    assert_eq!(
        text(store.create_upstream(&openai(), "test").await.unwrap_err()),
        "an upstream named \"main\" exists already"
    );
    assert_eq!(store.users().await.unwrap().len(), 2, "a refused change leaves nothing");
}

async fn keys_keep_what_was_said_about_them(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let spec = KeySpec {
        name: "ci".into(),
        models: vec!["gpt-4o".into(), "o3*".into()],
        allow_ip: vec![IpNet::parse("10.0.0.0/8").unwrap(), IpNet::parse("::1").unwrap()],
        limits: Limits {
            rpm: Some(1),
            tpm: None,
            concurrency: Some(u32::MAX),
            monthly_tokens: Some(7),
            monthly_nano_usd: Some(MAX_LIMIT),
        },
        model_limits: model_limits(),
        audit_content: Some(ContentMode::Hash),
        expires_at: Some("2030-01-02T03:04:05.678901Z".parse().unwrap()),
    };
    let key = store.create_key(user.id, &spec, &api_key(1), "test").await.unwrap();
    assert_eq!((&key.spec, key.user_name.as_str(), key.prefix.as_str()), (&spec, "alice", api_key(1).prefix()));
    assert_eq!(key.hash, api_key(1).hash());
    assert_eq!(store.find_key("ci").await.unwrap(), key);

    let entry = key.to_entry(Arc::new(user.to_user()));
    assert_eq!((entry.model_limits, entry.audit_content), (model_limits(), Some(ContentMode::Hash)));

    let edit = |spec: &mut KeySpec| {
        spec.models = vec![];
        spec.model_limits.truncate(1);
        spec.limits.monthly_nano_usd = None;
        spec.audit_content = Some(ContentMode::None);
    };
    let changed = store.update_key(key.id, "test", edit).await.unwrap();
    let limits = Limits { monthly_nano_usd: None, ..spec.limits };
    let model_limits = model_limits()[..1].to_vec();
    let audit_content = Some(ContentMode::None);
    assert_eq!(changed.spec, KeySpec { models: vec![], limits, model_limits, audit_content, ..spec });
    assert_eq!(store.find_key("ci").await.unwrap(), changed);
    let rotated = store.rotate_key(key.id, &api_key(9), "test").await.unwrap();
    assert_eq!((rotated.id, rotated.hash), (key.id, api_key(9).hash()));
    assert_eq!(rotated.prefix, api_key(9).prefix());

    store.revoke_key(key.id, "test").await.unwrap();
    let revoked = store.find_key("ci").await.unwrap();
    assert!(revoked.revoked_at.is_some());
    store.revoke_key(key.id, "test").await.unwrap();
    assert_eq!(store.find_key("ci").await.unwrap(), revoked, "revoking again keeps the time");
    let error = store.rotate_key(key.id, &api_key(3), "test").await.unwrap_err();
    assert!(error.to_string().contains("revoked"), "{error}");
}

async fn limits_of_models_are_checked(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let entry = |model: &str| ModelLimits { model: model.into(), limits: Limits::default() };
    let with = |model_limits| KeySpec { name: "ci".into(), model_limits, ..KeySpec::default() };
    let key = store.create_key(user.id, &with(model_limits()), &api_key(1), "test").await.unwrap();
    for (bad, says) in [
        (vec![entry("gpt-4o"), entry("o3"), entry("gpt-4o")], "\"gpt-4o\" is limited twice"),
        (vec![entry("")], "\"\" is not a model"),
        (vec![entry("a=b")], "\"a=b\" is not a model"),
    ] {
        let created = store.create_key(user.id, &with(bad.clone()), &api_key(2), "test").await.unwrap_err();
        let updated = store.update_key(key.id, "test", |spec| spec.model_limits = bad).await.unwrap_err();
        for error in [created, updated] {
            assert!(matches!(error, StoreError::Invalid(_)) && error.to_string().contains(says), "{error:?}");
        }
    }
    assert_eq!(store.keys(None).await.unwrap(), [key], "a refused change leaves nothing");
}

async fn a_key_is_found_by_id_name_and_owner(database: Database) {
    let store = database.store().await;
    let spec = KeySpec { name: "ci".into(), ..KeySpec::default() };
    let alice = store.create_user(&alice(), "test").await.unwrap();
    let bob = store.create_user(&UserSpec { name: "bob".into(), ..UserSpec::default() }, "test").await.unwrap();
    let first = store.create_key(alice.id, &spec, &api_key(1), "test").await.unwrap();
    let second = store.create_key(bob.id, &spec, &api_key(2), "test").await.unwrap();
    let error = store.find_key("ci").await.unwrap_err().to_string();
    assert!(error.contains("alice/ci") && error.contains("bob/ci"), "{error}");
    assert_eq!(store.find_key("bob/ci").await.unwrap(), second);
    assert_eq!(store.find_key(&first.id.to_string()).await.unwrap(), first);
    assert_eq!(store.keys(Some(alice.id)).await.unwrap().as_slice(), std::slice::from_ref(&first));
    assert_eq!(store.keys(None).await.unwrap(), [first.clone(), second.clone()]);
    store.revoke_key(second.id, "test").await.unwrap();
    assert_eq!(store.find_key("ci").await.unwrap(), first, "the live key is meant");
    assert!(store.find_key("carol/ci").await.unwrap_err().to_string().contains("tollgate key list"));
}
