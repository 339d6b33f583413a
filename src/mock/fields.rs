//! Reading the fields of a request, with OpenAI's words for what is wrong with them.
//!
//! A `null` counts as absent, as it does at OpenAI; fields that the mock does not know are ignored.

use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of a request body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The field `name`, if it is there.
    pub(super) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// The field `name`, which must be there.
    pub(super) fn required(self, name: &str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| ApiError::missing(name))
    }

    /// A text.
    pub(super) fn text(self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// `true` or `false`; absent is `false`.
    pub(super) fn flag(self, name: &str) -> Result<bool, ApiError> {
        Ok(self.typed(name, "a boolean", Value::as_bool)?.unwrap_or(false))
    }

    /// A list; absent is empty.
    pub(super) fn list(self, name: &str) -> Result<&'a [Value], ApiError> {
        Ok(self.typed(name, "an array", Value::as_array)?.map_or(&[], Vec::as_slice))
    }

    /// A JSON object.
    pub(super) fn object(self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        Ok(self.typed(name, "an object", Value::as_object)?.map(Fields))
    }

    /// A whole number of at least `least`.
    pub(super) fn count(self, name: &str, least: u32) -> Result<Option<u32>, ApiError> {
        let Some(number) = self.typed(name, "an integer", Value::as_i64)? else { return Ok(None) };
        match u32::try_from(number) {
            Ok(count) if count >= least => Ok(Some(count)),
            Ok(_) | Err(_) if number < i64::from(least) => Err(ApiError::invalid(format!(
                "Invalid '{name}': integer below minimum value. Expected a value >= {least}, but got {number} instead."
            ))
            .param(name)
            .code("integer_below_min_value")),
            _ => Err(ApiError::invalid(format!("Invalid '{name}': integer above maximum value."))
                .param(name)
                .code("integer_above_max_value")),
        }
    }

    fn typed<T>(
        self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| ApiError::wrong_type(name, expected, value))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mock::headers::Provider;

    fn code(error: &ApiError) -> Value {
        error.body(Provider::OpenAi)["error"]["code"].clone()
    }

    #[test]
    fn wrong_types_and_ranges_are_named() {
        let body = json!({"n": 0, "m": 5_000_000_000_u64, "stream": "yes", "user": null, "f": 1.5});
        let fields = Fields(body.as_object().unwrap());
        assert_eq!(code(&fields.count("n", 1).unwrap_err()), "integer_below_min_value");
        assert_eq!(code(&fields.count("m", 1).unwrap_err()), "integer_above_max_value");
        assert_eq!(code(&fields.count("f", 1).unwrap_err()), "invalid_type");
        assert_eq!(code(&fields.flag("stream").unwrap_err()), "invalid_type");
        assert_eq!(code(&fields.required("user").unwrap_err()), "missing_required_parameter");
        assert_eq!(fields.text("user").unwrap(), None);
        assert_eq!(fields.count("n", 0).unwrap(), Some(0));
    }
}
