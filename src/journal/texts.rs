//! Texts whose tokens are to be counted, because no provider reported any.
//!
//! They wait in memory, bounded by their bytes: what finds no room keeps the numbers that were guessed from its length. A text
//! stays until it is counted, so that whoever counts may be stopped at any time.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use tokio::sync::Notify;
use tollgate_core::{
    openai::sse::StreamedOutput,
    price::{Price, Tier},
    route::Dialect,
    usage::Usage,
};
use uuid::Uuid;

use super::lock;

/// Bytes of texts that may wait.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// What is needed to count tokens when the provider reported none.
#[derive(Debug)]
pub struct Uncounted {
    /// Of which request.
    pub request_id: Uuid,
    /// By which model, which decides on the tokenizer.
    pub model: Arc<str>,
    /// What its tokens cost at the time of the request, if anybody knows.
    pub price: Option<Arc<Price>>,
    /// In which tier.
    pub tier: Tier,
    /// How to read both texts.
    pub dialect: Dialect,
    /// The request's body.
    pub prompt: Bytes,
    /// The answer, as the meter kept it.
    pub output: Output,
}

impl Uncounted {
    /// What `usage` costs, in nano-dollars.
    #[must_use]
    pub fn cost_nano_usd(&self, usage: &Usage) -> u64 {
        self.price.as_ref().map_or(0, |price| price.cost_nano_usd(usage, self.tier))
    }
}

/// An answer as far as it is known.
#[derive(Debug)]
pub enum Output {
    /// Nothing was produced.
    None,
    /// A JSON answer.
    Json(Bytes),
    /// The collected deltas of a stream.
    Stream(StreamedOutput),
}

impl Output {
    /// Tokens by the length of the text, four bytes each, as English has them.
    #[must_use]
    pub fn rough_tokens(&self) -> u64 {
        self.len() as u64 / 4
    }

    fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Json(body) => body.len(),
            Self::Stream(deltas) => usize::try_from(deltas.kept_bytes()).unwrap_or(usize::MAX),
        }
    }
}

impl Uncounted {
    fn bytes(&self) -> usize {
        self.prompt.len().saturating_add(self.output.len())
    }
}

/// The texts that wait.
#[derive(Debug, Default)]
pub(super) struct Texts {
    waiting: Mutex<Waiting>,
    added: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    texts: VecDeque<Arc<Uncounted>>,
    bytes: usize,
}

impl Texts {
    /// Takes room for a text that is about to be [added](Self::add); `false`: there is none.
    pub(super) fn reserve(&self, text: &Uncounted) -> bool {
        let mut waiting = lock(&self.waiting);
        let bytes = waiting.bytes.saturating_add(text.bytes());
        let fits = bytes <= MAX_BYTES;
        if fits {
            waiting.bytes = bytes;
        }
        fits
    }

    /// Adds a text for which room was taken.
    pub(super) fn add(&self, text: Uncounted) {
        lock(&self.waiting).texts.push_back(Arc::new(text));
        self.added.notify_one();
    }

    /// The one that waits longest.
    pub(super) fn first(&self) -> Option<Arc<Uncounted>> {
        lock(&self.waiting).texts.front().cloned()
    }

    /// The one that waits longest, as soon as there is one.
    pub(super) async fn next(&self) -> Arc<Uncounted> {
        loop {
            let added = self.added.notified();
            match self.first() {
                Some(text) => return text,
                None => added.await,
            }
        }
    }

    /// It is counted.
    pub(super) fn done(&self, request_id: Uuid) {
        let mut waiting = lock(&self.waiting);
        if waiting.texts.front().is_some_and(|text| text.request_id == request_id)
            && let Some(text) = waiting.texts.pop_front()
        {
            waiting.bytes -= text.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(n: u128, bytes: usize) -> Uncounted {
        Uncounted {
            request_id: Uuid::from_u128(n),
            model: "m".into(),
            price: None,
            tier: Tier::Standard,
            dialect: Dialect::Chat,
            prompt: vec![0; bytes].into(),
            output: Output::None,
        }
    }

    #[test]
    fn texts_wait_in_order_until_they_are_counted_and_are_bounded() {
        let texts = Texts::default();
        for n in 0..4 {
            let text = text(n, MAX_BYTES / 4);
            assert!(texts.reserve(&text));
            texts.add(text);
        }
        assert!(!texts.reserve(&text(4, 1)));
        let first = || texts.first().map(|text| text.request_id.as_u128());
        assert_eq!((first(), first()), (Some(0), Some(0)), "until it is counted");
        texts.done(Uuid::from_u128(0));
        texts.done(Uuid::from_u128(0));
        assert_eq!(first(), Some(1));
        assert!(texts.reserve(&text(4, MAX_BYTES / 4)));
    }
}
