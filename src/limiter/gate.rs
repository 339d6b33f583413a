//! The gate: what one address may ask of us before we do any work for it.
//!
//! It counts two things by address (of IPv6 by network of 64 bits): requests per second, and keys that failed per
//! minute. An address that has used up either is refused before its key is looked at, which is what slows guessing
//! down. The gate is coarse and cheap; the exact limits of users, keys and addresses come after it.
//!
//! **Memory is bounded by construction.** Counts live in count-min sketches of fixed size, 4 rows of counters, of which
//! an address has one in each. However many addresses there are, nothing is allocated for any of them:
//!
//! | what is counted | counters per row | memory (two sketches each) |
//! |---|---|---|
//! | requests in a second | 16,384 | 1 MiB |
//! | failed keys in a minute | 8,192 | 512 KiB |
//!
//! **It errs to one side.** Addresses share counters, so a count may be too high and never too low: nobody gets in who
//! should not, somebody innocent may be kept out until the window ends. By how much a count is too high:
//! - By what all others have sent, spread over a row. A million addresses with one request each within one second add
//!   about 61, so a limit of 100 still lets everybody in. What is refused is not counted, so one address alone, however
//!   it floods, adds no more than its limit.
//! - An innocent address is kept out when all 4 of its counters are shared with addresses that are over the limit: one
//!   in 5,700 while 2,000 addresses are (1,000 with failed keys), one in 200 while 5,000 are (2,500), one in 7 while
//!   16,000 are (8,000). An attacker with that many addresses, or with an IPv6 network of 48 bits, can shut the gate
//!   for others; against that many, the defence stands before the gateway.
//! - Where an address has its counters is drawn anew for each process, so nobody can choose whom to share them with.
//!
//! **Windows are fixed.** A window begins with the first request after the last one ended, and then counts from 0: at
//! the edge of two windows, twice the limit can pass in a moment. What is refused neither counts nor moves the window,
//! so a refusal ends with its window, and the wait that comes with it is the exact rest of that window (of the later
//! one if both refuse). Who waits that long is let in, unless others behind the same address were quicker. A key fails
//! after its request entered: as many more as were in flight at that moment are still looked at.
//!
//! **One lock around both.** [`Rate`] is free of locks, but its threads race when a window ends: one that took the time
//! just before another turned the window over computes an age below 0, which panics in debug builds and clears a window
//! too early in release builds. The lock also makes looking and counting one step. It is held for some hundred
//! nanoseconds, and once per window for the time that zeroing a sketch takes.

use std::{
    fmt,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pingora_limits::rate::Rate;
use tollgate_core::limit::Subject;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Rows of a sketch. More rows help against few busy addresses, longer rows against many quiet ones.
const ROWS: usize = 4;
/// Counters in a row, for requests.
const REQUEST_COUNTERS: usize = 16_384;
/// Counters in a row, for failed keys.
const FAILED_KEY_COUNTERS: usize = 8_192;

/// Refuses addresses that send too much, or too many keys that fail.
pub struct Gate {
    windows: Mutex<Windows>,
}

struct Windows {
    requests: Option<Window>,
    failed_keys: Option<Window>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    /// A gate with these limits. 0 switches a part off, which then takes no memory.
    #[must_use]
    pub fn new(requests_per_second: u32, failed_keys_per_minute: u32) -> Self {
        Self::with(
            Window::of(requests_per_second, SECOND, REQUEST_COUNTERS),
            Window::of(failed_keys_per_minute, MINUTE, FAILED_KEY_COUNTERS),
        )
    }

    fn with(requests: Option<Window>, failed_keys: Option<Window>) -> Self {
        Self { windows: Mutex::new(Windows { requests, failed_keys }) }
    }

    /// Lets a request from this address in and counts it.
    ///
    /// # Errors
    ///
    /// It is one too many, or too many keys failed: it is not counted, and this is how many milliseconds to wait.
    pub fn enter(&self, ip: IpAddr) -> Result<(), u64> {
        let subject = Subject::of_ip(ip);
        let windows = self.windows();
        let wait_ms = |window: &Option<Window>| window.as_ref().and_then(|window| window.wait_ms(&subject));
        if let Some(wait_ms) = wait_ms(&windows.failed_keys).max(wait_ms(&windows.requests)) {
            return Err(wait_ms);
        }
        windows.requests.iter().for_each(|window| window.count(&subject));
        Ok(())
    }

    /// Counts a key from this address that was none of ours.
    pub fn failed(&self, ip: IpAddr) {
        self.windows().failed_keys.iter().for_each(|window| window.count(&Subject::of_ip(ip)));
    }

    fn windows(&self) -> MutexGuard<'_, Windows> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A count per subject that starts again from 0 when the interval is over.
struct Window {
    rate: Rate,
    limit: isize,
}

impl Window {
    /// `None` if there is no limit.
    fn of(limit: u32, interval: Duration, counters: usize) -> Option<Self> {
        let limit = isize::try_from(limit).unwrap_or(isize::MAX);
        (limit > 0).then(|| Self { rate: Rate::new_with_estimator_config(interval, ROWS, counters), limit })
    }

    fn count(&self, subject: &Subject) {
        self.rate.observe(subject, 1);
    }

    /// How long until the subject may go on, if it has used up its limit. Counts nothing.
    fn wait_ms(&self, subject: &Subject) -> Option<u64> {
        self.rate.rate_with(subject, |window| {
            let rest = window.interval.mul_f64(1.0 - window.current_interval_fraction);
            (window.curr_samples >= self.limit).then(|| u64::try_from(rest.as_millis()).unwrap_or(u64::MAX))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, thread, time::Instant};

    use super::*;

    /// Long enough that no test outlives it.
    const LONG: Duration = Duration::from_secs(3600);
    /// Short enough to wait for.
    const SHORT: Duration = Duration::from_millis(200);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn gate(requests: (u32, Duration), failed_keys: (u32, Duration)) -> Gate {
        Gate::with(
            Window::of(requests.0, requests.1, REQUEST_COUNTERS),
            Window::of(failed_keys.0, failed_keys.1, FAILED_KEY_COUNTERS),
        )
    }

    fn entered(gate: &Gate, from: IpAddr, times: usize) -> usize {
        (0..times).filter(|_| gate.enter(from).is_ok()).count()
    }

    #[test]
    fn as_many_enter_as_the_limit_says() {
        let gate = gate((5, LONG), (0, LONG));
        assert_eq!(entered(&gate, ip("10.0.0.1"), 20), 5);
        assert_eq!(entered(&gate, ip("10.0.0.2"), 20), 5, "another address has its own count");
    }

    #[test]
    fn so_they_do_when_threads_race() {
        let gate = gate((500, LONG), (0, LONG));
        let all = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| entered(&gate, ip("10.0.0.1"), 400))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>()
        });
        assert_eq!(all, 500);
    }

    #[test]
    fn the_end_of_a_window_may_come_at_any_moment_on_any_thread() {
        let gate = gate((u32::MAX, Duration::from_millis(1)), (u32::MAX, Duration::from_millis(1)));
        thread::scope(|scope| {
            let knock = || (0..50_000).for_each(|_| gate.enter(ip("10.0.0.1")).unwrap());
            (0..4).for_each(|_| drop(scope.spawn(knock)));
        });
    }

    #[test]
    fn a_network_of_64_bits_is_one_address() {
        let gate = gate((2, LONG), (0, LONG));
        assert!(gate.enter(ip("2001:db8:1:2::1")).is_ok());
        assert!(gate.enter(ip("2001:db8:1:2:ffff::1")).is_ok());
        assert!(gate.enter(ip("2001:db8:1:2::3")).is_err());
        assert!(gate.enter(ip("2001:db8:1:3::1")).is_ok());
        assert_eq!(entered(&gate, ip("10.0.0.1"), 1) + entered(&gate, ip("::ffff:10.0.0.1"), 2), 2);
    }

    #[test]
    fn who_waits_as_long_as_told_is_let_in() {
        let gate = gate((2, SHORT), (0, LONG));
        for _ in 0..3 {
            let wait_ms = loop {
                if let Err(wait_ms) = gate.enter(ip("10.0.0.1")) {
                    break wait_ms;
                }
            };
            assert!((1..=200).contains(&wait_ms), "{wait_ms}");
            thread::sleep(Duration::from_millis(wait_ms));
            assert_eq!(gate.enter(ip("10.0.0.1")), Ok(()), "after {wait_ms} ms");
        }
    }

    #[test]
    fn an_address_whose_keys_fail_is_refused_whatever_it_sends() {
        let gate = Gate::new(0, 3);
        for _ in 0..3 {
            assert_eq!(gate.enter(ip("10.0.0.1")), Ok(()));
            gate.failed(ip("10.0.0.1"));
        }
        let wait_ms = gate.enter(ip("10.0.0.1")).unwrap_err();
        assert!((1..=60_000).contains(&wait_ms), "{wait_ms}");
        assert_eq!(gate.enter(ip("10.0.0.2")), Ok(()), "another address is not disturbed");
    }

    #[test]
    fn knocking_does_not_extend_the_refusal() {
        let gate = gate((0, LONG), (1, SHORT));
        while gate.enter(ip("10.0.0.1")).is_ok() {
            gate.failed(ip("10.0.0.1"));
        }
        let start = Instant::now();
        while gate.enter(ip("10.0.0.1")).is_err() {}
        assert!(start.elapsed() < 5 * SHORT, "{:?}", start.elapsed());
    }

    #[test]
    fn both_refusals_must_be_over() {
        let gate = gate((1, LONG), (1, SHORT));
        assert_eq!(gate.enter(ip("10.0.0.1")), Ok(()));
        gate.failed(ip("10.0.0.1"));
        assert!(gate.enter(ip("10.0.0.1")).unwrap_err() > 60_000);
    }

    #[test]
    fn a_million_others_keep_nobody_out() {
        let gate = gate((100, LONG), (100, LONG));
        for address in 0..1_000_000 {
            let address = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + address));
            assert_eq!(gate.enter(address), Ok(()));
        }
        assert_eq!(gate.enter(ip("192.0.2.1")), Ok(()));
    }

    #[test]
    fn one_that_floods_keeps_nobody_else_out() {
        let gate = gate((100, LONG), (0, LONG));
        assert_eq!(entered(&gate, ip("10.0.0.1"), 1_000_000), 100);
        let others = (1..=1_000).map(|address| IpAddr::V4(Ipv4Addr::from_bits(0xc000_0000 + address)));
        assert!(others.map(|other| entered(&gate, other, 50)).all(|entered| entered == 50));
    }

    #[test]
    fn a_part_that_is_off_refuses_nobody_and_takes_no_memory() {
        let gate = Gate::new(0, 0);
        assert!(gate.windows().requests.is_none() && gate.windows().failed_keys.is_none());
        (0..1_000).for_each(|_| gate.failed(ip("10.0.0.1")));
        assert_eq!(entered(&gate, ip("10.0.0.1"), 1_000), 1_000);

        let gate = Gate::new(2, 0);
        assert!(gate.windows().failed_keys.is_none());
        (0..1_000).for_each(|_| gate.failed(ip("10.0.0.1")));
        assert_eq!(gate.enter(ip("10.0.0.1")), Ok(()));
    }
}
