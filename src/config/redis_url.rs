//! The address of Redis: one server, a socket, or some nodes of a cluster.
//!
//! Checked by hand, because the Redis client belongs to the limiter alone, and because its messages may quote what is
//! written: a URL may hold a password, so no message here repeats any part of one.

use tollgate_core::secret::Secret;

const FORMS: &str = "\"redis://host:6379\", \"rediss://user:password@host\" or \"unix:///run/redis/redis.sock\"";

/// What the nodes of a cluster must agree on.
#[derive(PartialEq, Eq)]
struct Server<'t> {
    scheme: &'t str,
    user: Option<&'t str>,
    database: u32,
}

/// Parses one URL, or several with commas between them; nothing: there is no Redis.
///
/// # Errors
/// A sentence that says what is wrong, without what is written.
pub(super) fn parse(text: &str) -> Result<Option<Secret>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let urls: Vec<&str> = text.split(',').map(str::trim).collect();
    let servers = urls.iter().map(|url| server(url)).collect::<Result<Vec<_>, _>>()?;
    if let [first, _, ..] = &servers[..] {
        check_cluster(first, &servers)?;
    }
    Ok(Some(Secret::new(urls.join(","))))
}

fn check_cluster(first: &Server<'_>, servers: &[Server<'_>]) -> Result<(), String> {
    if servers.iter().any(|server| !server.scheme.starts_with("redis") || server.scheme.contains("unix")) {
        return Err(
            "names a socket among several servers: the nodes of a cluster are reached over the network".to_owned()
        );
    }
    if servers.iter().any(|server| server.database != 0) {
        return Err("names a database, but a cluster has only number 0: leave it out".to_owned());
    }
    if servers.iter().any(|server| server != first) {
        return Err("must have the same scheme, user and password for every node of the cluster".to_owned());
    }
    Ok(())
}

fn server(url: &str) -> Result<Server<'_>, String> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| format!("is not the URL of a Redis: write {FORMS}"))?;
    if rest.contains('#') || rest.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("contains # or white space: in a password write them as %23 and %20".to_owned());
    }
    match scheme {
        "redis" | "rediss" => over_network(scheme, rest),
        "unix" | "redis+unix" => over_socket(scheme, rest),
        _ => Err(format!("is not the URL of a Redis: write {FORMS}")),
    }
}

fn over_network<'t>(scheme: &'t str, rest: &'t str) -> Result<Server<'t>, String> {
    if rest.contains('?') {
        return Err("contains ?: leave out what follows it, and write it as %3F in a password".to_owned());
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, address) = authority.rsplit_once('@').map_or((None, authority), |(user, address)| (Some(user), address));
    check_address(address)?;
    Ok(Server { scheme, user, database: database(path)? })
}

fn over_socket<'t>(scheme: &'t str, rest: &'t str) -> Result<Server<'t>, String> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if path.len() < 2 || !path.starts_with('/') {
        return Err("names no socket: write three slashes, such as \"unix:///run/redis/redis.sock\"".to_owned());
    }
    let number = query.split('&').find_map(|pair| pair.strip_prefix("db=")).unwrap_or_default();
    Ok(Server { scheme, user: None, database: database(number)? })
}

fn check_address(address: &str) -> Result<(), String> {
    // The last colon, unless it belongs to an IPv6 address.
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (address, None),
    };
    let is_v6 = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let is_host = match is_v6 {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok_and(|ip| !ip.is_unspecified()),
        None => {
            !host.is_empty()
                && host != "0.0.0.0"
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        }
    };
    if !is_host {
        let mend = "write \"redis://host:6379\", and special characters of a password as %2F for /, %40 for @, %2C for a comma";
        return Err(format!("names no host: {mend}"));
    }
    match port {
        Some(port) if port.parse::<u16>().map_or(true, |port| port == 0) => {
            Err("has no port from 1 to 65535 after its host: write \"redis://host:6379\"".to_owned())
        }
        _ => Ok(()),
    }
}

fn database(number: &str) -> Result<u32, String> {
    let wrong = |_| "names a database that is not a number: write \"redis://host:6379/0\"".to_owned();
    if number.is_empty() { Ok(0) } else { number.parse().map_err(wrong) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::parse;

    #[test]
    fn one_server_a_socket_or_nodes_of_a_cluster() {
        assert_eq!(parse(""), Ok(None));
        for (text, expected) in [
            ("redis://localhost", "redis://localhost"),
            ("redis://10.0.0.1:6380/3", "redis://10.0.0.1:6380/3"),
            ("rediss://user:p%40ss@cache.example.com:6379/", "rediss://user:p%40ss@cache.example.com:6379/"),
            ("redis://:p@ss@[::1]:6379", "redis://:p@ss@[::1]:6379"),
            ("redis://[::1]", "redis://[::1]"),
            ("unix:///run/redis.sock?db=2&pass=x", "unix:///run/redis.sock?db=2&pass=x"),
            ("redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
            ("redis://:p@a:1, redis://:p@b:2", "redis://:p@a:1,redis://:p@b:2"),
        ] {
            assert_eq!(
                parse(text).map(|url| url.map(|url| url.expose().to_owned())),
                Ok(Some(expected.into())),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_wrong_is_told_without_the_password() {
        for (text, says) in [
            ("hunter2", "is not the URL of a Redis"),
            ("http://hunter2@host", "is not the URL of a Redis"),
            ("redis://", "names no host"),
            ("redis://:hunter2@", "names no host"),
            ("redis://:hunter2/x@host", "names no host"),
            ("redis://:hunter2,x@host", "names no host"),
            ("redis://0.0.0.0", "names no host"),
            ("redis://[::]", "names no host"),
            ("redis://[hunter2]:1", "names no host"),
            ("redis://:hunter2#x@host", "contains #"),
            ("redis://:hunter2 x@host", "contains #"),
            ("redis://:hunter2?x@host", "contains ?"),
            ("redis://:hunter2@host:port", "has no port"),
            ("redis://:hunter2@host:0", "has no port"),
            ("redis://:hunter2@host:65536", "has no port"),
            ("redis://:hunter2@host/db", "not a number"),
            ("unix://run/hunter2", "names no socket"),
            ("unix:///", "names no socket"),
            ("unix:///run/redis.sock?pass=hunter2&db=x", "not a number"),
            ("redis://:hunter2@a,unix:///b", "names a socket among"),
            ("redis://:hunter2@a/1,redis://:hunter2@b/1", "only number 0"),
            ("redis://:hunter2@a,redis://:other@b", "the same scheme, user and password"),
            ("redis://:hunter2@a,rediss://:hunter2@b", "the same scheme, user and password"),
            ("redis://:hunter2@a,", "is not the URL of a Redis"),
        ] {
            let message = parse(text).expect_err(text);
            assert!(message.contains(says) && !message.contains("hunter2"), "{text}: {message}");
        }
    }

    proptest! {
        #[test]
        fn nothing_crashes(text in "(redis|unix)?(://)?[a:@/,?&=\\[\\]0-9.é]{0,24}") {
            drop(parse(&text));
        }
    }
}
