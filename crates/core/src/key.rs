//! Keys that tollgate issues: their text form, their hash, and what the key directory knows of each.
//!
//! A key is `tg-` and 43 characters of base64url: 256 random bits. It is shown once and stored only as its SHA-256,
//! next to a short visible prefix. A slow, salted hash would add nothing: it protects guessable secrets, and 2^256
//! cannot be guessed; it would cost every request milliseconds.

use std::{net::IpAddr, sync::Arc};

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    content::ContentMode,
    glob,
    id::KeyId,
    limit::{Limits, ModelLimits},
    secret::Secret,
    user::User,
};

/// What every key begins with.
pub const KEY_MARK: &str = "tg-";
/// Length of a key in characters.
pub const KEY_LEN: usize = KEY_MARK.len() + 43;
/// How many characters of a key stay visible, [`KEY_MARK`] included.
pub const PREFIX_LEN: usize = 10;

/// A key as its holder has it. Exists only while it is being shown or checked.
#[derive(Clone, Debug)]
pub struct ApiKey(Secret);

impl ApiKey {
    /// Makes a key out of 32 random bytes.
    #[must_use]
    pub fn from_random(bytes: &[u8; 32]) -> Self {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut text = String::with_capacity(KEY_LEN);
        text.push_str(KEY_MARK);
        let (mut acc, mut bits) = (0_u32, 0_u32);
        for &byte in bytes {
            acc = (acc << 8) | u32::from(byte);
            bits += 8;
            while bits >= 6 {
                bits -= 6;
                text.push(char::from(ALPHABET[(acc >> bits) as usize & 63]));
            }
        }
        text.push(char::from(ALPHABET[(acc << (6 - bits)) as usize & 63]));
        Self(Secret::new(text))
    }

    /// The text to show, once.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose()
    }

    /// The visible prefix that lists and logs may show.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.0.expose()[..PREFIX_LEN]
    }

    /// What is stored.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(self.0.expose().as_bytes())
    }
}

/// SHA-256 of a key: what the database and the key directory hold instead of it.
///
/// Equality takes the same time wherever the first difference is.
#[derive(Clone, Copy, Eq)]
pub struct KeyHash(pub [u8; 32]);

impl KeyHash {
    /// Hashes a presented key.
    #[must_use]
    pub fn of(presented: &[u8]) -> Self {
        Self(Sha256::digest(presented).into())
    }
}

impl PartialEq for KeyHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl std::hash::Hash for KeyHash {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        // Eight bytes of a SHA-256 spread as well as thirty-two.
        state.write(&self.0[..8]);
    }
}

impl std::fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyHash(..)")
    }
}

/// Is `presented` of the form of a key? Anything else need not be hashed.
#[must_use]
pub fn looks_like_key(presented: &[u8]) -> bool {
    presented.len() == KEY_LEN
        && presented.starts_with(KEY_MARK.as_bytes())
        && presented[KEY_MARK.len()..].iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// What the key directory holds of one key: everything a request needs, resolved.
#[derive(Clone, Debug)]
pub struct KeyEntry {
    /// Row of `api_keys`.
    pub id: KeyId,
    /// Its name, unique within its user.
    pub name: String,
    /// Visible prefix, for logs.
    pub prefix: String,
    /// Who owns it.
    pub user: Arc<User>,
    /// Models it may use; patterns with `*`; empty: every model.
    pub models: Vec<String>,
    /// Addresses it may be used from; empty: any.
    pub allow_ip: Vec<IpNet>,
    /// Limits of this key where they differ from the default.
    pub limits: Limits,
    /// Limits of single models within this key.
    pub model_limits: Vec<ModelLimits>,
    /// What is kept of the content of its requests, where it differs from what its user says.
    pub audit_content: Option<ContentMode>,
    /// When it ceases to work.
    pub expires_at: Option<DateTime<Utc>>,
    /// Since when it no longer works.
    pub revoked_at: Option<DateTime<Utc>>,
}

impl KeyEntry {
    /// May this key use `model`?
    #[must_use]
    pub fn allows_model(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|pattern| glob::matches(pattern, model))
    }

    /// May this key be used from `ip`?
    #[must_use]
    pub fn allows_ip(&self, ip: IpAddr) -> bool {
        self.allow_ip.is_empty() || self.allow_ip.iter().any(|net| net.contains(ip))
    }
}

/// An address or a network in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpNet {
    addr: IpAddr,
    bits: u8,
}

impl IpNet {
    /// Parses `10.0.0.0/8`, `2001:db8::/32` or a single address.
    ///
    /// # Errors
    /// A sentence that says what is wrong with `text`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (addr, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let addr: IpAddr =
            addr.parse().map_err(|_| format!("{text:?} is not an IP address or network, such as 10.0.0.0/8"))?;
        let max = if addr.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => max,
            Some(b) => b
                .parse::<u8>()
                .ok()
                .filter(|b| *b <= max)
                .ok_or_else(|| format!("{text:?}: the part after / must be 0 to {max}"))?,
        };
        Ok(Self { addr, bits })
    }

    /// Is `ip` in this network? An IPv4 address mapped into IPv6 counts as IPv4.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.addr, ip.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => same_bits(u32::from(net).into(), u32::from(ip).into(), 32, self.bits),
            (IpAddr::V6(net), IpAddr::V6(ip)) => same_bits(net.into(), ip.into(), 128, self.bits),
            _ => false,
        }
    }
}

impl std::fmt::Display for IpNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.addr, self.bits)
    }
}

fn same_bits(a: u128, b: u128, width: u32, bits: u8) -> bool {
    bits == 0 || (a ^ b) >> (width - u32::from(bits)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_promised_form() {
        let key = ApiKey::from_random(&[0xff; 32]);
        assert_eq!(key.expose(), format!("tg-{}8", "_".repeat(42)));
        assert_eq!(key.expose().len(), KEY_LEN);
        assert!(looks_like_key(key.expose().as_bytes()));
        assert_eq!(key.prefix(), "tg-_______");
        assert_eq!(key.hash(), KeyHash::of(key.expose().as_bytes()));
    }

    #[test]
    fn what_is_not_a_key_is_told_apart_without_hashing() {
        for text in ["", "tg-", "sk-abc", &"x".repeat(KEY_LEN), &format!("tg-{}", "é".repeat(21))] {
            assert!(!looks_like_key(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn networks_contain_what_they_should() {
        let cases = [
            ("10.0.0.0/8", "10.255.1.2", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "1.2.3.4", true),
            ("192.168.1.7", "192.168.1.7", true),
            ("192.168.1.7", "192.168.1.8", false),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("10.0.0.0/8", "::ffff:10.1.1.1", true),
            ("10.0.0.0/8", "::1", false),
        ];
        for (net, ip, expected) in cases {
            assert_eq!(IpNet::parse(net).unwrap().contains(ip.parse().unwrap()), expected, "{net} {ip}");
        }
        for bad in ["", "10.0.0.0/33", "::/129", "a/8", "10.0.0.0/-1"] {
            assert!(IpNet::parse(bad).is_err(), "{bad}");
        }
    }
}
