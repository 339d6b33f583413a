//! HTTPS beside HTTP, HTTP/2 beside HTTP/1.1, and the admin plane apart from both.

use http::StatusCode;

use crate::support::{
    client::{h1, h2},
    gateway::Gateway,
    openai::{chat, chat_of, completion},
    upstream::Upstream,
};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn tls_offers_both_versions() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder().tls().upstream("main", &upstream.base_url(), "").start();
    let ca = gateway.ca.clone().unwrap();
    for target in [h1(gateway.tls()).tls(&ca), h2(gateway.tls()).tls(&ca)] {
        for size in [200, 200_000] {
            let request = target.post(CHAT).bearer(&gateway.key).body_content_length(chat_of(size));
            let answer = request.send().await.unwrap().whole().await;
            assert_eq!((answer.status, answer.error), (StatusCode::OK, None));
        }
    }
    assert_eq!(upstream.received().len(), 4);
    assert!(gateway.metric("tollgate_certificate_expiry_seconds{domain=\"default\"}").await > 0.0);
}

#[tokio::test]
async fn an_upstream_may_have_a_private_authority() {
    let upstream = Upstream::start(completion());
    let behind = Gateway::builder().tls().upstream("main", &upstream.base_url(), "").start();
    let ca_file = behind.dir().join("ca.pem");
    std::fs::write(&ca_file, &behind.ca.clone().unwrap().ca_pem).unwrap();
    let base_url = format!("https://localhost:{}/v1", behind.tls().port());
    let credential = format!("credential = \"{}\"\n", behind.key);
    let trusting = format!("{credential}ca_file = \"{}\"", ca_file.display());
    let front = Gateway::builder().upstream("behind", &base_url, &trusting).start();
    assert_eq!(front.ask(CHAT, &chat()).await.status, StatusCode::OK);
    let doubting = Gateway::builder().upstream("behind", &base_url, &credential).start();
    let answer = doubting.ask(CHAT, &chat()).await;
    assert_eq!(answer.json()["error"]["code"], "upstream_error", "a certificate that nobody vouches for");
    assert_eq!(upstream.received().len(), 1);
}

#[tokio::test]
async fn the_admin_plane_tells_health_and_what_is_missing() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    assert_eq!(gateway.admin("/healthz").await, (200, "ok\n".into()));
    let (status, text) = gateway.admin("/readyz").await;
    assert_eq!(status, 200, "{text}");
    assert!(gateway.admin("/metrics").await.1.contains("# HELP tollgate_store_up"));
    let bare = Gateway::builder().start();
    let (status, text) = bare.admin("/readyz").await;
    assert_eq!(status, 503);
    assert!(text.contains("tollgate upstream add"), "{text}");
    let data_plane = h1(gateway.http()).get("/metrics").send().await.unwrap();
    assert_eq!(data_plane.status, StatusCode::NOT_FOUND, "callers do not reach it");
}
