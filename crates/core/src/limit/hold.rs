//! What a finished request holds of quotas until the database has it: plain numbers, so that it can wait in a file.

use std::net::IpAddr;

use super::{Amount, Class, Subject};
use crate::id::{KeyId, UserId};

/// Some of the kinds of subjects. A request has one subject of each kind at the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Classes(u8);

impl Classes {
    const ALL: [Class; 4] = [Class::Ip, Class::User, Class::Key, Class::KeyModel];

    /// Those that `bits` stand for.
    #[must_use]
    pub fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// The bits that stand for them.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Adds one.
    pub fn insert(&mut self, class: Class) {
        self.0 |= 1 << class as u8;
    }

    /// Is it one of them?
    #[must_use]
    pub fn has(self, class: Class) -> bool {
        self.0 & (1 << class as u8) != 0
    }

    /// Is it none?
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// An amount that is held against the quotas of some of a request's subjects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// Who has a quota.
    pub quotas: Classes,
    /// Who found no room of its own in the limiter's memory.
    pub shared: Classes,
    /// How much.
    pub amount: Amount,
    /// The session in which Redis was told of the request; `None`: there was no Redis.
    pub session: Option<u32>,
    /// Did Redis count it?
    pub is_counted: bool,
}

/// Whose request it was.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'r> {
    /// From where.
    pub ip: Option<IpAddr>,
    /// Whose key.
    pub user: UserId,
    /// Which key.
    pub key: KeyId,
    /// Which model.
    pub model: &'r str,
}

impl Hold {
    /// The subjects with a quota, and whether each found no room of its own.
    pub fn subjects(&self, of: Holder<'_>) -> impl Iterator<Item = (Subject, bool)> {
        let (quotas, shared) = (self.quotas, self.shared);
        let subject = move |class| match class {
            Class::Ip => of.ip.map(Subject::of_ip),
            Class::User => Some(Subject::User(of.user)),
            Class::Key => Some(Subject::Key(of.user, of.key)),
            Class::KeyModel => Some(Subject::KeyModel(of.user, of.key, of.model.into())),
        };
        let held = Classes::ALL.into_iter().filter(move |class| quotas.has(*class));
        held.filter_map(move |class| Some((subject(class)?, shared.has(class))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_those_that_have_a_quota() {
        let mut hold = Hold::default();
        hold.quotas.insert(Class::Ip);
        hold.quotas.insert(Class::KeyModel);
        hold.shared.insert(Class::KeyModel);
        let of = Holder { ip: "10.0.0.1".parse().ok(), user: UserId(1), key: KeyId(2), model: "m" };
        let ip = Subject::of_ip("10.0.0.1".parse().unwrap());
        let model = Subject::KeyModel(UserId(1), KeyId(2), "m".into());
        assert_eq!(hold.subjects(of).collect::<Vec<_>>(), [(ip, false), (model.clone(), true)]);
        assert_eq!(hold.subjects(Holder { ip: None, ..of }).collect::<Vec<_>>(), [(model, true)]);
        assert!(Classes::from_bits(hold.quotas.bits()) == hold.quotas && Classes::default().is_empty());
    }
}
