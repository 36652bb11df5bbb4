//! The values of a row into what it says.
use super::{RowFormat, RowKind, RowOptions, Turns, format::truth, kind_of};
use crate::Message;
use serde_json::{Map, Value, json};

/// What the fields of a row of `format` say.
pub(super) fn convert(fields: Map<String, Value>, format: RowFormat, options: &RowOptions) -> Result<RowKind, String> {
    let mut row = Fields { fields, options };
    match format {
        RowFormat::Text => row.string("text").map(RowKind::Text),
        RowFormat::PromptCompletion => row.prompt_completion(),
        RowFormat::Messages | RowFormat::Sharegpt | RowFormat::Alpaca => {
            let messages = row.conversation()?;
            Ok(RowKind::Messages { messages, trained_from: 0, tools: row.tools()? })
        }
        RowFormat::Preference => row.preference(),
        RowFormat::Kto => row.judged(),
        RowFormat::Classification => {
            let text = match row.take("text") {
                Value::Null => Turns::Messages(row.conversation()?),
                text => Turns::Text(string("text", text)?),
            };
            Ok(RowKind::Labelled { text, label: label(&row.take("label"))? })
        }
    }
}

/// What is still to be used of a row.
struct Fields<'a> {
    fields: Map<String, Value>,
    options: &'a RowOptions,
}

impl Fields<'_> {
    fn take(&mut self, key: &str) -> Value {
        self.fields.remove(key).unwrap_or(Value::Null)
    }

    fn string(&mut self, key: &str) -> Result<String, String> {
        string(key, self.take(key))
    }

    fn optional(&mut self, key: &str) -> Result<String, String> {
        match self.take(key) {
            Value::Null => Ok(String::new()),
            value => string(key, value),
        }
    }

    fn has(&self, key: &str) -> bool {
        self.fields.get(key).is_some_and(|value| !value.is_null())
    }

    /// Tool definitions, or the JSON of them.
    fn tools(&mut self) -> Result<Option<Value>, String> {
        match parsed(self.take("tools")) {
            Value::Null => Ok(None),
            Value::String(text) if text.trim().is_empty() => Ok(None),
            Value::Array(tools) if tools.is_empty() => Ok(None),
            // A definition may itself be written as JSON.
            Value::Array(tools) => Ok(Some(tools.into_iter().map(parsed).collect())),
            other => Err(format!(
                "\"tools\" must be a list of tool definitions or the JSON of one, this is {}",
                kind_of(&other)
            )),
        }
    }

    /// The conversation of a messages, sharegpt or alpaca row, with what `system` says before it.
    fn conversation(&mut self) -> Result<Vec<Message>, String> {
        let system = self.optional("system")?;
        let mut said = match ["messages", "conversations"].into_iter().find(|key| self.has(key)) {
            Some(key) => {
                let value = self.take(key);
                self.messages(key, value)?
            }
            None => self.alpaca()?,
        };
        if !system.is_empty() {
            said.insert(0, Message::new("system", system));
        }
        Ok(said)
    }

    /// Earlier turns, the instruction, and the output where there is one.
    fn alpaca(&mut self) -> Result<Vec<Message>, String> {
        let (instruction, input) = (self.optional("instruction")?, self.optional("input")?);
        let mut said = history(self.take("history"))?;
        let separator = if input.is_empty() { "" } else { "\n" };
        said.push(Message::new("user", format!("{instruction}{separator}{input}")));
        if self.has("output") {
            said.push(Message::new("assistant", self.string("output")?));
        }
        Ok(said)
    }

    fn messages(&self, key: &str, value: Value) -> Result<Vec<Message>, String> {
        let items = match untangled(parsed(value)) {
            Value::Array(items) => items,
            other => return Err(format!("{key:?} must be a list of messages, this is {}", kind_of(&other))),
        };
        if items.is_empty() {
            return Err(format!("{key:?} is an empty list; at least one message is needed"));
        }
        let message = |(index, item)| {
            message(item, self.options).map_err(|what| format!("message {} of {key:?}: {what}", index + 1))
        };
        items.into_iter().enumerate().map(message).collect()
    }

    /// Text, a list of messages, or a single message.
    fn turns(&mut self, key: &str) -> Result<Turns, String> {
        match self.take(key) {
            Value::String(text) => Ok(Turns::Text(text)),
            value @ Value::Object(_) => self
                .messages(key, untangled(value.clone()))
                .or_else(|_| self.messages(key, json!([value])))
                .map(Turns::Messages),
            value @ Value::Array(_) => self.messages(key, value).map(Turns::Messages),
            other => Err(format!("{key:?} must be a string or a list of messages, this is {}", kind_of(&other))),
        }
    }

    fn prompt_completion(&mut self) -> Result<RowKind, String> {
        match (self.turns("prompt")?, self.turns("completion")?) {
            (Turns::Text(prompt), Turns::Text(completion)) => Ok(RowKind::PromptCompletion { prompt, completion }),
            (Turns::Messages(mut messages), Turns::Messages(completion)) => {
                let trained_from = messages.len();
                messages.extend(completion);
                Ok(RowKind::Messages { messages, trained_from, tools: self.tools()? })
            }
            (prompt, completion) => Err(different("prompt", &prompt, "completion", &completion)),
        }
    }

    fn preference(&mut self) -> Result<RowKind, String> {
        let (chosen, rejected) = (self.turns("chosen")?, self.turns("rejected")?);
        if chosen == rejected {
            return Err("\"chosen\" and \"rejected\" are the same, so that there is nothing to prefer".into());
        }
        let prompt = match () {
            () if self.has("prompt") => Some(self.turns("prompt")?),
            () if ["messages", "conversations", "instruction"].iter().any(|key| self.has(key)) => {
                Some(Turns::Messages(self.conversation()?))
            }
            () => None,
        };
        let (prompt, chosen, rejected) = match (prompt, chosen, rejected) {
            (None, Turns::Text(chosen), Turns::Text(rejected)) => {
                let at = common_text(&chosen, &rejected);
                let prompt = chosen[..at].to_owned();
                (Turns::Text(prompt), Turns::Text(chosen[at..].into()), Turns::Text(rejected[at..].into()))
            }
            (prompt, Turns::Messages(chosen), Turns::Messages(rejected)) => with_prompt(prompt, chosen, rejected)?,
            (Some(Turns::Messages(prompt)), Turns::Text(chosen), Turns::Text(rejected)) => {
                let answer = |text| Turns::Messages(vec![Message::new("assistant", text)]);
                (Turns::Messages(prompt), answer(chosen), answer(rejected))
            }
            (Some(Turns::Text(prompt)), chosen @ Turns::Text(_), rejected @ Turns::Text(_)) => {
                (Turns::Text(prompt), chosen, rejected)
            }
            (_, chosen, rejected) => return Err(different("chosen", &chosen, "rejected", &rejected)),
        };
        Ok(RowKind::Preference { prompt, chosen, rejected, tools: self.tools()? })
    }

    fn judged(&mut self) -> Result<RowKind, String> {
        let key = if self.has("kto_tag") { "kto_tag" } else { "label" };
        let value = self.take(key);
        let label = truth(&value).ok_or_else(|| format!("{key:?} must be true or false, this is {value}"))?;
        if self.has("prompt") {
            let (prompt, completion) = (self.turns("prompt")?, self.turns("completion")?);
            return match (&prompt, &completion) {
                (Turns::Text(_), Turns::Text(_)) | (Turns::Messages(_), Turns::Messages(_)) => {
                    Ok(RowKind::Judged { prompt, completion, label, tools: self.tools()? })
                }
                _ => Err(different("prompt", &prompt, "completion", &completion)),
            };
        }
        let mut prompt = self.conversation()?;
        let answer = prompt.pop_if(|last| last.role == "assistant");
        let Some(answer) = answer else {
            return Err("the conversation does not end with the assistant, so there is no answer to judge".into());
        };
        let (prompt, completion) = (Turns::Messages(prompt), Turns::Messages(vec![answer]));
        Ok(RowKind::Judged { prompt, completion, label, tools: self.tools()? })
    }
}

/// Prompt and answers of two lists of messages, which may repeat the prompt.
fn with_prompt(
    prompt: Option<Turns>,
    mut chosen: Vec<Message>,
    mut rejected: Vec<Message>,
) -> Result<(Turns, Turns, Turns), String> {
    let repeated = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    let prompt = match prompt {
        Some(Turns::Messages(prompt)) if repeated == 0 => prompt,
        Some(Turns::Text(prompt)) if repeated == 0 => vec![Message::new("user", prompt)],
        // The lists hold the whole conversations.
        _ if repeated > 0 => {
            let prompt = chosen.drain(..repeated).collect();
            rejected.drain(..repeated);
            prompt
        }
        _ => return Err("\"chosen\" and \"rejected\" begin differently and there is no \"prompt\"".into()),
    };
    if chosen.is_empty() || rejected.is_empty() {
        return Err("one of \"chosen\" and \"rejected\" only begins the other".into());
    }
    Ok((Turns::Messages(prompt), Turns::Messages(chosen), Turns::Messages(rejected)))
}

/// Bytes that two texts begin with alike, without a blank at the end, which belongs to the word after it.
fn common_text(a: &str, b: &str) -> usize {
    let same: usize = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    if a[..same].ends_with(' ') { same - 1 } else { same }
}

fn different(a: &str, found_a: &Turns, b: &str, found_b: &Turns) -> String {
    let name = |turns: &Turns| match turns {
        Turns::Text(_) => "a string",
        Turns::Messages(_) => "a list",
    };
    format!(
        "{a:?} is {} and {b:?} is {}; both must be strings, or both lists of messages",
        name(found_a),
        name(found_b)
    )
}

/// JSON in a string, as tables and columnar files have to write it.
fn parsed(value: Value) -> Value {
    match &value {
        Value::String(text) if text.trim_start().starts_with(['[', '{']) => serde_json::from_str(text).unwrap_or(value),
        _ => value,
    }
}

/// A list of objects that is stored as an object of lists, which is how `datasets` writes a sequence of structures.
fn untangled(value: Value) -> Value {
    let Value::Object(columns) = &value else { return value };
    let lists: Option<Vec<(&String, &Vec<Value>)>> =
        columns.iter().map(|(key, list)| list.as_array().map(|list| (key, list))).collect();
    let Some(lists) = lists.filter(|lists| !lists.is_empty() && lists.iter().all(|(_, l)| l.len() == lists[0].1.len()))
    else {
        return value;
    };
    let item = |index: usize| -> Value {
        lists.iter().map(|(key, list)| ((*key).clone(), list[index].clone())).collect::<Map<_, _>>().into()
    };
    (0..lists[0].1.len()).map(item).collect()
}

fn message(item: Value, options: &RowOptions) -> Result<Message, String> {
    let Value::Object(mut item) = item else {
        return Err(format!("{{\"role\": ..., \"content\": ...}} is expected, this is {}", kind_of(&item)));
    };
    let key = |ours: &'static str, theirs: &'static str| match options.columns.get(ours) {
        Some(mapped) => mapped.as_str(),
        None if item.contains_key(theirs) && !item.contains_key(ours) => theirs,
        None => ours,
    };
    let (role_key, content_key) = (key("role", "from").to_owned(), key("content", "value").to_owned());
    let role = match item.remove(&role_key) {
        Some(Value::String(role)) => role,
        Some(other) => return Err(format!("{role_key:?} must be a string, this is {}", kind_of(&other))),
        None => return Err(format!("there is no {role_key:?}; expected is {{\"role\": ..., \"content\": ...}}")),
    };
    let content = item.remove(&content_key).unwrap_or(Value::Null);
    // A field without a value is a field that is not there: templates ask whether it is defined.
    item.retain(|_, value| !value.is_null());
    if let Some(calls) = item.get_mut("tool_calls") {
        *calls = tool_calls(std::mem::take(calls))?;
    }
    if role == "function_call" && !options.roles.contains_key(&role) {
        item.insert("tool_calls".into(), tool_calls(called(&content)?)?);
        return Ok(Message { role: "assistant".into(), content: String::new(), extra: item });
    }
    if content.is_null() && !item.contains_key("tool_calls") {
        return Err(format!("there is no {content_key:?}, and no tool is called"));
    }
    item.insert("content".into(), content);
    item.insert("role".into(), role_name(&role, options).into());
    serde_json::from_value(Value::Object(item)).map_err(|e| e.to_string())
}

/// The role that a data set means by `role`.
fn role_name(role: &str, options: &RowOptions) -> String {
    if let Some(mapped) = options.roles.get(role) {
        return mapped.clone();
    }
    match role {
        "human" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
        "observation" | "function_response" | "ipython" => "tool",
        other => other,
    }
    .into()
}

/// Calls, or the JSON of them, with their arguments as objects: templates write them out as JSON themselves.
fn tool_calls(calls: Value) -> Result<Value, String> {
    let Value::Array(mut calls) = parsed(calls) else {
        return Err("\"tool_calls\" must be a list".into());
    };
    for call in &mut calls {
        let function = match call.get("function") {
            Some(_) => call.get_mut("function"),
            None => Some(call),
        };
        if let Some(Value::Object(function)) = function
            && let Some(arguments) = function.get_mut("arguments")
        {
            *arguments = parsed(std::mem::take(arguments));
        }
    }
    Ok(calls.into())
}

/// What a sharegpt `function_call` says: one call, or a list of them, `{"name", "arguments"}`.
fn called(content: &Value) -> Result<Value, String> {
    let wrong =
        || format!("a function call must be the JSON of {{\"name\": ..., \"arguments\": ...}}, this is {content}");
    let calls = match parsed(content.clone()) {
        Value::Array(calls) => calls,
        call @ Value::Object(_) => vec![call],
        _ => return Err(wrong()),
    };
    let named = |call: &Value| call.get("name").is_some_and(Value::is_string);
    if !calls.iter().all(named) {
        return Err(wrong());
    }
    Ok(calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect())
}

fn string(key: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("{key:?} must be a string, this is {}", kind_of(&other))),
    }
}

/// The name of a class.
fn label(value: &Value) -> Result<String, String> {
    match value {
        Value::String(name) if !name.is_empty() => Ok(name.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(truth) => Ok(truth.to_string()),
        other => Err(format!("\"label\" must be a name or a number, this is {other}")),
    }
}

/// Earlier turns of an alpaca row: a list of [user, assistant] pairs.
fn history(value: Value) -> Result<Vec<Message>, String> {
    let wrong = || "\"history\" must be a list of [user, assistant] pairs of strings".to_owned();
    let pairs: Vec<(String, String)> = match parsed(value) {
        Value::Null => Vec::new(),
        Value::String(text) if text.is_empty() => Vec::new(),
        value => serde_json::from_value(value).map_err(|_| wrong())?,
    };
    Ok(pairs
        .into_iter()
        .flat_map(|(user, assistant)| [Message::new("user", user), Message::new("assistant", assistant)])
        .collect())
}
