//! `/v1/embeddings`: vectors that depend on nothing but their input.
//!
//! A vector has length one, as OpenAI's have, and is drawn from a generator that is seeded with the input, so equal
//! inputs have equal vectors and a client's decoding can be checked against the other encoding.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use super::{call::Call, completions::token_counts, delivery::Answer, error::ApiError};

/// Most inputs of one request, as at OpenAI.
const MOST_INPUTS: usize = 2048;

/// One vector of the answer.
#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// A vector, as it was asked for.
#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Floats(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Body<'a> {
    object: &'static str,
    data: Vec<Embedding>,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

/// Answers the request.
pub(super) fn answer(call: &Call<'_>) -> Result<Answer, ApiError> {
    let input = call.fields.required("input")?;
    let tokens: u64 = token_counts("input", input, call.vocabulary())?.iter().sum();
    let inputs = inputs(input)?;
    let is_base64 = match call.fields.text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "Invalid value: '{other}'. Supported values are: 'float' and 'base64'."
            ))
            .param("encoding_format")
            .code("invalid_value"));
        }
    };
    let dimensions = dimensions(call)?;
    let embedding = |(index, input): (usize, &Value)| {
        let floats = vector(&input.to_string(), dimensions);
        let embedding = if is_base64 { Vector::Base64(to_base64(&floats)) } else { Vector::Floats(floats) };
        Embedding { object: "embedding", index, embedding }
    };
    let body = Body {
        object: "list",
        data: inputs.into_iter().enumerate().map(embedding).collect(),
        model: call.answering_model(),
        usage: (!call.faults.no_usage).then(|| json!({"prompt_tokens": tokens, "total_tokens": tokens})),
    };
    let bytes = serde_json::to_vec(&body).map_err(|error| ApiError::invalid(error.to_string()))?;
    Ok(Answer::Whole(Bytes::from(bytes)))
}

/// The inputs one by one. A list of numbers is one input.
fn inputs(input: &Value) -> Result<Vec<&Value>, ApiError> {
    let inputs: Vec<_> = match input.as_array() {
        Some(list) if !list.iter().all(Value::is_number) => list.iter().collect(),
        _ => vec![input],
    };
    if inputs.len() > MOST_INPUTS {
        return Err(
            ApiError::invalid(format!("'$.input' is too long. Maximum length is {MOST_INPUTS}.")).param("input")
        );
    }
    if inputs.iter().any(|input| input.as_str() == Some("")) {
        return Err(ApiError::invalid(
            "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference.",
        ));
    }
    Ok(inputs)
}

fn dimensions(call: &Call<'_>) -> Result<u32, ApiError> {
    let most = if call.model.contains("3-large") { 3072 } else { 1536 };
    let Some(wanted) = call.fields.count("dimensions", 1)? else { return Ok(most) };
    if call.model.contains("ada-002") {
        return Err(ApiError::invalid("This model does not support specifying dimensions.").param("dimensions"));
    }
    if wanted > most {
        let message = format!("Invalid value for 'dimensions' = {wanted}. Must be less than or equal to {most}.");
        return Err(ApiError::invalid(message).param("dimensions"));
    }
    Ok(wanted)
}

/// A vector of length one, drawn by xorshift from a seed that FNV-1a makes of `input`.
fn vector(input: &str, dimensions: u32) -> Vec<f32> {
    let mut state = input
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
        | 1;
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // 16 bits are exact in an f32.
        f32::from(u16::try_from(state >> 48).unwrap_or(0)) / 32_768.0 - 1.0
    };
    let raw: Vec<f32> = (0..dimensions).map(|_| draw()).collect();
    let length = raw.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    raw.into_iter().map(|x| x / length).collect()
}

fn to_base64(floats: &[f32]) -> String {
    let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_and_follow_their_input() {
        let vector_a = vector("\"a\"", 1536);
        assert_eq!(vector_a, vector("\"a\"", 1536));
        assert_ne!(vector_a, vector("\"b\"", 1536));
        let length: f32 = vector_a.iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-4, "{length}");
    }

    #[test]
    fn base64_is_little_endian() {
        assert_eq!(STANDARD.decode(to_base64(&[1.0, -2.5])).unwrap(), [0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]);
    }

    #[test]
    fn a_list_of_tokens_is_one_input() {
        assert_eq!(inputs(&json!([1, 2, 3])).unwrap().len(), 1);
        assert_eq!(inputs(&json!([[1, 2], [3]])).unwrap().len(), 2);
        assert!(inputs(&json!(["a", ""])).is_err());
        assert!(inputs(&json!(vec!["a"; MOST_INPUTS + 1])).is_err());
    }
}
