//! Entries: what the payload of a frame says.
//!
//! Each begins with its kind and the id of its request. Numbers are fixed in width and little endian; a text is its length and
//! its UTF-8. An [`End`] says all that a row needs, so it is worth as much without its [`Begin`]. What is read is borrowed
//! from the bytes.
//!
//! A later version may add kinds, which are passed over here, and may add fields behind those that are known, which are not
//! looked at. What an earlier version wrote ends before the fields that were added since, and those are as if never set. Other
//! changes need a new version of the [segment](super::segment).

use std::{borrow::Cow, net::IpAddr};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::bytes::{Input, put, put_hold, put_ip, put_more_usage, put_text, put_time, put_usage};
use crate::{
    id::{KeyId, UserId},
    limit::hold::Hold,
    usage::{Usage, UsageRecord},
};

/// Longest text, in bytes; longer ones are cut. The database cuts them further.
pub const MAX_TEXT: usize = 1024;
/// Longest list of attempts. There are few, and all texts in them are short.
const MAX_ATTEMPTS: usize = 16 * 1024;
/// Code of a request that the process did not outlive.
pub const INTERRUPTED: &str = "interrupted";

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request was admitted.
    Begin,
    /// It is over.
    End,
    /// It is over, and its tokens are still being counted: a [`Count`] will follow.
    UncountedEnd,
    /// Its tokens are counted.
    Count,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Begin => 1,
            Self::End => 2,
            Self::UncountedEnd => 3,
            Self::Count => 4,
        }
    }
}

/// Kind and request of an entry; `None`: a kind that is not known, or no entry.
#[must_use]
pub fn peek(payload: &[u8]) -> Option<(Kind, Uuid)> {
    let kinds = [Kind::Begin, Kind::End, Kind::UncountedEnd, Kind::Count];
    let kind = kinds.into_iter().find(|kind| Some(&kind.byte()) == payload.first())?;
    Some((kind, Uuid::from_bytes(*payload[1..].first_chunk()?)))
}

/// What is behind kind and id of an entry, which must be of this kind.
fn open(payload: &[u8], kind: Kind) -> Option<(Input<'_>, Uuid)> {
    let (is, request_id) = peek(payload)?;
    (is == kind).then(|| (Input(&payload[17..]), request_id))
}

/// An admitted request, with what it may consume.
#[derive(Clone, Debug, PartialEq)]
pub struct Begin<'t> {
    /// Its id.
    pub request_id: Uuid,
    /// When it arrived.
    pub started_at: DateTime<Utc>,
    /// Who asked.
    pub user_id: UserId,
    /// With which key.
    pub key_id: KeyId,
    /// From where.
    pub ip: Option<IpAddr>,
    /// Route, as in the metrics.
    pub route: &'t str,
    /// Model that was asked for.
    pub model: &'t str,
    /// Is it to be a streamed answer?
    pub stream: bool,
    /// Estimated tokens of the prompt.
    pub prompt_tokens: u64,
    /// Estimated tokens of the answer.
    pub output_tokens: u64,
    /// What they would cost.
    pub cost_nano_usd: u64,
}

/// A request that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct End<'t> {
    /// Its row.
    pub record: UsageRecord<'t>,
    /// Are its tokens still being counted? Until then, those of the record are rough.
    pub is_uncounted: bool,
    /// What it holds of quotas until it is booked.
    pub hold: Option<Hold>,
}

/// Tokens that no provider reported, counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Of which request.
    pub request_id: Uuid,
    /// How many.
    pub usage: Usage,
    /// What they cost.
    pub cost_nano_usd: u64,
}

impl<'t> Begin<'t> {
    /// Appends it to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(Kind::Begin.byte());
        out.extend_from_slice(self.request_id.as_bytes());
        put_time(out, self.started_at);
        put(out, self.user_id.0.to_le_bytes());
        put(out, self.key_id.0.to_le_bytes());
        put_ip(out, self.ip);
        out.push(self.stream.into());
        for number in [self.prompt_tokens, self.output_tokens, self.cost_nano_usd] {
            put(out, number.to_le_bytes());
        }
        put_text(out, Some(self.route), MAX_TEXT);
        put_text(out, Some(self.model), MAX_TEXT);
    }

    /// Reads it.
    #[must_use]
    pub fn read(payload: &'t [u8]) -> Option<Self> {
        let (mut input, request_id) = open(payload, Kind::Begin)?;
        Some(Self {
            request_id,
            started_at: input.time()?,
            user_id: UserId(input.number()?.cast_signed()),
            key_id: KeyId(input.number()?.cast_signed()),
            ip: input.ip()?,
            stream: input.byte()? != 0,
            prompt_tokens: input.number()?,
            output_tokens: input.number()?,
            cost_nano_usd: input.number()?,
            route: input.text()??,
            model: input.text()??,
        })
    }

    /// The row of a request of which nothing more is known: the process ended before it did. It may have consumed what was
    /// estimated, so that is what it is booked with.
    #[must_use]
    pub fn interrupted(&self) -> UsageRecord<'t> {
        UsageRecord {
            request_id: self.request_id,
            started_at: self.started_at,
            user_id: self.user_id,
            key_id: self.key_id,
            ip: self.ip,
            route: Cow::Borrowed(self.route),
            model: Cow::Borrowed(self.model),
            upstream_model: None,
            served_model: None,
            upstream: None,
            attempts: Cow::Borrowed("[]"),
            status: 0,
            stream: self.stream,
            code: Some(Cow::Borrowed(INTERRUPTED)),
            service_tier: None,
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.output_tokens,
                ..Usage::default()
            },
            estimated: true,
            interrupted: true,
            cost_nano_usd: self.cost_nano_usd,
            ttft_ms: None,
            duration_ms: 0,
            overhead_us: 0,
            finish_reason: None,
            user_agent: None,
            client_request_id: None,
            provider_request_id: None,
        }
    }
}

const STREAM: u8 = 1;
const ESTIMATED: u8 = 2;
const WAS_INTERRUPTED: u8 = 4;
const HAS_FIRST_BYTE: u8 = 8;
const HAS_HOLD: u8 = 16;

impl<'t> End<'t> {
    /// Appends it to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let record = &self.record;
        out.push(if self.is_uncounted { Kind::UncountedEnd } else { Kind::End }.byte());
        out.extend_from_slice(record.request_id.as_bytes());
        put_time(out, record.started_at);
        put(out, record.user_id.0.to_le_bytes());
        put(out, record.key_id.0.to_le_bytes());
        put_ip(out, record.ip);
        out.push(self.flags());
        put(out, record.status.to_le_bytes());
        put_usage(out, &record.usage, record.cost_nano_usd);
        for number in [record.ttft_ms.unwrap_or(0), record.duration_ms, record.overhead_us] {
            put(out, number.to_le_bytes());
        }
        if let Some(hold) = &self.hold {
            put_hold(out, hold);
        }
        put_text(out, Some(&record.route), MAX_TEXT);
        put_text(out, Some(&record.model), MAX_TEXT);
        let attempts = if record.attempts.len() <= MAX_ATTEMPTS { &record.attempts } else { "[]" };
        put_text(out, Some(attempts), MAX_ATTEMPTS);
        for text in [
            &record.upstream_model,
            &record.upstream,
            &record.code,
            &record.finish_reason,
            &record.user_agent,
            &record.client_request_id,
            &record.provider_request_id,
        ] {
            put_text(out, text.as_deref(), MAX_TEXT);
        }
        put_more_usage(out, &record.usage);
        put_text(out, record.served_model.as_deref(), MAX_TEXT);
        put_text(out, record.service_tier.as_deref(), MAX_TEXT);
    }

    fn flags(&self) -> u8 {
        let record = &self.record;
        [
            (STREAM, record.stream),
            (ESTIMATED, record.estimated),
            (WAS_INTERRUPTED, record.interrupted),
            (HAS_FIRST_BYTE, record.ttft_ms.is_some()),
            (HAS_HOLD, self.hold.is_some()),
        ]
        .into_iter()
        .fold(0, |flags, (flag, is_set)| if is_set { flags | flag } else { flags })
    }

    /// Reads it, counted or not.
    #[must_use]
    pub fn read(payload: &'t [u8]) -> Option<Self> {
        let (kind, _) = peek(payload)?;
        if !matches!(kind, Kind::End | Kind::UncountedEnd) {
            return None;
        }
        let (mut input, request_id) = open(payload, kind)?;
        let started_at = input.time()?;
        let (user_id, key_id) = (UserId(input.number()?.cast_signed()), KeyId(input.number()?.cast_signed()));
        let ip = input.ip()?;
        let flags = input.byte()?;
        let has = |flag| flags & flag != 0;
        let status = u16::from_le_bytes(input.take()?);
        let (usage, cost_nano_usd) = input.usage()?;
        let (ttft_ms, duration_ms, overhead_us) = (input.small()?, input.small()?, input.small()?);
        let hold = if has(HAS_HOLD) { Some(input.hold()?) } else { None };
        let mut text = || input.text().map(|text| text.map(Cow::Borrowed));
        let mut record = UsageRecord {
            request_id,
            started_at,
            user_id,
            key_id,
            ip,
            route: text()??,
            model: text()??,
            attempts: text()??,
            upstream_model: text()?,
            served_model: None,
            upstream: text()?,
            status,
            stream: has(STREAM),
            code: text()?,
            service_tier: None,
            usage,
            estimated: has(ESTIMATED),
            interrupted: has(WAS_INTERRUPTED),
            cost_nano_usd,
            ttft_ms: has(HAS_FIRST_BYTE).then_some(ttft_ms),
            duration_ms,
            overhead_us,
            finish_reason: text()?,
            user_agent: text()?,
            client_request_id: text()?,
            provider_request_id: text()?,
        };
        if !input.is_empty() {
            input.more_usage(&mut record.usage)?;
            record.served_model = input.text()?.map(Cow::Borrowed);
            record.service_tier = input.text()?.map(Cow::Borrowed);
        }
        Some(Self { record, is_uncounted: kind == Kind::UncountedEnd, hold })
    }
}

impl Count {
    /// Appends it to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(Kind::Count.byte());
        out.extend_from_slice(self.request_id.as_bytes());
        put_usage(out, &self.usage, self.cost_nano_usd);
        put_more_usage(out, &self.usage);
    }

    /// Reads it.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<Self> {
        let (mut input, request_id) = open(payload, Kind::Count)?;
        let (mut usage, cost_nano_usd) = input.usage()?;
        if !input.is_empty() {
            input.more_usage(&mut usage)?;
        }
        Some(Self { request_id, usage, cost_nano_usd })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limit::{Amount, hold::Classes};

    fn text() -> impl Strategy<Value = Cow<'static, str>> {
        ".{0,20}".prop_map(Cow::Owned)
    }

    fn ip() -> impl Strategy<Value = Option<IpAddr>> {
        prop_oneof![
            Just(None),
            any::<[u8; 4]>().prop_map(|ip| Some(ip.into())),
            any::<[u8; 16]>().prop_map(|ip| Some(ip.into())),
        ]
    }

    fn time() -> impl Strategy<Value = DateTime<Utc>> {
        (0..4_000_000_000_000_000_i64).prop_map(|micros| DateTime::from_timestamp_micros(micros).unwrap())
    }

    fn usage() -> impl Strategy<Value = Usage> {
        any::<([u64; 5], [u64; 4])>().prop_map(|(known, more)| {
            let [prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens] = known;
            let [cache_write_tokens, output_audio_tokens, image_tokens, output_image_tokens] = more;
            Usage {
                prompt_tokens,
                completion_tokens,
                cached_tokens,
                cache_write_tokens,
                reasoning_tokens,
                audio_tokens,
                output_audio_tokens,
                image_tokens,
                output_image_tokens,
            }
        })
    }

    fn hold() -> impl Strategy<Value = Option<Hold>> {
        let hold = any::<(u8, u8, u64, u64, Option<u32>, bool)>();
        prop::option::of(hold.prop_map(|(quotas, shared, tokens, nano_usd, session, is_counted)| Hold {
            quotas: Classes::from_bits(quotas),
            shared: Classes::from_bits(shared),
            amount: Amount { tokens, nano_usd },
            session,
            is_counted,
        }))
    }

    prop_compose! {
        fn end()(
            (id, user, key, status, stream, estimated, interrupted, cost) in
                any::<(u128, i64, i64, u16, bool, bool, bool, u64)>(),
            (ttft_ms, duration_ms, overhead_us, is_uncounted) in any::<(Option<u32>, u32, u32, bool)>(),
            started_at in time(),
            ip in ip(),
            usage in usage(),
            hold in hold(),
            texts in prop::array::uniform3(text()),
            optional in prop::array::uniform9(prop::option::of(text())),
        ) -> End<'static> {
            let [route, model, attempts] = texts;
            let [upstream_model, served_model, upstream, code, service_tier, finish_reason, user_agent,
                client_request_id, provider_request_id] = optional;
            let record = UsageRecord {
                request_id: Uuid::from_u128(id), started_at, user_id: UserId(user), key_id: KeyId(key), ip, route, model,
                upstream_model, served_model, upstream, attempts, status, stream, code, service_tier, usage, estimated,
                interrupted,
                cost_nano_usd: cost, ttft_ms, duration_ms, overhead_us, finish_reason, user_agent, client_request_id,
                provider_request_id,
            };
            End { record, is_uncounted, hold }
        }
    }

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    #[test]
    fn long_texts_are_cut_between_characters_and_every_end_fits_a_frame() {
        let begin = Begin {
            request_id: Uuid::nil(),
            started_at: DateTime::UNIX_EPOCH,
            user_id: UserId(1),
            key_id: KeyId(2),
            ip: None,
            route: "r",
            model: &"\u{20ac}".repeat(1000),
            stream: true,
            prompt_tokens: 1,
            output_tokens: 2,
            cost_nano_usd: 3,
        };
        let bytes = written(|out| begin.write(out));
        assert_eq!(Begin::read(&bytes).unwrap().model, "\u{20ac}".repeat(341), "three bytes each");
        let long = || Cow::Owned("x".repeat(100_000));
        let record = UsageRecord {
            route: long(),
            model: long(),
            attempts: long(),
            upstream_model: Some(long()),
            served_model: Some(long()),
            upstream: Some(long()),
            code: Some(long()),
            service_tier: Some(long()),
            finish_reason: Some(long()),
            user_agent: Some(long()),
            client_request_id: Some(long()),
            provider_request_id: Some(long()),
            ..begin.interrupted()
        };
        let end = End { record, is_uncounted: false, hold: Some(Hold::default()) };
        let bytes = written(|out| end.write(out));
        assert!(bytes.len() < super::super::frame::MAX_PAYLOAD);
        assert_eq!(End::read(&bytes).unwrap().record.attempts, "[]", "half of a list is none");
        let attempts = "y".repeat(MAX_ATTEMPTS).into();
        let end = End { record: UsageRecord { attempts, ..end.record }, ..end };
        assert!(written(|out| end.write(out)).len() < super::super::frame::MAX_PAYLOAD);
    }

    /// As the version before wrote them: without what was added since.
    fn old(bytes: &[u8], added: usize) -> &[u8] {
        &bytes[..bytes.len() - added]
    }

    #[test]
    fn an_entry_of_an_earlier_version_is_read_without_what_was_added_since() {
        // The very bytes, so that no change of the code can go unnoticed.
        let hex = "020000000000000000000000000000000740f2a6d4e8000000010000000000000002000000000000000007c8000900000000\
                   00000005000000000000000400000000000000020000000000000001000000000000000a0000000000000000000000140000\
                   002c01000001007201006d02005b5dffff010075ffffffffffffffffffff";
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        let written: Vec<u8> = hex.as_bytes().chunks(2).map(byte).collect();
        let End { record, .. } = End::read(&written).unwrap();
        let usage = Usage {
            prompt_tokens: 9,
            completion_tokens: 5,
            cached_tokens: 4,
            reasoning_tokens: 2,
            audio_tokens: 1,
            ..Usage::default()
        };
        assert_eq!((record.usage, record.cost_nano_usd, record.upstream.as_deref()), (usage, 10, Some("u")));
        assert_eq!((record.served_model, record.service_tier), (None, None));
        assert_eq!((record.request_id, record.duration_ms), (Uuid::from_u128(7), 20));
    }

    proptest! {
        #[test]
        fn an_end_of_an_earlier_version_is_read(mut end in end()) {
            (end.record.served_model, end.record.service_tier) = (None, None);
            let bytes = written(|out| end.write(out));
            let usage = &mut end.record.usage;
            (usage.cache_write_tokens, usage.output_audio_tokens) = (0, 0);
            (usage.image_tokens, usage.output_image_tokens) = (0, 0);
            let count = Count { request_id: end.record.request_id, usage: *usage, cost_nano_usd: 3 };
            prop_assert_eq!(End::read(old(&bytes, 4 * 8 + 2 * 2)), Some(end));
            prop_assert_eq!(Count::read(old(&written(|out| count.write(out)), 4 * 8)), Some(count));
        }

        #[test]
        fn an_end_is_read_as_it_was_written(end in end(), more in prop::collection::vec(any::<u8>(), 0..9)) {
            let mut bytes = written(|out| end.write(out));
            bytes.extend(more);
            prop_assert_eq!(peek(&bytes).unwrap().1, end.record.request_id);
            prop_assert_eq!(End::read(&bytes), Some(end));
            prop_assert_eq!(Begin::read(&bytes), None);
        }

        #[test]
        fn begins_and_counts_are_read_as_they_were_written(
            (id, user, key, stream, numbers) in any::<(u128, i64, i64, bool, [u64; 3])>(),
            (started_at, ip, usage) in (time(), ip(), usage()),
            (route, model) in (".{0,20}", ".{0,20}"),
        ) {
            let [prompt_tokens, output_tokens, cost_nano_usd] = numbers;
            let request_id = Uuid::from_u128(id);
            let begin = Begin {
                request_id, started_at, user_id: UserId(user), key_id: KeyId(key), ip, route: &route, model: &model,
                stream, prompt_tokens, output_tokens, cost_nano_usd,
            };
            let bytes = written(|out| begin.write(out));
            prop_assert_eq!(peek(&bytes), Some((Kind::Begin, request_id)));
            prop_assert_eq!(Begin::read(&bytes), Some(begin));
            let count = Count { request_id, usage, cost_nano_usd };
            let bytes = written(|out| count.write(out));
            prop_assert_eq!(Count::read(&bytes), Some(count));
        }

        #[test]
        fn garbage_is_no_entry_and_no_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300),
            kind in 0..6_u8,
            cut in any::<prop::sample::Index>(),
            end in end(),
        ) {
            if let Some(first) = bytes.first_mut() { *first = kind }
            let whole = written(|out| end.write(out));
            for bytes in [&bytes[..], &whole[..cut.index(whole.len())]] {
                let _ = (peek(bytes), Begin::read(bytes), End::read(bytes), Count::read(bytes));
            }
        }
    }
}
