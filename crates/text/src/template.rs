//! Chat templates: the Jinja dialect of Hugging Face's `apply_chat_template`, rendered by minijinja.
//!
//! Blocks eat the line break after them and the blanks before them; loops know `break` and `continue`; strings, lists
//! and maps have Python's methods; `tojson` writes what Python's `json.dumps` writes; `raise_exception` refuses a
//! conversation; `strftime_now` tells the date, which comes from the caller, so that rendering is a function of its
//! input.
use crate::{Error, Result, SpecialTokens, Tokenizer};
use minijinja::{
    Environment, ErrorKind, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, ser::Formatter};
use std::{
    io::{self, Write},
    ops::Range,
};

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: "system", "user", "assistant", "tool", or what else the template knows.
    pub role: String,
    /// What is said. In JSON also `null` (a pure tool call) or a list of `{"type": "text", "text": ...}` parts.
    #[serde(default, deserialize_with = "content")]
    pub content: String,
    /// Everything else, handed to the template as it is: `name`, `tool_calls`, `tool_call_id`, ...
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message with nothing but a role and a content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

fn content<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    use serde::de::Error as _;
    let not_text = || D::Error::custom("\"content\" must be a string or a list of text parts");
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(text),
        Value::Null => Ok(String::new()),
        Value::Array(parts) => {
            parts.iter().map(|part| part.get("text").and_then(Value::as_str).ok_or_else(not_text)).collect()
        }
        _ => Err(not_text()),
    }
}

/// Everything a template may see.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conversation<'a> {
    /// The messages in order.
    pub messages: &'a [Message],
    /// Tool definitions (a list of JSON schemas), `none` in the template when absent.
    pub tools: Option<&'a Value>,
    /// Documents to answer from, `none` in the template when absent.
    pub documents: Option<&'a Value>,
    /// Whether the header of the assistant's answer follows the messages.
    pub add_generation_prompt: bool,
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special: SpecialTokens,
    now: Option<i64>,
}

const NAME: &str = "chat_template";

/// The same template with marks where `{% generation %}` blocks begin and end.
const MARKED: &str = "chat_template_marked";
/// Private-use characters at the very end of Unicode, which no text has.
const BLOCK_START: &str = "\u{10fffc}";
const BLOCK_END: &str = "\u{10fffd}";

impl ChatTemplate {
    /// Compiles `source`. `now` is the time that `strftime_now` tells, in seconds since 1970 of local time; without it
    /// the function is not defined, and templates fall back to the fixed date they carry for that case.
    ///
    /// # Errors
    /// A syntax error, with its line.
    pub fn new(source: &str, special: &SpecialTokens, now: Option<i64>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| explain(&e))?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        if let Some(now) = now {
            environment.add_function("strftime_now", move |format: String| strftime(&format, now));
        }
        let plain = generation_tags(source, false);
        let marks_answers = plain != source;
        environment.add_template_owned(NAME, plain).map_err(|e| explain(&e))?;
        if marks_answers {
            environment.add_template_owned(MARKED, generation_tags(source, true)).map_err(|e| explain(&e))?;
        }
        Ok(Self { environment, source: source.to_owned(), special: special.clone(), now })
    }

    /// The template that came with `tokenizer`, if any. `now` as in [`Self::new`].
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of(tokenizer: &Tokenizer, now: Option<i64>) -> Result<Option<Self>> {
        tokenizer.chat_template().map(|source| Self::new(source, tokenizer.special_tokens(), now)).transpose()
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The date that the template tells, as a day counted from 1970; none when it was given no time or does not ask.
    pub fn date(&self) -> Option<i64> {
        self.now.filter(|_| self.source.contains("strftime_now")).map(|now| now.div_euclid(86_400))
    }

    /// The conversation as one text. It holds BOS where the template writes it, so tokenise it without adding one.
    ///
    /// # Errors
    /// The template refuses the conversation (`raise_exception`) or fails; the message names the template's line.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_conversation(&Conversation { messages, add_generation_prompt, ..Conversation::default() })
    }

    /// [`Self::render`] with tools and documents.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_conversation(&self, conversation: &Conversation<'_>) -> Result<String> {
        self.render_as(NAME, conversation)
    }

    /// [`Self::render_conversation`], and the byte ranges of the `{% generation %}` blocks in it, if the template has
    /// such blocks. Blanks before the end of a block do not belong to it.
    ///
    /// # Errors
    /// As [`Self::render`]; blocks that are nested or change what is rendered.
    pub fn render_with_blocks(&self, conversation: &Conversation<'_>) -> Result<(String, Option<Vec<Range<usize>>>)> {
        let text = self.render_conversation(conversation)?;
        if self.environment.get_template(MARKED).is_err() {
            return Ok((text, None));
        }
        let wrong = || Error::Input("the chat template: its {% generation %} blocks cannot be told apart".into());
        let marked = self.render_as(MARKED, conversation)?;
        let (mut unmarked, mut blocks) = (String::with_capacity(text.len()), Vec::new());
        let mut parts = marked.split(BLOCK_START);
        unmarked.push_str(parts.next().unwrap_or_default());
        for part in parts {
            let (inside, after) = part.split_once(BLOCK_END).ok_or_else(wrong)?;
            let start = unmarked.len();
            unmarked.push_str(inside);
            blocks.push(start..unmarked.len());
            unmarked.push_str(after);
        }
        if unmarked == text { Ok((text, Some(blocks))) } else { Err(wrong()) }
    }

    fn render_as(&self, name: &str, conversation: &Conversation<'_>) -> Result<String> {
        let variables = context! {
            messages => Serde(conversation.messages),
            tools => Serde(conversation.tools),
            documents => Serde(conversation.documents),
            add_generation_prompt => conversation.add_generation_prompt,
            ..minijinja::Value::from(Serde(&self.special))
        };
        let template = self.environment.get_template(name).map_err(|e| explain(&e))?;
        template.render(variables).map_err(|e| explain(&e))
    }
}

fn explain(error: &minijinja::Error) -> Error {
    // A failing macro wraps the reason in the error of its call: the innermost one says what to change.
    let mut reason = error;
    while let Some(inner) = std::error::Error::source(reason).and_then(|e| e.downcast_ref::<minijinja::Error>()) {
        reason = inner;
    }
    let line = reason.line().or(error.line()).map_or_else(String::new, |line| format!(", line {line}"));
    let what = reason.detail().map_or_else(|| reason.kind().to_string(), str::to_owned);
    Error::Input(format!("the chat template{line}: {what}"))
}

/// `{% generation %}` marks the assistant's part for loss masks; it prints nothing, so here it becomes a condition that
/// always holds, with the same white-space marks and on the same line. With `marks`, characters that say where the
/// block begins and ends are printed inside it, beyond the blanks that the tags take away.
fn generation_tags(source: &str, marks: bool) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, mut after) = tag.split_at(end);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match name {
            "generation" => {
                out.push_str(before);
                out.push_str(&tag.replacen("generation", "if true", 1));
                if marks {
                    let text = after.trim_start();
                    out.push_str(&after[..after.len() - text.len()]);
                    out.push_str(&format!("{{{{ '{BLOCK_START}' }}}}"));
                    after = text;
                }
            }
            "endgeneration" => {
                let text = before.trim_end();
                out.push_str(text);
                if marks {
                    out.push_str(&format!("{{{{ '{BLOCK_END}' }}}}"));
                }
                out.push_str(&before[text.len()..]);
                out.push_str(&tag.replacen("endgeneration", "endif", 1));
            }
            _ => {
                out.push_str(before);
                out.push_str(tag);
            }
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: minijinja::Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let invalid = |what: String| minijinja::Error::new(ErrorKind::InvalidOperation, what);
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators must be two strings".into())),
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let mut value = serde_json::to_value(&value).map_err(|e| invalid(format!("tojson: {e}")))?;
    if sort_keys {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    let formatter = PythonJson { item, key, indent, ensure_ascii, depth: 0, has_value: false };
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    value.serialize(&mut serializer).map_err(|e| invalid(format!("tojson: {e}")))?;
    String::from_utf8(out).map_err(|e| invalid(format!("tojson: {e}")))
}

/// JSON with Python's white space and number spelling.
struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
    ensure_ascii: bool,
    depth: usize,
    has_value: bool,
}

impl PythonJson {
    fn line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.line(writer)?;
        }
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }
}

impl Formatter for PythonJson {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for character in fragment.chars() {
            if character.is_ascii() {
                write!(writer, "{character}")?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        let size = value.abs();
        if size != 0.0 && !(1e-4..1e16).contains(&size) {
            // Python writes exponents with a sign and at least two digits: 1e-07, 1e+16.
            let text = format!("{value:e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let exponent: i32 = exponent.parse().map_err(io::Error::other)?;
            let sign = if exponent < 0 { '-' } else { '+' };
            return write!(writer, "{digits}e{sign}{:02}", exponent.abs());
        }
        write!(writer, "{value:?}")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Year, month (1 to 12) and day of the month of a day counted from 1970-01-01.
///
/// Years are counted from March, so that the leap day is the last of its year, in eras of 400 years (146097 days).
fn civil_date(day: i64) -> (i64, usize, i64) {
    let shifted = day + 719_468; // days from 0000-03-01 to 1970-01-01
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month as usize, day)
}

/// The codes of C's `strftime` that chat templates use.
fn strftime(format: &str, now: i64) -> Result<String, minijinja::Error> {
    let (day_number, second) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    let (year, month, day) = civil_date(day_number);
    let weekday = DAYS[(day_number + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut codes = format.chars();
    while let Some(character) = codes.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let code = codes.next();
        let piece = match code {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year.rem_euclid(100)),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{hour12:02}"),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{:02}", second % 60),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".into(),
            // Without leading zeros.
            Some('-') => match codes.next() {
                Some('d') => day.to_string(),
                Some('m') => month.to_string(),
                Some('H') => hour.to_string(),
                Some('I') => hour12.to_string(),
                other => return Err(unknown_code(format, &format!("%-{}", other.map_or(String::new(), String::from)))),
            },
            other => return Err(unknown_code(format, &format!("%{}", other.map_or(String::new(), String::from)))),
        };
        out.push_str(&piece);
    }
    Ok(out)
}

fn unknown_code(format: &str, code: &str) -> minijinja::Error {
    let what = format!("strftime_now({format:?}): the code {code:?} is not supported");
    minijinja::Error::new(ErrorKind::InvalidOperation, what)
}

#[cfg(test)]
mod tests;
