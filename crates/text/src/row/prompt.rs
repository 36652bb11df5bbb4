//! Prompts made of the keys of a row: `"Review: {text}\nSentiment:"`.
use super::format::{kind_of, quoted};
use crate::{Error, PrepareOptions, Result};
use serde_json::{Map, Value};

/// A text with places for keys.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Key(String),
}

impl Pattern {
    /// `name` is what the option is called.
    fn parse(name: &str, text: &str) -> Result<Self> {
        let wrong =
            |what: &str| Error::Input(format!("{name} = {text:?}: {what}; a brace of its own is written twice"));
        let (mut pieces, mut plain) = (Vec::new(), String::new());
        let mut rest = text.chars().peekable();
        while let Some(character) = rest.next() {
            match character {
                '{' | '}' if rest.peek() == Some(&character) => {
                    rest.next();
                    plain.push(character);
                }
                '{' => {
                    let key: String = rest.by_ref().take_while(|&character| character != '}').collect();
                    if key.is_empty() || key.contains('{') || !text.contains('}') {
                        return Err(wrong("a key such as {text} is expected in braces"));
                    }
                    pieces.push(Piece::Text(std::mem::take(&mut plain)));
                    pieces.push(Piece::Key(key));
                }
                '}' => return Err(wrong("there is a } without its {")),
                other => plain.push(other),
            }
        }
        pieces.push(Piece::Text(plain));
        Ok(Self(pieces))
    }

    fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|piece| match piece {
            Piece::Key(key) => Some(key.as_str()),
            Piece::Text(_) => None,
        })
    }

    fn fill(&self, value: impl Fn(&str) -> Result<String, String>) -> Result<String, String> {
        self.0
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => Ok(text.clone()),
                Piece::Key(key) => value(key),
            })
            .collect()
    }
}

/// `template`, `completion` and `few_shot`, ready to be filled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PromptTemplate {
    prompt: Pattern,
    completion: Pattern,
    /// What stands before every prompt.
    examples: String,
}

impl PromptTemplate {
    /// `None` when there is no `template`.
    ///
    /// # Errors
    /// A pattern that cannot be read, one without keys, examples without a key, or examples without a template.
    pub(crate) fn of(options: &PrepareOptions) -> Result<Option<Self>> {
        let Some(template) = &options.template else {
            return match options.few_shot.is_empty() {
                true => Ok(None),
                false => Err(Error::Input("few_shot needs a template, such as \"Review: {text}\\nSentiment:\"".into())),
            };
        };
        let (prompt, completion) =
            (Pattern::parse("template", template)?, Pattern::parse("completion", &options.completion)?);
        for (name, pattern) in [("template", &prompt), ("completion", &completion)] {
            if pattern.keys().next().is_none() {
                return Err(Error::Input(format!("{name} names no key of a row, so that all rows would be the same")));
            }
        }
        let mut examples = String::new();
        for (index, example) in options.few_shot.iter().enumerate() {
            let value = |key: &str| {
                example
                    .get(key)
                    .cloned()
                    .ok_or_else(|| format!("few_shot: example {} has no {key:?}, which the templates name", index + 1))
            };
            let filled = prompt.fill(value).and_then(|prompt| Ok(prompt + &completion.fill(value)?));
            examples.push_str(&filled.map_err(Error::Input)?);
            examples.push_str("\n\n");
        }
        Ok(Some(Self { prompt, completion, examples }))
    }

    /// Whether `key` is named.
    pub(crate) fn names(&self, key: &str) -> bool {
        self.prompt.keys().chain(self.completion.keys()).any(|named| named == key)
    }

    /// Prompt and completion of a row.
    pub(crate) fn fill(&self, row: &Map<String, Value>) -> Result<(String, String), String> {
        let value = |key: &str| match row.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            Some(other) => {
                Err(format!("{key:?}, which template names, is {}; text or a number is needed", kind_of(other)))
            }
            None => {
                let keys = quoted(row.keys().map(String::as_str));
                Err(format!("there is no {key:?}, which template names; the keys are {keys}"))
            }
        };
        Ok((format!("{}{}", self.examples, self.prompt.fill(value)?), self.completion.fill(value)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(change: impl FnOnce(&mut PrepareOptions)) -> Result<Option<PromptTemplate>> {
        let mut options = PrepareOptions { template: Some("Review: {text}\nSentiment:".into()), ..Default::default() };
        change(&mut options);
        PromptTemplate::of(&options)
    }

    fn fill(template: &PromptTemplate, row: Value) -> Result<(String, String), String> {
        template.fill(row.as_object().unwrap())
    }

    #[test]
    fn rows_fill_the_pattern() {
        let plain = template(|_| ()).unwrap().unwrap();
        let filled = fill(&plain, json!({"text": "Dull.", "label": 0, "id": 1}));
        assert_eq!(filled, Ok(("Review: Dull.\nSentiment:".into(), " 0".into())));
        assert!(plain.names("text") && plain.names("label") && !plain.names("id"));
        let error = fill(&plain, json!({"text": "Dull."})).unwrap_err();
        assert_eq!(error, "there is no \"label\", which template names; the keys are \"text\"");
        assert!(
            fill(&plain, json!({"text": null, "label": 1}))
                .unwrap_err()
                .contains("\"text\", which template names, is null")
        );
        let braces = template(|o| o.template = Some("{{{text}}} {n}".into())).unwrap().unwrap();
        assert_eq!(
            fill(&braces, json!({"text": "t", "n": 2.5, "label": true})),
            Ok(("{t} 2.5".into(), " true".into()))
        );
    }

    #[test]
    fn examples_stand_before_every_prompt() {
        let example = |text: &str, label: &str| {
            [("text", text), ("label", label)].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
        };
        let shots =
            template(|o| o.few_shot = vec![example("Great!", "good"), example("Meh.", "bad")]).unwrap().unwrap();
        let (prompt, completion) = fill(&shots, json!({"text": "T", "label": "L"})).unwrap();
        assert_eq!(prompt, "Review: Great!\nSentiment: good\n\nReview: Meh.\nSentiment: bad\n\nReview: T\nSentiment:");
        assert_eq!(completion, " L");
    }

    #[test]
    fn what_cannot_be_filled_is_named() {
        let text = |change: fn(&mut PrepareOptions)| template(change).unwrap_err().to_string();
        for pattern in ["{text", "{}", "a } b {text}", "{a{b}"] {
            let error = template(|o| o.template = Some(pattern.into())).unwrap_err().to_string();
            assert!(error.starts_with(&format!("template = {pattern:?}: ")), "{error}");
        }
        assert!(text(|o| o.template = Some("Review".into())).contains("names no key"));
        assert!(text(|o| o.completion = "yes".into()).contains("completion names no key"));
        assert!(text(|o| o.few_shot = vec![Default::default()]).contains("example 1 has no \"text\""));
        assert!(
            text(|o| (o.template, o.few_shot) = (None, vec![Default::default()])).contains("few_shot needs a template")
        );
    }
}
