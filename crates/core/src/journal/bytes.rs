//! Numbers and texts of entries, as bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use chrono::{DateTime, Utc};

use crate::{
    limit::{
        Amount,
        hold::{Classes, Hold},
    },
    usage::Usage,
};

/// The length that stands for no text at all.
const NONE: u16 = u16::MAX;

pub(super) fn put<const N: usize>(out: &mut Vec<u8>, bytes: [u8; N]) {
    out.extend_from_slice(&bytes);
}

/// To the microsecond, as precise as the database: it is a part of the key there.
pub(super) fn put_time(out: &mut Vec<u8>, time: DateTime<Utc>) {
    put(out, time.timestamp_micros().to_le_bytes());
}

pub(super) fn put_ip(out: &mut Vec<u8>, ip: Option<IpAddr>) {
    match ip {
        None => out.push(0),
        Some(IpAddr::V4(ip)) => {
            out.push(4);
            put(out, ip.octets());
        }
        Some(IpAddr::V6(ip)) => {
            out.push(6);
            put(out, ip.octets());
        }
    }
}

/// The numbers that the first version knew.
pub(super) fn put_usage(out: &mut Vec<u8>, usage: &Usage, cost_nano_usd: u64) {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens, .. } = *usage;
    for number in [prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens, cost_nano_usd] {
        put(out, number.to_le_bytes());
    }
}

/// The others, at the end of an entry.
pub(super) fn put_more_usage(out: &mut Vec<u8>, usage: &Usage) {
    let Usage { cache_write_tokens, output_audio_tokens, image_tokens, output_image_tokens, .. } = *usage;
    for number in [cache_write_tokens, output_audio_tokens, image_tokens, output_image_tokens] {
        put(out, number.to_le_bytes());
    }
}

pub(super) fn put_hold(out: &mut Vec<u8>, hold: &Hold) {
    put(out, [hold.quotas.bits(), hold.shared.bits(), hold.session.is_some().into(), hold.is_counted.into()]);
    put(out, hold.session.unwrap_or(0).to_le_bytes());
    put(out, hold.amount.tokens.to_le_bytes());
    put(out, hold.amount.nano_usd.to_le_bytes());
}

pub(super) fn put_text(out: &mut Vec<u8>, text: Option<&str>, most: usize) {
    let Some(text) = text else { return put(out, NONE.to_le_bytes()) };
    let text = &text[..text.floor_char_boundary(most)];
    put(out, u16::try_from(text.len()).unwrap_or(0).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// What is left of a payload that is being read.
pub(super) struct Input<'t>(pub(super) &'t [u8]);

impl<'t> Input<'t> {
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(super) fn small(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn time(&mut self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp_micros(i64::from_le_bytes(self.take()?))
    }

    pub(super) fn ip(&mut self) -> Option<Option<IpAddr>> {
        Some(match self.byte()? {
            4 => Some(Ipv4Addr::from(self.take::<4>()?).into()),
            6 => Some(Ipv6Addr::from(self.take::<16>()?).into()),
            _ => None,
        })
    }

    pub(super) fn usage(&mut self) -> Option<(Usage, u64)> {
        let usage = Usage {
            prompt_tokens: self.number()?,
            completion_tokens: self.number()?,
            cached_tokens: self.number()?,
            reasoning_tokens: self.number()?,
            audio_tokens: self.number()?,
            ..Usage::default()
        };
        Some((usage, self.number()?))
    }

    /// Completes what [`usage`](Self::usage) read.
    pub(super) fn more_usage(&mut self, usage: &mut Usage) -> Option<()> {
        usage.cache_write_tokens = self.number()?;
        usage.output_audio_tokens = self.number()?;
        usage.image_tokens = self.number()?;
        usage.output_image_tokens = self.number()?;
        Some(())
    }

    /// Is there nothing left?
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn hold(&mut self) -> Option<Hold> {
        let [quotas, shared, has_session, is_counted] = self.take()?;
        let session = self.small()?;
        let amount = Amount { tokens: self.number()?, nano_usd: self.number()? };
        Some(Hold {
            quotas: Classes::from_bits(quotas),
            shared: Classes::from_bits(shared),
            amount,
            session: (has_session != 0).then_some(session),
            is_counted: is_counted != 0,
        })
    }

    /// The inner `None`: there is no text.
    pub(super) fn text(&mut self) -> Option<Option<&'t str>> {
        let length = u16::from_le_bytes(self.take()?);
        if length == NONE {
            return Some(None);
        }
        let (text, rest) = self.0.split_at_checked(usize::from(length))?;
        self.0 = rest;
        std::str::from_utf8(text).ok().map(Some)
    }
}
