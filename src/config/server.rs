//! `[server]` and `[tls]`: where the gateway listens, and with which certificate.
//!
//! What would fail at `bind` or in the first handshake is found here: addresses that are taken twice, a key that does not fit
//! its certificate, a certificate that has expired.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread::available_parallelism,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, Utc};
use rustls_pki_types::CertificateDer;
use tollgate_core::key::IpNet;

use super::{
    Server, Tls, files,
    raw::{Place, Reader},
    table::Table,
    validate::{HOUR, MILLISECOND, duration, size},
};

/// A certificate that expires within this time is worth a warning.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 86_400);

/// Reads `[server]`.
pub(super) fn server(reader: &Reader<'_>, table: &mut Table<'_>) -> Server {
    let listen = listeners(table, "listen", vec![loopback(8080)]);
    let tls_listen = listeners(table, "tls_listen", Vec::new());
    let admin =
        table.text("admin_listen", |text| if text.is_empty() { Ok(None) } else { parse_address(text).map(Some) });
    let admin = admin.unwrap_or(Some(loopback(9180))).map(|address| (address, table.place_of("admin_listen")));
    // Not if addresses are there that could not be read: they are noted already.
    if table.has("listen") && table.lists_nothing("listen") && table.lists_nothing("tls_listen") {
        table.problem("listen", "no listener: name at least one address here or in tls_listen");
    }
    check_distinct(reader, listen.iter().chain(&tls_listen).chain(&admin));
    let addresses = |list: Vec<(SocketAddr, Place)>| list.into_iter().map(|(address, _)| address).collect();
    let max_body = size(table, "max_body", 64 << 20, 1 << 10..=1 << 30);
    Server {
        listen: addresses(listen),
        tls_listen: addresses(tls_listen),
        admin_listen: admin.map(|(address, _)| address),
        trusted_proxies: table
            .list("trusted_proxies", IpNet::parse)
            .unwrap_or_default()
            .into_iter()
            .map(|(n, _)| n)
            .collect(),
        max_body_bytes: usize::try_from(max_body).unwrap_or(usize::MAX),
        threads: match table.whole("threads", 0..=1024).unwrap_or(0) {
            0 => available_parallelism().map_or(1, usize::from),
            threads => threads,
        },
        work_stealing: table.boolean("work_stealing").unwrap_or(false),
        client_timeout: duration(table, "client_timeout", Duration::from_secs(60), MILLISECOND..=HOUR),
        grace_period: duration(table, "grace_period", Duration::from_secs(30), Duration::ZERO..=HOUR),
        keepalive_pool: table.whole("keepalive_pool", 1..=65_536).unwrap_or(128),
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

fn listeners(table: &mut Table<'_>, name: &'static str, default: Vec<SocketAddr>) -> Vec<(SocketAddr, Place)> {
    let place = table.place_of(name);
    let default = || default.into_iter().map(|address| (address, place.clone())).collect();
    table.list(name, parse_address).unwrap_or_else(default)
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| match text.rsplit_once(':') {
        Some(("", port)) if port.parse::<u16>().is_ok() => {
            format!("{text:?} names no address: write \"127.0.0.1:{port}\" for this machine only, \"0.0.0.0:{port}\" for every network")
        }
        _ => format!("{text:?} is not an IP address and port, such as \"127.0.0.1:8080\" or \"[::1]:8080\""),
    })
}

/// Two listeners that cannot both be bound are found here, not by the second `bind`.
fn check_distinct<'p>(reader: &Reader<'_>, all: impl Iterator<Item = &'p (SocketAddr, Place)>) {
    let mut seen: Vec<&(SocketAddr, Place)> = Vec::new();
    for entry in all {
        let (address, place) = entry;
        if let Some((other, first)) = seen.iter().find(|(other, _)| overlap(*address, *other)) {
            let why = if address == other {
                format!("{address} is")
            } else {
                format!("{address} overlaps {other}, which is")
            };
            reader.problem(place, format!("{why} taken by {}: use another port", first.setting));
        }
        seen.push(entry);
    }
}

/// `0.0.0.0` stands for every IPv4 address; `[::]` on Linux for those and every IPv6 address.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |any: IpAddr, one: IpAddr| any.is_unspecified() && (any.is_ipv6() || one.is_ipv4());
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
}

/// Reads `[tls]`, the files included; `needed`: there is a TLS listener.
pub(super) fn tls(table: &mut Table<'_>, needed: bool) -> Option<Tls> {
    let mut path = |name| table.text(name, |text| Ok(PathBuf::from(text))).filter(|path| !path.as_os_str().is_empty());
    let (cert, key) = match (path("cert"), path("key")) {
        (Some(cert), Some(key)) => (cert, key),
        (None, None) => {
            if needed {
                table.problem("cert", "is missing: tls_listen needs a certificate, so name its files in cert and key");
            }
            return None;
        }
        (Some(_), None) => {
            table.problem("key", "is missing: cert and key belong together");
            return None;
        }
        (None, Some(_)) => {
            table.problem("cert", "is missing: cert and key belong together");
            return None;
        }
    };
    if !needed {
        table.warning("cert", "is not used: tls_listen names no address");
    }
    // Both files are looked at, also when the first one is bad.
    let chain = files::read_chain(&cert).map_err(|message| table.problem("cert", message));
    let private = files::read_key(&key).map_err(|message| table.problem("key", message));
    let (chain, private) = (chain.ok()?, private.ok()?);
    let expires_at = check_validity(table, &chain[0])?;
    let certified = files::certify(chain, private).map_err(|message| table.problem("key", message)).ok()?;
    Some(Tls { cert, key, certified, expires_at })
}

fn check_validity(table: &Table<'_>, cert: &CertificateDer<'_>) -> Option<SystemTime> {
    let (from, until) = files::validity(cert).map_err(|message| table.problem("cert", message)).ok()?;
    let (now, day) = (SystemTime::now(), |time: SystemTime| DateTime::<Utc>::from(time).format("%Y-%m-%d %H:%M UTC"));
    if until <= now {
        table.problem("cert", format!("expired on {}: renew the certificate", day(until)));
    } else if until <= now + EXPIRES_SOON {
        table.warning("cert", format!("expires on {}: renew the certificate", day(until)));
    }
    if from > now {
        table.warning("cert", format!("is not valid before {}: clients will refuse it until then", day(from)));
    }
    Some(until)
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn addresses_overlap_where_the_second_bind_would_fail() {
        let cases = [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "[::1]:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("0.0.0.0:80", "[::]:80", true),
        ];
        for (a, b, expected) in cases {
            let (x, y) = (a.parse().unwrap(), b.parse().unwrap());
            assert_eq!((overlap(x, y), overlap(y, x)), (expected, expected), "{a} {b}");
        }
    }
}
