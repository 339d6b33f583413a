//! When the mock calls a tool, and with which arguments.
//!
//! It calls the first function offered (or the one that `tool_choice` names) unless the choice is `none`. Once a tool
//! has answered it speaks, so that an agent's loop ends. The arguments are made from the function's JSON schema.

use serde_json::{Value, json};

use super::{error::ApiError, fields::Fields};

/// A call of a function.
#[derive(Debug, PartialEq)]
pub(super) struct ToolCall<'a> {
    /// Name of the function.
    pub(super) name: &'a str,
    /// Its arguments: JSON, as text.
    pub(super) arguments: String,
    /// Was this very function demanded? OpenAI then finishes with `stop`, not with `tool_calls`.
    pub(super) is_demanded: bool,
}

/// The call that answers the request, if one does.
pub(super) fn pick<'a>(fields: Fields<'a>, messages: &'a [Value]) -> Result<Option<ToolCall<'a>>, ApiError> {
    let tools = fields.list("tools")?;
    let choice = fields.get("tool_choice");
    let demanded = choice.and_then(|choice| choice["function"]["name"].as_str());
    let is_forced = demanded.is_some() || choice.and_then(Value::as_str) == Some("required");
    let has_answer = messages.last().is_some_and(|message| message["role"] == "tool");
    if tools.is_empty() || choice.and_then(Value::as_str) == Some("none") || (has_answer && !is_forced) {
        return Ok(None);
    }
    let mut functions = tools.iter().map(|tool| &tool["function"]);
    let Some(function) = functions.find(|function| demanded.is_none_or(|name| function["name"] == name)) else {
        return Err(ApiError::invalid("Invalid value for 'tool_choice': no such function in 'tools'.")
            .param("tool_choice")
            .code("invalid_value"));
    };
    let name = function["name"].as_str().ok_or_else(|| ApiError::missing("tools[0].function.name"))?;
    let arguments = example(&function["parameters"]).to_string();
    Ok(Some(ToolCall { name, arguments, is_demanded: demanded.is_some() }))
}

/// A value that fits `schema`, as far as types, constants and enumerations go.
fn example(schema: &Value) -> Value {
    if let Some(fixed) = schema.get("const").or_else(|| schema["enum"].get(0)) {
        return fixed.clone();
    }
    let kind = schema["type"].as_str().or_else(|| schema["type"][0].as_str()).unwrap_or("object");
    match kind {
        "string" => json!("crème brûlée, 漢字"),
        "integer" | "number" => json!(1),
        "boolean" => json!(true),
        "array" => json!([example(&schema["items"])]),
        "null" => Value::Null,
        _ => Value::Object(
            schema["properties"]
                .as_object()
                .map(|properties| properties.iter().map(|(name, schema)| (name.clone(), example(schema))).collect())
                .unwrap_or_default(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(choice: &Value) -> Value {
        json!({
            "tools": [
                {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
                    "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["celsius", "kelvin"]},
                    "tags": {"type": "array", "items": {"type": "boolean"}},
                }}}},
                {"type": "function", "function": {"name": "clock"}},
            ],
            "tool_choice": choice,
        })
    }

    fn name(choice: &Value, messages: &Value) -> Option<String> {
        let body = body(choice);
        let call = pick(Fields(body.as_object().unwrap()), messages.as_array().unwrap()).unwrap();
        call.map(|call| call.name.to_owned())
    }

    #[test]
    fn the_choice_decides() {
        let (asked, answered) = (json!([{"role": "user"}]), json!([{"role": "user"}, {"role": "tool"}]));
        let demand = json!({"type": "function", "function": {"name": "clock"}});
        assert_eq!(name(&Value::Null, &asked).as_deref(), Some("weather"));
        assert_eq!(name(&json!("auto"), &answered), None);
        assert_eq!(name(&json!("none"), &asked), None);
        assert_eq!(name(&json!("required"), &answered).as_deref(), Some("weather"));
        assert_eq!(name(&demand, &asked).as_deref(), Some("clock"));
    }

    #[test]
    fn arguments_fit_the_schema() {
        let body = body(&Value::Null);
        let call = pick(Fields(body.as_object().unwrap()), &[]).unwrap().unwrap();
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        assert_eq!(arguments, json!({"city": "crème brûlée, 漢字", "days": 1, "unit": "celsius", "tags": [true]}));
    }

    #[test]
    fn a_demand_for_what_is_not_offered_is_refused() {
        let body = body(&json!({"type": "function", "function": {"name": "nope"}}));
        assert!(pick(Fields(body.as_object().unwrap()), &[]).is_err());
    }
}
