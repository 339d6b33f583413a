//! How a pool shares out its work, and who may get any.

/// How members of one priority share the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// In turn, by weight.
    #[default]
    Weighted,
    /// To the one with the fewest attempts in flight for its weight.
    LeastInFlight,
    /// The same key to the same one; by weight over many keys.
    Sticky,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Weighted, Self::LeastInFlight, Self::Sticky];

    /// The word for it in the config.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Weighted => "weighted",
            Self::LeastInFlight => "least_in_flight",
            Self::Sticky => "sticky",
        }
    }
}

impl std::str::FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a strategy: use \"weighted\", \"least_in_flight\" or \"sticky\""))
    }
}

/// May a member get this request?
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fitness {
    /// No: it would not take it, or has had it already.
    No,
    /// Only if there is nobody better: it will probably refuse.
    LastResort,
    /// Yes.
    Preferred,
}

#[cfg(test)]
mod tests {
    use super::Strategy;

    #[test]
    fn strategies_are_read_as_they_are_written() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.as_str().parse(), Ok(strategy));
        }
        let error = "random".parse::<Strategy>().unwrap_err();
        assert!(Strategy::ALL.iter().all(|strategy| error.contains(strategy.as_str())), "{error}");
    }
}
