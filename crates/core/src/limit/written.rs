//! Limits as people write them, in the configuration and at the command line.
//!
//! Messages are the end of a sentence that begins with what was written, so that each place can name it in its own way.
//! Money is read digit by digit: no float touches it.

use std::str::FromStr;

use super::{Limits, MAX_LIMIT, ModelLimits};

const NANO: u64 = 1_000_000_000;

/// A number of tokens.
///
/// # Errors
/// What is wrong with it.
pub fn parse_tokens(text: &str) -> Result<u64, String> {
    let number = digits(text).ok_or_else(|| "is not a whole number".to_owned())?;
    number
        .parse()
        .ok()
        .filter(|n| *n <= MAX_LIMIT)
        .ok_or_else(|| format!("is more than {MAX_LIMIT}, the most that can be set; 0: no limit"))
}

/// A number of requests.
///
/// # Errors
/// What is wrong with it.
pub fn parse_requests(text: &str) -> Result<u32, String> {
    let number = digits(text).ok_or_else(|| "is not a whole number".to_owned())?;
    number.parse().map_err(|_| format!("is more than {}, the most that can be set; 0: no limit", u32::MAX))
}

/// Dollars with up to nine decimals, as nano-dollars.
///
/// # Errors
/// What is wrong with them.
pub fn parse_usd(text: &str) -> Result<u64, String> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let (Some(whole), Some(fraction)) = (digits(whole), digits(fraction).filter(|digits| digits.len() <= 9)) else {
        return Err("is not an amount of dollars: write up to nine decimals, such as 12.50".to_owned());
    };
    let nano = format!("{whole}{fraction:0<9}").parse().ok().filter(|nano| *nano <= MAX_LIMIT);
    nano.ok_or_else(|| format!("is more than {} dollars, the most that can be set; 0: no limit", MAX_LIMIT / NANO))
}

fn digits(text: &str) -> Option<&str> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then_some(text)
}

/// The name of a model, or a pattern with `*`.
///
/// # Errors
/// What is wrong with it.
pub fn check_model(model: &str) -> Result<(), String> {
    let clean = |c: char| !c.is_control() && !c.is_whitespace() && c != '=';
    if model.is_empty() || !model.chars().all(clean) {
        return Err("is not a model: write a name, or a pattern with *, without = and white space".to_owned());
    }
    Ok(())
}

/// Does every entry limit a model of its own?
///
/// # Errors
/// A sentence about the model that is limited twice.
pub fn check_distinct(entries: &[ModelLimits]) -> Result<(), String> {
    let twice = entries.iter().enumerate().find(|(at, entry)| entries[..*at].iter().any(|e| e.model == entry.model));
    match twice {
        Some((_, entry)) => Err(format!("the model {:?} is limited twice: say once what holds for it", entry.model)),
        None => Ok(()),
    }
}

/// `gpt-4o=rpm:10,tpm:1000,concurrency:2,monthly-tokens:1000000,monthly-usd:1.50`
impl FromStr for ModelLimits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "must be MODEL=LIMIT:N,..., such as gpt-4o=rpm:10,tpm:1000".to_owned();
        let (model, settings) = text.split_once('=').ok_or_else(form)?;
        check_model(model).map_err(|message| format!("{model:?} {message}"))?;
        let mut limits = Limits::default();
        for setting in settings.split(',') {
            let (name, value) = setting.split_once(':').ok_or_else(form)?;
            set(&mut limits, name, value).map_err(|message| format!("{setting:?} {message}"))?;
        }
        Ok(Self { model: model.to_owned(), limits })
    }
}

fn set(limits: &mut Limits, name: &str, value: &str) -> Result<(), String> {
    match name {
        "rpm" => once(&mut limits.rpm, parse_requests(value)?),
        "tpm" => once(&mut limits.tpm, parse_tokens(value)?),
        "concurrency" => once(&mut limits.concurrency, parse_requests(value)?),
        "monthly-tokens" => once(&mut limits.monthly_tokens, parse_tokens(value)?),
        "monthly-usd" => once(&mut limits.monthly_nano_usd, parse_usd(value)?),
        _ => Err("is not a limit: there are rpm, tpm, concurrency, monthly-tokens and monthly-usd".to_owned()),
    }
}

fn once<T>(limit: &mut Option<T>, value: T) -> Result<(), String> {
    match limit.replace(value) {
        Some(_) => Err("is set twice for this model".to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_exact() {
        for (text, nano) in [
            ("0", 0),
            ("0.0", 0),
            ("12.5", 12_500_000_000),
            ("12.50", 12_500_000_000),
            ("0.000000001", 1),
            ("1000000", MAX_LIMIT),
        ] {
            assert_eq!(parse_usd(text), Ok(nano), "{text}");
        }
        for text in ["", ".", ".5", "5.", "-1", "+1", "1e3", "1,5", "0.0000000001", "$5", "nan", "1.5.5"] {
            assert!(parse_usd(text).is_err_and(|message| message.contains("such as 12.50")), "{text}");
        }
        for text in ["1000000.000000001", "99999999999", "999999999999999999999999"] {
            assert!(parse_usd(text).is_err_and(|message| message.contains("more than 1000000 dollars")), "{text}");
        }
    }

    #[test]
    fn counts_stop_at_what_can_be_set() {
        assert_eq!(parse_tokens("1000000000000000"), Ok(MAX_LIMIT));
        assert_eq!(parse_requests("4294967295"), Ok(u32::MAX));
        for text in ["1000000000000001", "99999999999999999999999"] {
            assert!(parse_tokens(text).is_err_and(|message| message.contains("more than 1000000000000000")), "{text}");
        }
        assert!(parse_requests("4294967296").is_err_and(|message| message.contains("more than 4294967295")));
        for text in ["", "-1", "+1", "1.5", "1k", " 1"] {
            assert!(parse_tokens(text).is_err() && parse_requests(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_limits_of_a_model_are_written_in_one_word() {
        let parse = |text: &str| text.parse::<ModelLimits>();
        let all = parse("ft:gpt-4o:x*=rpm:10,tpm:0,concurrency:2,monthly-tokens:5,monthly-usd:1.50").unwrap();
        let limits = Limits {
            rpm: Some(10),
            tpm: Some(0),
            concurrency: Some(2),
            monthly_tokens: Some(5),
            monthly_nano_usd: Some(1_500_000_000),
        };
        assert_eq!(all, ModelLimits { model: "ft:gpt-4o:x*".to_owned(), limits });
        for (text, says) in [
            ("gpt-4o", "must be MODEL=LIMIT:N"),
            ("gpt-4o=", "must be MODEL=LIMIT:N"),
            ("gpt-4o=rpm", "must be MODEL=LIMIT:N"),
            ("=rpm:1", "\"\" is not a model"),
            ("a b=rpm:1", "\"a b\" is not a model"),
            ("gpt-4o=rps:1", "\"rps:1\" is not a limit"),
            ("gpt-4o=rpm:many", "\"rpm:many\" is not a whole number"),
            ("gpt-4o=rpm:1,rpm:2", "\"rpm:2\" is set twice"),
            ("gpt-4o=tpm:1000000000000001", "is more than"),
            ("gpt-4o=monthly-usd:1000001", "is more than"),
        ] {
            assert!(parse(text).is_err_and(|message| message.contains(says)), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn a_model_is_limited_once() {
        let entries = |models: &[&str]| -> Vec<ModelLimits> {
            models.iter().map(|model| format!("{model}=rpm:1").parse().unwrap()).collect()
        };
        assert_eq!(check_distinct(&entries(&["gpt-4o", "gpt-4o*", "o3"])), Ok(()));
        assert!(check_distinct(&entries(&["a", "b", "b"])).is_err_and(|message| message.contains("\"b\"")));
    }
}
