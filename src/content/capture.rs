//! Collecting what a request and its answer are, while they go by.
//!
//! The body of the request is in memory anyway and is only held on to. Of a JSON answer the bytes are copied, of a stream what
//! its events add up to; both no further than will be kept. All of it happens only for requests whose content is to be
//! kept.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use tollgate_core::{content::ContentMode, openai::assemble::Assembler, route::Dialect};
use uuid::Uuid;

use super::{Contents, MARGIN, OVERHEAD, Room};

/// What was asked.
#[derive(Clone)]
pub struct Asked {
    /// The gateway's id of the request.
    pub request_id: Uuid,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// How to read both bodies.
    pub dialect: Dialect,
    /// The body, as it came.
    pub body: Bytes,
}

/// What of an answer is kept, so far.
enum Answer {
    Json { body: Vec<u8>, is_cut: bool },
    Stream(Box<Assembler>),
}

/// The content of a request under way. Dropped without [`finish`](Capture::finish), it leaves nothing.
pub struct Capture {
    contents: Contents,
    room: Room,
    mode: ContentMode,
    asked: Asked,
    answer: Answer,
    answer_bytes: u64,
}

/// The content of a request that is over.
pub struct Captured {
    room: Room,
    /// What is to be kept.
    pub mode: ContentMode,
    /// What was asked.
    pub asked: Asked,
    /// The answer's body, or what its stream added up to; up to [`MARGIN`] more than is to be kept.
    pub answer: Vec<u8>,
    /// Length of the answer's body as the client got it, in bytes.
    pub answer_bytes: u64,
    /// Is the end of the answer missing?
    pub is_cut: bool,
}

/// Content shows itself nowhere.
macro_rules! hidden {
    ($name:ident) => {
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).field("mode", &self.mode).finish_non_exhaustive()
            }
        }
    };
}
hidden!(Capture);
hidden!(Captured);

impl Capture {
    /// `None`, and counted: there is no room.
    pub(super) fn try_new(contents: &Contents, mode: ContentMode, asked: Asked) -> Option<Self> {
        let mut room = Room::of(contents);
        if !room.grow_to(OVERHEAD + asked.body.len()) {
            contents.lost(1);
            return None;
        }
        let answer = Answer::Json { body: Vec::new(), is_cut: false };
        Some(Self { contents: contents.clone(), room, mode, asked, answer, answer_bytes: 0 })
    }

    /// Takes note of a piece of the answer that the client gets; `false`, and counted: there is no room for it, so nothing is to be
    /// kept.
    #[must_use]
    pub fn see(&mut self, piece: &[u8], is_stream: bool) -> bool {
        self.answer_bytes += piece.len() as u64;
        if !self.mode.keeps_bodies() {
            return true;
        }
        let most = self.contents.0.options.max_content_bytes + MARGIN;
        if is_stream && self.answer_bytes == piece.len() as u64 {
            self.answer = Answer::Stream(Box::new(Assembler::new(self.asked.dialect, most)));
        }
        let kept = match &mut self.answer {
            Answer::Json { body, is_cut } => {
                let fits = piece.len().min(most - body.len());
                *is_cut |= fits < piece.len();
                body.extend_from_slice(&piece[..fits]);
                body.capacity()
            }
            Answer::Stream(assembler) => {
                assembler.feed(piece);
                assembler.bytes()
            }
        };
        let fits = self.room.grow_to(OVERHEAD + self.asked.body.len() + kept);
        if !fits {
            self.contents.lost(1);
        }
        fits
    }

    /// Forgets what was seen of an answer: the client gets another one.
    pub fn forget_answer(&mut self) {
        self.answer = Answer::Json { body: Vec::new(), is_cut: false };
        self.answer_bytes = 0;
    }

    /// The request is over: its content waits to be written from now on.
    pub fn finish(self) {
        let (answer, is_cut) = match self.answer {
            Answer::Json { body, is_cut } => (body, is_cut),
            Answer::Stream(assembler) => assembler.finish(),
        };
        let Self { room, mode, asked, answer_bytes, .. } = self;
        self.contents.add(Captured { room, mode, asked, answer, answer_bytes, is_cut });
    }
}

impl Captured {
    /// Bytes that it holds.
    pub(super) fn bytes(&self) -> usize {
        self.room.bytes
    }
}
