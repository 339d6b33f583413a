//! What Azure adds to answers: the verdicts of its content filter.

use serde_json::{Value, json};

use super::delivery::Event;

/// The chunk that Azure's streams begin with.
pub(super) fn opening(includes_usage: bool) -> Event {
    let mut chunk = json!({
        "choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": prompt_filter(),
    });
    if includes_usage {
        chunk["usage"] = Value::Null;
    }
    Event::data(&chunk)
}

/// Azure's verdict on a prompt.
pub(super) fn prompt_filter() -> Value {
    json!([{"prompt_index": 0, "content_filter_results": content_filter()}])
}

/// Azure's verdict on an answer.
pub(super) fn content_filter() -> Value {
    let safe = json!({"filtered": false, "severity": "safe"});
    json!({"hate": safe, "self_harm": safe, "sexual": safe, "violence": safe})
}
