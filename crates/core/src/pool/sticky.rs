//! Sticky picks: the same key goes to the same member, in all replicas, without any of them remembering it.
//!
//! Rendezvous hashing (Thaler & Ravishankar, "Using name-based mappings to increase hit rates", 1998): every member gets a
//! score from its name and the key, and the greatest wins. Who leaves takes only its own keys along, since nobody else's
//! score changes. A ring of hashes needs many points per member for even shares, and memory for them; the modulus of a hash
//! moves nearly all keys. With weights (Schindelhauer & Schomaker, "Weighted distributed hash tables", 2005) the score is
//! `-weight / ln(u)`, `u` being the hash as a number between 0 and 1: the member with the greatest score is then each of them
//! with a probability that is its part of the weights, and a weight that grows only attracts keys.
//!
//! Scores depend on the names of members, never on their place in a list, which differs between snapshots. The logarithm
//! may differ in its last digit between machines of different kinds; that moves a key in about 10^15.

/// A member's score for a key. The greatest one wins.
pub(super) fn score(identity: u64, key: u64, weight: u32) -> f64 {
    let hash = mix(identity ^ key);
    // The upper 53 bits, which a float holds exactly, and a half, so that it is neither 0 nor 1.
    let u = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -f64::from(weight) / u.ln()
}

/// The hash of a key's text, or of an upstream's name: the same in every process, on every machine and in every version.
///
/// FNV-1a, then the finaliser of `MurmurHash3`. The standard library's hasher promises none of that, and SHA-256 would cost
/// ten times as much to keep out attackers who gain nothing: who chooses a key may choose where only its own requests go.
/// FNV alone changes the upper bits too little for texts that differ at their end, as names with numbers do; the finaliser
/// mends that.
#[must_use]
pub fn sticky_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    mix(fnv)
}

/// The finaliser of `MurmurHash3`: each bit of the input changes each bit of the output in half of the cases.
fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_the_same_for_ever() {
        // mix(FNV-1a): the published FNV-1a of "" is the offset basis, of "foobar" 0x85944171f73967e8.
        assert_eq!(sticky_hash(b""), mix(0xcbf2_9ce4_8422_2325));
        assert_eq!(sticky_hash(b"foobar"), mix(0x8594_4171_f739_67e8));
        assert_eq!(mix(1), 0xb456_bcfc_34c2_cb2c);
    }

    #[test]
    fn names_with_numbers_are_spread() {
        let mut buckets = [0_u32; 16];
        for n in 0..16_000 {
            let hash = sticky_hash(format!("user-{n}").as_bytes());
            buckets[usize::try_from(hash >> 60).unwrap()] += 1;
        }
        assert!(buckets.iter().all(|count| (850..1_150).contains(count)), "{buckets:?}");
    }

    #[test]
    fn scores_are_numbers_at_the_edges() {
        for identity in [0, 1, u64::MAX, sticky_hash(b"a")] {
            for key in [0, 1, u64::MAX, identity] {
                assert!(score(identity, key, 1) > 0.0);
                assert!(score(identity, key, u32::MAX).is_finite());
            }
        }
    }
}
