//! From collected content to a row that nobody can read without a Fernet key, and back.
//!
//! First what must go is taken out, then what is too long is cut, then both bodies are compressed and encrypted together: cut
//! first, half a card number would be left that is none any more.

use tollgate_core::{
    content::{ContentMode, HashKey, cut, pack, prompt_hash, unpack},
    redact::Redactor,
};

use crate::{
    content::{Captured, MARGIN},
    secrets::{FernetKeys, SecretsError},
    store::ContentRow,
};

/// How hard zstd tries: its own default, some hundreds of megabytes a second.
const LEVEL: i32 = 3;
/// Most that a row is unpacked to, in bytes: what the configuration may allow to be kept, twice, with some room.
const MAX_UNPACKED: usize = 40 << 20;

/// What is needed to make rows.
#[derive(Clone, Debug)]
pub struct Sealer {
    fernet: FernetKeys,
    hash_key: HashKey,
    redactor: Redactor,
    max_content_bytes: usize,
}

/// What was in a row.
#[derive(Clone, PartialEq, Eq)]
pub struct Opened {
    /// The request's body, as far as it is kept.
    pub request: Vec<u8>,
    /// The answer: its body, or what its stream added up to.
    pub answer: Vec<u8>,
}

impl Sealer {
    /// One that keeps at most so many bytes of a request, and of an answer.
    #[must_use]
    pub fn new(fernet: FernetKeys, hash_key: HashKey, redactor: Redactor, max_content_bytes: usize) -> Self {
        Self { fernet, hash_key, redactor, max_content_bytes }
    }

    /// The row for the content of a request.
    ///
    /// # Errors
    /// If it cannot be compressed, which takes a lack of memory.
    pub fn seal(&self, captured: &Captured) -> std::io::Result<ContentRow> {
        let mut row = ContentRow {
            request_id: captured.asked.request_id,
            started_at: captured.asked.started_at,
            mode: captured.mode,
            prompt_hash: prompt_hash(&self.hash_key, captured.asked.dialect, &captured.asked.body),
            sealed: None,
            request_bytes: captured.asked.body.len() as u64,
            answer_bytes: captured.answer_bytes,
            truncated: false,
        };
        if captured.mode.keeps_bodies() {
            let (request, request_is_cut) = self.kept(captured.mode, &captured.asked.body, false);
            let (answer, answer_is_cut) = self.kept(captured.mode, &captured.answer, captured.is_cut);
            let packed = zstd::bulk::compress(&pack(&request, &answer), LEVEL)?;
            row.sealed = Some(self.fernet.seal(&packed));
            row.truncated = request_is_cut || answer_is_cut;
        }
        Ok(row)
    }

    /// What is kept of a body, and whether that is less than there was. `was_cut`: its end is missing already.
    fn kept(&self, mode: ContentMode, body: &[u8], was_cut: bool) -> (Vec<u8>, bool) {
        let redacted;
        let mut body = body;
        if mode == ContentMode::Redacted {
            redacted = self.redactor.body(body);
            body = &redacted;
        }
        if was_cut {
            // At the very end half of something may stand that would have been taken out whole.
            body = cut(body, body.len().saturating_sub(MARGIN));
        }
        let kept = cut(body, self.max_content_bytes);
        (kept.to_vec(), was_cut || kept.len() < body.len())
    }
}

/// What is in a row; `None`: only the hash was kept.
///
/// # Errors
/// [`SecretsError::Undecryptable`] if no key fits, or it is damaged.
pub fn open(row: &ContentRow, fernet: &FernetKeys) -> Result<Option<Opened>, SecretsError> {
    let Some(sealed) = &row.sealed else { return Ok(None) };
    let packed =
        zstd::bulk::decompress(&fernet.open(sealed)?, MAX_UNPACKED).map_err(|_| SecretsError::Undecryptable)?;
    let (request, answer) = unpack(&packed).ok_or(SecretsError::Undecryptable)?;
    Ok(Some(Opened { request: request.to_vec(), answer: answer.to_vec() }))
}
