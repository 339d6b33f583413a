//! Prices as people write them: dollars per million tokens.
//!
//! They are read and shown digit by digit. A message is the end of a sentence that begins with what was written.

/// Pico-dollars per token that one dollar per million tokens is.
const PICO: u64 = 1_000_000;
/// The most that is believed, in dollars per million tokens.
const MOST_USD: u64 = 1_000_000;

/// Dollars per million tokens with up to six decimals, as pico-dollars per token.
///
/// # Errors
/// What is wrong with them.
pub fn parse_usd_per_mtok(text: &str) -> Result<u64, String> {
    let out_of_range = || format!("is not between 0 and {MOST_USD} dollars per million tokens");
    let form = || match text.parse::<f64>() {
        Ok(number) if !(0.0..=1e6).contains(&number) => out_of_range(),
        _ => "is not a price: write dollars per million tokens with up to six decimals, such as 0.075".to_owned(),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let (true, true) = (is_number(whole), is_number(fraction)) else { return Err(form()) };
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > 6 {
        return Err(form());
    }
    let pico = format!("{whole}{fraction:0<6}").parse().ok().filter(|pico| *pico <= MOST_USD * PICO);
    pico.ok_or_else(out_of_range)
}

/// The same the other way, without needless zeros.
#[must_use]
pub fn show_usd_per_mtok(pico: u64) -> String {
    let fraction = format!("{:06}", pico % PICO);
    match fraction.trim_end_matches('0') {
        "" => (pico / PICO).to_string(),
        digits => format!("{}.{digits}", pico / PICO),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prices_are_exact() {
        for (text, pico) in [
            ("0", 0),
            ("2.5", 2_500_000),
            ("0.005", 5_000),
            ("10", 10_000_000),
            ("0.000001", 1),
            ("1000000", 1_000_000_000_000),
        ] {
            assert_eq!(parse_usd_per_mtok(text), Ok(pico), "{text}");
            assert_eq!(show_usd_per_mtok(pico), text);
        }
        assert_eq!(parse_usd_per_mtok("2.5000000000"), Ok(2_500_000), "zeros at the end say nothing");
    }

    #[test]
    fn prices_that_cannot_be_meant_are_refused() {
        for bad in ["-1", "-0.5", "nan", "inf", "2e6", "1000000.000001", "99999999999999999999999"] {
            assert!(parse_usd_per_mtok(bad).is_err_and(|text| text.contains("between 0 and 1000000")), "{bad}");
        }
        for bad in ["", ".", "5.", ".5", "0.0000001", "1e-3", "1,5", "$5", "+1", "five"] {
            assert!(parse_usd_per_mtok(bad).is_err_and(|text| text.contains("such as 0.075")), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_to_the_same(pico in 0..=MOST_USD * PICO) {
            prop_assert_eq!(parse_usd_per_mtok(&show_usd_per_mtok(pico)), Ok(pico));
        }

        #[test]
        fn nothing_crashes(text in ".{0,20}|[0-9.+e-]{0,30}") {
            if let Ok(pico) = parse_usd_per_mtok(&text) {
                prop_assert!(pico <= MOST_USD * PICO);
            }
        }
    }
}
