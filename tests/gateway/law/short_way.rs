//! The short way of the script of limits: it answers and leaves what the long way would.
//!
//! What replicas send to a Redis is overheard, and played to two more: one goes the long way only, the other one the short
//! way first.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    sync::Mutex,
};

use proptest::prelude::*;
use redis::{Connection, Value};
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{Amount, Caps, MAX_LIMIT, Subject, state::Demand},
};

use super::place::{End, Held, NOW, Place, Replica, for_each_input, roomy};
use crate::support::redis::Redis as Server;

const FORM: &str = include_str!("../../../src/limiter/lua/form.lua");
const ALONE: &str = include_str!("../../../src/limiter/lua/alone.lua");
const STATE: &str = include_str!("../../../src/limiter/lua/state.lua");
const LIMITS: &str = include_str!("../../../src/limiter/lua/limits.lua");
const SYNC: &str = include_str!("../../../src/limiter/lua/sync.lua");

/// What a replica does: waits so many milliseconds (or the clock jumps back), and then asks for so many tokens at these
/// subjects (bit by bit), or ends the oldest request in this way, or says what it holds.
#[derive(Clone, Debug)]
struct Move {
    is_other: bool,
    is_changed: bool,
    is_sync: bool,
    wait: i64,
    tokens: u64,
    subjects: usize,
    end: Option<End>,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let wait =
        prop_oneof![50 => 0_i64..30, 3 => 0_i64..1500, 1 => 0_i64..60_000, 1 => 60_000_i64..64_000, 1 => -1500_i64..0];
    let end = prop_oneof![Just(End::Settle), Just(End::Settle), Just(End::SettleAndBook), Just(End::Undo)];
    // Mostly the same, as it is with one user.
    let subjects = prop_oneof![2 => Just(15_usize), 1 => 1_usize..16];
    let one = (
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.1),
        wait,
        0_u64..300,
        subjects,
        prop::option::weighted(0.4, end),
    );
    let one = one.prop_map(|(is_other, is_changed, is_sync, wait, tokens, subjects, end)| Move {
        is_other,
        is_changed,
        is_sync,
        wait,
        tokens,
        subjects,
        end,
    });
    prop::collection::vec(one, 20..120)
}

#[test]
fn the_short_way_says_and_leaves_what_the_long_way_does() {
    let (asked, long, short) = (Server::start(), Server::start(), Server::start());
    let one = Replica::new(&asked, b'a');
    let other = Replica::beside(&asked, b'b', &one.time, &one.books);
    let scripts = scripts(&asked);
    let scene = Mutex::new((Ear::new(&asked), Theatre::new(&long, &short)));
    for_each_input(96, &(prop::array::uniform2(prop::array::uniform4(roomy())), moves()), |(caps, moves)| {
        let () = asked.command(&["FLUSHALL"]);
        one.set(NOW);
        act(&one, &other, caps, moves);
        let (ear, theatre) = &mut *scene.lock().unwrap();
        theatre.clear();
        ear.calls(&asked, &scripts).iter().for_each(|call| theatre.play(call));
        Ok(())
    });
    let (_, Theatre { calls, shortened, .. }) = scene.into_inner().unwrap();
    assert!(shortened * 10 > calls, "only {shortened} of {calls} calls went the short way");
}

/// As it is in production: only the key has a quota, what is held is said of all, and requests end as others begin.
#[test]
fn where_many_come_nearly_all_go_the_short_way() {
    let (asked, long, short) = (Server::start(), Server::start(), Server::start());
    let one = Replica::new(&asked, b'a');
    let scripts = scripts(&asked);
    let (mut ear, mut theatre) = (Ear::new(&asked), Theatre::new(&long, &short));
    let windows = Caps { rpm: 100_000, tpm: 10_000_000, ..Caps::default() };
    let quota = Caps { concurrency: 1_000, monthly_tokens: MAX_LIMIT, ..windows };
    let caps = [Caps { rpm: 100_000, ..Caps::default() }, windows, quota, windows];
    let ask =
        |wait, is_sync| Move { is_other: false, is_changed: false, is_sync, wait, tokens: 50, subjects: 15, end: None };
    let end = || Move { tokens: 10, end: Some(End::Settle), ..ask(0, false) };
    let moves = (0..400).flat_map(|n| [ask(5, n % 100 == 50), ask(0, false), end()]);
    act(&one, &one, &[caps; 2], &moves.collect::<Vec<_>>());
    ear.calls(&asked, &scripts).iter().for_each(|call| theatre.play(call));
    let Theatre { calls, shortened, .. } = theatre;
    assert!(shortened * 100 > calls * 95, "only {shortened} of {calls} calls went the short way");
}

/// Nothing is flushed here: corrections come along with requests, as they do where many come.
/// There are two sets of limits, between which somebody changes.
fn act(one: &Replica, other: &Replica, caps: &[[Caps; 4]; 2], moves: &[Move]) {
    let (user, key) = (UserId(1), KeyId(1));
    let subjects = [
        Subject::Ip(std::net::Ipv4Addr::LOCALHOST.into()),
        Subject::User(user),
        Subject::Key(user, key),
        Subject::KeyModel(user, key, "m".into()),
    ];
    let mut open: [Vec<Held>; 2] = [Vec::new(), Vec::new()];
    for Move { is_other, is_changed, is_sync, wait, tokens, subjects: which, end } in moves {
        let caps = &caps[usize::from(*is_changed)];
        one.set(one.now().saturating_add_signed(*wait));
        let replica = if *is_other { other } else { one };
        if *is_sync {
            subjects.iter().for_each(|subject| replica.sync(subject));
            continue;
        }
        let open = &mut open[usize::from(*is_other)];
        if let (Some(end), false) = (end, open.is_empty()) {
            replica.finish(open.remove(0), *end, *tokens);
            continue;
        }
        let all = subjects.iter().zip(caps).enumerate();
        let demands = all.filter(|(bit, _)| which >> bit & 1 == 1);
        let demands: Vec<_> =
            demands.map(|(_, (subject, caps))| Demand { subject: subject.clone(), caps: *caps }).collect();
        let need = Amount { tokens: *tokens, nano_usd: 2 * tokens };
        open.extend(replica.admit(&demands, need.into()).0);
    }
}

/// A call of the script of limits (0), or of the one that says what a replica holds (1).
struct Call {
    script: usize,
    /// The number of keys, the keys, the other arguments.
    words: Vec<Vec<u8>>,
}

/// The scripts of [`Call`], as a replica calls them.
fn scripts(server: &Server) -> [String; 2] {
    [&[FORM, ALONE, STATE, LIMITS][..], &[FORM, STATE, SYNC]]
        .map(|parts| server.command(&["SCRIPT", "LOAD", &parts.join("\n")]))
}

/// Hears what is asked of a Redis.
struct Ear(BufReader<TcpStream>);

impl Ear {
    fn new(server: &Server) -> Self {
        let mut stream = TcpStream::connect(server.url().trim_start_matches("redis://")).unwrap();
        stream.write_all(b"MONITOR\r\n").unwrap();
        let mut ear = Self(BufReader::new(stream));
        assert_eq!(ear.line(), "+OK");
        ear
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The calls of `scripts` since the last time.
    fn calls(&mut self, server: &Server, scripts: &[String; 2]) -> Vec<Call> {
        const END: &str = "that is all";
        let () = server.command(&["ECHO", END]);
        let mut calls = Vec::new();
        loop {
            let words = words(&self.line());
            match &words[..] {
                [echo, end] if echo == b"ECHO" && end == END.as_bytes() => return calls,
                [call, which, arguments @ ..] if call == b"EVALSHA" => {
                    let of = |script: &String| script.as_bytes() == which;
                    calls.extend(scripts.iter().position(of).map(|script| Call { script, words: arguments.to_vec() }));
                }
                _ => {}
            }
        }
    }
}

/// The quoted words of a line of `MONITOR`, in which bytes that cannot be printed are escaped.
fn words(line: &str) -> Vec<Vec<u8>> {
    let (mut words, mut word, mut bytes) = (Vec::new(), None, line.bytes());
    while let Some(byte) = bytes.next() {
        match (byte, &mut word) {
            (b'"', None) => word = Some(Vec::new()),
            (b'"', Some(_)) => words.extend(word.take()),
            (b'\\', Some(word)) => word.push(match bytes.next().unwrap() {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'a' => 7,
                b'b' => 8,
                b'x' => {
                    let digit = |byte: Option<u8>| char::from(byte.unwrap()).to_digit(16).unwrap();
                    u8::try_from(16 * digit(bytes.next()) + digit(bytes.next())).unwrap()
                }
                itself => itself,
            }),
            (byte, Some(word)) => word.push(byte),
            (_, None) => {}
        }
    }
    words
}

/// Where calls are played again, both ways.
struct Theatre {
    long: Connection,
    short: Connection,
    /// Those of [`Call`], the first of them without its short way.
    scripts: [String; 2],
    /// The short way alone.
    alone: String,
    calls: usize,
    shortened: usize,
}

impl Theatre {
    fn new(long: &Server, short: &Server) -> Self {
        let connect = |server: &Server| redis::Client::open(server.url()).unwrap().get_connection().unwrap();
        let (mut long, mut short) = (connect(long), connect(short));
        let load = |parts: &[&str], at: &mut Connection| -> String {
            redis::cmd("SCRIPT").arg("LOAD").arg(parts.join("\n")).query(at).unwrap()
        };
        let whole = [FORM, "local now = clock(ARGV[1])", STATE, LIMITS];
        let alone = load(&[FORM, ALONE], &mut short);
        let scripts = [&whole[..], &[FORM, STATE, SYNC]].map(|parts| {
            let script = load(parts, &mut long);
            assert_eq!(load(parts, &mut short), script);
            script
        });
        Self { long, short, scripts, alone, calls: 0, shortened: 0 }
    }

    fn clear(&mut self) {
        for at in [&mut self.long, &mut self.short] {
            let () = redis::cmd("FLUSHALL").query(at).unwrap();
        }
    }

    fn play(&mut self, call: &Call) {
        let (script, words) = (&self.scripts[call.script], &call.words);
        let run = |script: &str, at: &mut Connection| -> Value {
            redis::cmd("EVALSHA").arg(script).arg(words).query(at).unwrap()
        };
        let expected = run(script, &mut self.long);
        let shortened = if call.script == 0 { run(&self.alone, &mut self.short) } else { Value::Nil };
        self.calls += usize::from(call.script == 0);
        let said = if shortened == Value::Nil {
            run(script, &mut self.short)
        } else {
            self.shortened += 1;
            shortened
        };
        assert_eq!(said, expected);
        let keys: usize = String::from_utf8_lossy(&words[0]).parse().unwrap();
        for key in &words[1..=keys] {
            let state = |at: &mut Connection| -> (Vec<u8>, i64) { redis::pipe().get(key).ttl(key).query(at).unwrap() };
            let (left, expected) = (state(&mut self.short), state(&mut self.long));
            assert_eq!(left.0, expected.0, "the state at {}", String::from_utf8_lossy(key));
            assert!((left.1 - expected.1).abs() <= 2, "the time to live of {}", String::from_utf8_lossy(key));
        }
    }
}
