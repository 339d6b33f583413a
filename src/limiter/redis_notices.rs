//! Notices about accounts, shared through Redis: one hash with a field for each account.
//!
//! A field says what was told last, until when by Redis's clock, and by whom: `c:1792000000000:<holder>` for cooling, `q:` for
//! quarantined, `x:` for cleared. Everybody reads all of it several times a second; there are as many fields as accounts. The hash
//! is forgotten a week after the last word.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError, atomic::Ordering},
};

use redis::Value;
use tokio::time::timeout;
use tollgate_core::upstream::Account;

use super::{redis::Redis, redis_link::LATE};

/// Where the notices are.
const KEY: &str = "tollgate:1:{pool}";
/// How long the last word is kept, in seconds.
const TTL_S: u32 = 7 * 86_400;

/// A notice between processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The provider wants to be left alone.
    Cooling {
        /// For how long, in milliseconds.
        left_ms: u64,
    },
    /// The credential or account is bad.
    Quarantined {
        /// In how many milliseconds the slow probe is due.
        left_ms: u64,
    },
    /// It was freed.
    Cleared,
}

/// What was read last of each account: only what is new is heard.
#[derive(Debug, Default)]
pub(super) struct Heard(Mutex<HashMap<Account, String>>);

impl Heard {
    /// Those words that are new.
    fn news(&self, all: HashMap<Account, String>) -> Vec<(Account, String)> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let news = all.iter().filter(|(account, text)| known.get(*account) != Some(*text));
        let news = news.map(|(account, text)| (*account, text.clone())).collect();
        *known = all;
        news
    }
}

impl Redis {
    /// Tells others, and hears what they told since the last time of accounts that `is_known` holds for: those that are not known
    /// here may be later. `None`: Redis cannot be asked, or takes no words.
    pub(super) async fn exchange_notices(
        &self,
        local_ms: u64,
        told: Vec<(Account, Told)>,
        is_known: impl Fn(&Account) -> bool,
    ) -> Option<Vec<(Account, Told)>> {
        let link = self.link.load_full()?;
        // Whoever sets its clock by Redis's can tell the others a moment that they understand.
        let offset_ms = link.clock_ms.load(Ordering::Relaxed);
        let now_ms = local_ms.saturating_add_signed(offset_ms);
        let mut commands = Vec::with_capacity(3);
        if !told.is_empty() {
            let mut set = redis::cmd("HSET");
            set.arg(KEY);
            for (account, told) in &told {
                set.arg(account.to_string()).arg(self.text(*told, now_ms));
            }
            let mut expire = redis::cmd("EXPIRE");
            expire.arg(KEY).arg(TTL_S);
            commands.extend([set, expire]);
        }
        let mut all = redis::cmd("HGETALL");
        all.arg(KEY);
        commands.push(all);
        let answers = timeout(LATE, link.connection.send(commands)).await.ok()?.ok()?;
        // What Redis has under this name may be somebody else's, or Redis takes nothing: then limits go on all the same.
        if answers.iter().any(|answer| matches!(answer, Value::ServerError(_))) {
            return None;
        }
        let all: HashMap<String, String> = redis::from_redis_value(answers.into_iter().next_back()?).ok()?;
        let accounts = all.into_iter().filter_map(|(field, text)| Some((field.parse().ok()?, text)));
        let news = self.heard.news(accounts.filter(|(account, _)| is_known(account)).collect());
        Some(news.into_iter().filter_map(|(account, text)| Some((account, self.read(&text, now_ms)?))).collect())
    }

    fn text(&self, told: Told, now_ms: u64) -> String {
        let holder: String = self.holder.iter().map(|byte| format!("{byte:02x}")).collect();
        match told {
            Told::Cooling { left_ms } => format!("c:{}:{holder}", now_ms.saturating_add(left_ms)),
            Told::Quarantined { left_ms } => format!("q:{}:{holder}", now_ms.saturating_add(left_ms)),
            Told::Cleared => format!("x:{now_ms}:{holder}"),
        }
    }

    /// Reads what another replica told; `None`: it was this one, it is over, or it is no notice.
    fn read(&self, text: &str, now_ms: u64) -> Option<Told> {
        let mut parts = text.splitn(3, ':');
        let (kind, at_ms, holder) = (parts.next()?, parts.next()?.parse::<u64>().ok()?, parts.next()?);
        let own: String = self.holder.iter().map(|byte| format!("{byte:02x}")).collect();
        if holder == own {
            return None;
        }
        let left_ms = at_ms.saturating_sub(now_ms);
        match kind {
            "c" if left_ms > 0 => Some(Told::Cooling { left_ms }),
            // Once its time is past, whoever starts anew finds out for itself.
            "q" if left_ms > 0 => Some(Told::Quarantined { left_ms }),
            "x" => Some(Told::Cleared),
            _ => None,
        }
    }
}
