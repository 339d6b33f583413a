//! The running gateway, as its admin listener tells of it: what the database cannot know.
//!
//! The verbs work on the database and need no gateway. What some of them show besides is read from `/metrics`, the contract
//! that everybody else holds on to as well. If nobody answers at once, it is not known; that is no failure.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use http::{Method, header};
use pingora::http::RequestHeader;
use pingora_core::{connectors::http::Connector, upstreams::peer::HttpPeer};
use serde_json::{Value, json};
use tollgate_core::exposition::samples;

/// How long a gateway may take to answer. It is on this machine, or near.
const PATIENCE: Duration = Duration::from_millis(500);
/// How much of an answer is read; a thousand upstreams have a tenth of it.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

/// Where the gateway of this configuration answers; `None`: its admin listener is off, or on a port of the system's choice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running(pub(super) Option<SocketAddr>);

/// How the gateway sees one upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// The word for its state.
    pub(super) state: Option<String>,
    /// Attempts under way.
    pub(super) in_flight: u64,
}

/// How it sees all of them, by name.
pub(super) type Standings = HashMap<String, Standing>;

impl Running {
    /// Why nothing can be known, if nobody answers.
    pub(super) fn silence(self) -> String {
        match self.0 {
            Some(address) => format!("no gateway answers at {address} ([server] admin_listen)"),
            None => "[server] admin_listen is off or has no port of its own".to_owned(),
        }
    }

    /// Asks it; `None`: nobody answers.
    pub(super) async fn look(self) -> Option<Standings> {
        let address = reachable(self.0?);
        let text = tokio::time::timeout(PATIENCE, fetch(address)).await.ok()??;
        Some(standings(&text))
    }
}

/// The fields that every list of upstreams has.
pub(super) fn fields(standing: Option<&Standing>) -> [(&'static str, Value); 2] {
    let state = standing.and_then(|standing| standing.state.as_deref());
    [("state", json!(state)), ("in_flight", json!(standing.map(|standing| standing.in_flight)))]
}

/// Who listens on every network is reached over loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

async fn fetch(address: SocketAddr) -> Option<String> {
    let peer = HttpPeer::new(address, false, String::new());
    let (mut session, _) = Connector::<()>::new(None).get_http_session(&peer).await.ok()?;
    let mut request = RequestHeader::build(Method::GET, b"/metrics", Some(1)).ok()?;
    request.insert_header(header::HOST, address.to_string()).ok()?;
    session.write_request_header(Box::new(request)).await.ok()?;
    session.finish_request_body().await.ok()?;
    session.read_response_header().await.ok()?;
    let mut body = Vec::new();
    while let Some(piece) = session.read_response_body().await.ok()? {
        body.extend_from_slice(&piece);
        if body.len() > MAX_ANSWER {
            return None;
        }
    }
    let is_ok = session.response_header().is_some_and(|head| head.status == http::StatusCode::OK);
    session.shutdown().await;
    String::from_utf8(body).ok().filter(|_| is_ok)
}

fn standings(text: &str) -> Standings {
    let mut standings = Standings::new();
    for sample in samples(text, "tollgate_upstream_in_flight") {
        let Some(name) = sample.label("upstream") else { continue };
        // Written from an integer, which is what it is.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let in_flight = sample.value as u64;
        standings.entry(name.to_owned()).or_default().in_flight = in_flight;
    }
    for sample in samples(text, "tollgate_upstream_state").filter(|sample| sample.value > 0.0) {
        if let (Some(name), Some(state)) = (sample.label("upstream"), sample.label("state")) {
            standings.entry(name.to_owned()).or_default().state = Some(state.to_owned());
        }
    }
    standings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_upstream_has_its_state_and_what_is_in_flight() {
        let text = "tollgate_upstream_in_flight{upstream=\"a\"} 3\ntollgate_upstream_in_flight{upstream=\"b c\"} 0\n\
                    tollgate_upstream_state{state=\"closed\",upstream=\"a\"} 0\n\
                    tollgate_upstream_state{state=\"cooling\",upstream=\"a\"} 1\n\
                    tollgate_upstream_state{state=\"disabled\",upstream=\"b c\"} 1\n";
        let seen = standings(text);
        let standing = |state: &str, in_flight| Standing { state: Some(state.to_owned()), in_flight };
        assert_eq!((&seen["a"], &seen["b c"]), (&standing("cooling", 3), &standing("disabled", 0)));
        assert_eq!(standings("<html>"), Standings::new());
    }

    #[test]
    fn a_listener_of_every_network_is_reached_over_loopback() {
        for (listens, reached) in [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:1", "[::1]:1"), ("10.0.0.1:2", "10.0.0.1:2")] {
            assert_eq!(reachable(listens.parse().unwrap()), reached.parse().unwrap());
        }
    }

    #[tokio::test]
    async fn who_does_not_answer_at_once_is_not_waited_for() {
        assert_eq!(Running(None).look().await, None);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = Running(Some(listener.local_addr().unwrap()));
        let began = std::time::Instant::now();
        assert_eq!(silent.look().await, None);
        assert!(began.elapsed() < PATIENCE * 4, "{:?}", began.elapsed());
        drop(listener);
        assert_eq!(silent.look().await, None);
        assert!(silent.silence().starts_with("no gateway answers at 127.0.0.1:"));
    }
}
