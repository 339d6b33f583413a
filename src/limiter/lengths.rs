//! How long the answers of each model are: learned from every answer, used where a client sets no limit.

use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::quality::RandomState;
use tollgate_core::limit::estimate::learn;

/// Models that are learned one by one; what comes after them is taken to be as long as the configuration says.
const MAX_MODELS: usize = 1024;

/// The learned lengths, in tokens.
#[derive(Debug)]
pub struct Lengths {
    assumed: u64,
    by_model: papaya::HashMap<String, AtomicU64, RandomState>,
}

impl Lengths {
    /// Nothing is learned yet; answers are taken to be `assumed` tokens long.
    #[must_use]
    pub fn new(assumed: u64) -> Self {
        Self { assumed, by_model: papaya::HashMap::default() }
    }

    /// How long an answer of this model is taken to be.
    #[must_use]
    pub fn of(&self, model: &str) -> u64 {
        self.by_model.pin().get(model).map_or(self.assumed, |length| length.load(Ordering::Relaxed))
    }

    /// Learns from one answer.
    pub fn learn(&self, model: &str, tokens: u64) {
        let models = self.by_model.pin();
        if models.get(model).is_none() && models.len() < MAX_MODELS {
            models.get_or_insert_with(model.to_owned(), || AtomicU64::new(self.assumed));
        }
        if let Some(length) = models.get(model) {
            // Two answers at the same moment may count as one: it is an estimate.
            length.store(learn(length.load(Ordering::Relaxed), tokens), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_learned_one_by_one_and_not_without_end() {
        let lengths = Lengths::new(500);
        for _ in 0..2000 {
            lengths.learn("short", 20);
        }
        assert!(lengths.of("short") < 100, "{}", lengths.of("short"));
        assert_eq!(lengths.of("other"), 500);
        for n in 0..5000 {
            lengths.learn(&format!("model-{n}"), 1);
        }
        assert!(lengths.by_model.len() <= MAX_MODELS);
    }
}
