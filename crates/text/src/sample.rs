//! Tokenises a row and builds its loss mask.
//!
//! Text is tokenised in one piece and the mask comes from the offsets of each token in it, so that the tokens are
//! exactly those that the model sees when it is used. In a conversation the assistant's turns are found by rendering it
//! up to each turn; the token that ends the turn is trained (otherwise the model never learns to stop), the white space
//! after it is not.
use crate::{
    ChatTemplate, Conversation, Encoded, Error, Overlong, Preferences, Result, Row, RowKind, Tokenizer, TrainOn, Turns,
    options::PrepareOptions, row::place,
};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, ops::Range, sync::Arc};

/// Where a document came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The file, as it was named.
    pub file: Arc<str>,
    /// The line the row begins at, from 1.
    pub line: usize,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What a document is to training on preferences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preference {
    /// Nothing.
    #[default]
    Plain,
    /// The better answer to a prompt; the worse one is the next document.
    Chosen,
    /// The worse answer to the prompt of the document before it.
    Rejected,
    /// An answer that was judged good (KTO).
    #[serde(rename = "liked")]
    Desirable,
    /// An answer that was judged bad.
    #[serde(rename = "disliked")]
    Undesirable,
}

impl Preference {
    /// All of them, in the order of their numbers in files.
    pub(crate) const ALL: [Self; 5] = [Self::Plain, Self::Chosen, Self::Rejected, Self::Desirable, Self::Undesirable];

    /// "plain", "chosen", "rejected", "liked" (desirable) or "disliked" (undesirable).
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Chosen => "chosen",
            Self::Rejected => "rejected",
            Self::Desirable => "liked",
            Self::Undesirable => "disliked",
        }
    }
}

/// One document as tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id whether it is a label: whether the loss of predicting it counts. The first cannot be predicted, so
    /// it never is.
    pub trained: Vec<bool>,
    /// How much the loss of predicting each id counts in training; empty when that is 1 where `trained` and 0
    /// elsewhere.
    pub weights: Vec<f32>,
    /// UTF-8 bytes of the text that the trained tokens stand for; special tokens count nothing. For bits per byte.
    pub bytes: usize,
    /// The row it came from.
    pub source: Source,
    /// What it is to training on preferences.
    pub preference: Preference,
    /// Tokens of the prompt: those that both answers of a pair begin with, or that stand before a judged one; 0 for a
    /// plain document.
    pub shared: usize,
}

impl Sample {
    /// Number of trained tokens.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }

    /// Makes the loss of every token count `factor` times what it did.
    pub(crate) fn scale_weights(&mut self, factor: f32) {
        if factor == 1.0 {
            return;
        }
        if self.weights.is_empty() {
            self.weights = plain_weights(&self.trained).collect();
        }
        self.weights.iter_mut().for_each(|weight| *weight *= factor);
    }

    /// Number of tokens that are no labels, but whose loss counts in training.
    pub fn num_only_weighted(&self) -> usize {
        self.trained.iter().zip(&self.weights).filter(|(trained, weight)| !**trained && **weight > 0.0).count()
    }
}

/// The weights that tokens have of themselves.
pub(crate) fn plain_weights(trained: &[bool]) -> impl Iterator<Item = f32> {
    trained.iter().map(|&trained| if trained { 1.0 } else { 0.0 })
}

/// What becomes of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleOptions {
    /// Which tokens are trained.
    pub train_on: TrainOn,
    /// Weight of the loss of tokens that are not trained, 0 to 1.
    pub prompt_loss_weight: f32,
    /// Longest document, in tokens.
    pub max_length: usize,
    /// What becomes of longer rows.
    pub overlong: Overlong,
    /// What preference and KTO rows are for.
    pub preferences: Preferences,
}

impl From<&PrepareOptions> for SampleOptions {
    fn from(options: &PrepareOptions) -> Self {
        Self {
            train_on: options.train_on.clone(),
            prompt_loss_weight: options.prompt_loss_weight as f32,
            max_length: options.max_length,
            overlong: options.overlong,
            preferences: options.preferences,
        }
    }
}

/// What happened to rows on their way to samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCounts {
    /// Rows read.
    pub rows: usize,
    /// Tokens of the longest row, before it was shortened.
    pub longest_row: usize,
    /// Rows longer than `max_length`.
    pub overlong_rows: usize,
    /// Of these, rows split into several documents.
    pub split_rows: usize,
    /// Of these, rows whose end was cut off.
    pub truncated_rows: usize,
    /// Of these, rows left out, also because nothing trained was left of them.
    pub dropped_rows: usize,
    /// Tokens in what was cut off or left out.
    pub tokens_lost: usize,
    /// Trained tokens lost: in what was cut off or left out, and the first of each further part of a split row.
    pub trained_tokens_lost: usize,
    /// Rows with an undesirable answer, which are left out.
    #[serde(rename = "disliked_rows")]
    pub undesirable_rows: usize,
    /// Assistant turns that the template ends without a special token: from these a model does not learn to stop.
    pub turns_without_end: usize,
}

impl std::ops::AddAssign for RowCounts {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.longest_row = self.longest_row.max(other.longest_row);
        self.overlong_rows += other.overlong_rows;
        self.split_rows += other.split_rows;
        self.truncated_rows += other.truncated_rows;
        self.dropped_rows += other.dropped_rows;
        self.tokens_lost += other.tokens_lost;
        self.trained_tokens_lost += other.trained_tokens_lost;
        self.undesirable_rows += other.undesirable_rows;
        self.turns_without_end += other.turns_without_end;
    }
}

/// The samples of one row: one, several when it is split, none when it is dropped.
///
/// # Errors
/// Naming file and line: a conversation without a chat template, one that the template refuses or renders differently
/// as it grows, a row in which nothing is trained, a row that begins with two BOS tokens.
pub fn samples(
    row: &Row,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &SampleOptions,
) -> Result<(Vec<Sample>, RowCounts)> {
    let mut counts = RowCounts { rows: 1, ..RowCounts::default() };
    let masked = masks(&row.kind, tokenizer, template, options, &mut counts).and_then(|masked| {
        masked.into_iter().map(|(preference, masked)| Ok((preference, masked.checked(tokenizer)?))).collect()
    });
    let masked: Vec<(Preference, Masked)> = masked.map_err(|error| match error {
        Error::Input(what) => Error::Input(format!("{}: {what}", place(&row.file, row.line))),
        other => other,
    })?;
    let source = Source { file: Arc::clone(&row.file), line: row.line };
    match &masked[..] {
        [] => {
            counts.undesirable_rows = 1;
            Ok((Vec::new(), counts))
        }
        [(Preference::Plain, masked)] => {
            let is_text = matches!(row.kind, RowKind::Text(_));
            let windows = shorten(masked, is_text, options, &mut counts);
            let weight = options.prompt_loss_weight;
            Ok((windows.into_iter().map(|window| masked.sample(window, weight, &source)).collect(), counts))
        }
        answers => Ok((answers_of(answers, options, &source, &mut counts), counts)),
    }
}

/// The answers of a pair, or the one that was judged, each with its prompt; none when there is no room for one of them.
fn answers_of(
    answers: &[(Preference, Masked)],
    options: &SampleOptions,
    source: &Source,
    counts: &mut RowCounts,
) -> Vec<Sample> {
    let max = options.max_length;
    let all = |masked: &Masked| masked.ids.len();
    counts.longest_row = answers.iter().map(|(_, masked)| all(masked)).max().unwrap_or(0);
    let is_long = counts.longest_row > max;
    let length = |masked: &Masked| {
        if options.overlong == Overlong::Drop && is_long { 0 } else { all(masked).min(max) }
    };
    let kept = answers.iter().all(|(_, masked)| masked.num_trained(0..length(masked)) > 0);
    if is_long {
        counts.overlong_rows = 1;
        for (_, masked) in answers {
            let left = if kept { length(masked) } else { 0 };
            counts.tokens_lost += all(masked) - left;
            counts.trained_tokens_lost += masked.num_trained(left..all(masked));
        }
        *(if kept { &mut counts.truncated_rows } else { &mut counts.dropped_rows }) = 1;
    }
    if !kept {
        return Vec::new();
    }
    // What both begin with, up to the first token of an answer: answers may begin alike too.
    let prompt = |masked: &Masked| masked.trained.iter().position(|&trained| trained).unwrap_or(0);
    let mut shared = answers.iter().map(|(_, masked)| prompt(masked)).min().unwrap_or(0);
    if let [(_, a), (_, b)] = answers {
        shared = a.ids.iter().zip(&b.ids).take(shared).take_while(|(a, b)| a == b).count();
    }
    let sample = |(preference, masked): &(Preference, Masked)| {
        let sample = masked.sample(0..length(masked), 0.0, source);
        Sample { preference: *preference, shared, ..sample }
    };
    answers.iter().map(sample).collect()
}

/// The tokens of a row and which of them are trained, unchecked: one list, two for the answers of a pair, none for a
/// row with an undesirable answer where only the others are trained on.
pub(crate) fn masks(
    kind: &RowKind,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &SampleOptions,
    counts: &mut RowCounts,
) -> Result<Vec<(Preference, Masked)>> {
    let mut masked = Vec::new();
    for (preference, kind) in answers_to_train(kind, options.preferences)? {
        masked.push((preference, mask(&kind, tokenizer, template, options, counts)?));
    }
    Ok(masked)
}

fn mask(
    kind: &RowKind,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &SampleOptions,
    counts: &mut RowCounts,
) -> Result<Masked> {
    match kind {
        RowKind::Text(text) => Masked::of_text(text, 0..text.len(), tokenizer),
        RowKind::PromptCompletion { prompt, completion } => {
            let text = format!("{prompt}{completion}");
            let trained = if options.train_on == TrainOn::All { 0..text.len() } else { prompt.len()..text.len() };
            Masked::of_text(&text, trained, tokenizer)
        }
        RowKind::Messages { messages, trained_from, tools } => {
            let conversation = Conversation { messages, tools: tools.as_ref(), ..Conversation::default() };
            Masked::of_conversation(&conversation, *trained_from, tokenizer, template, options, counts)
        }
        RowKind::Preference { .. } | RowKind::Judged { .. } | RowKind::Labelled { .. } => Err(Error::Input(
            "these rows hold a text and its class, which is nothing to continue; template = \"Review: {text}\\nSentiment:\" \
             asks for the class, row_format = \"text\" trains the text alone"
                .into(),
        )),
    }
}

/// What is trained of a row: of answers of which one is better, or that were judged, what `preferences` says.
fn answers_to_train(kind: &RowKind, preferences: Preferences) -> Result<Vec<(Preference, Cow<'_, RowKind>)>> {
    let (prompt, tools, answers) = match kind {
        RowKind::Preference { prompt, chosen, rejected, tools } => {
            (prompt, tools, vec![(Preference::Chosen, chosen), (Preference::Rejected, rejected)])
        }
        RowKind::Judged { prompt, completion, label, tools } => {
            (prompt, tools, vec![(if *label { Preference::Desirable } else { Preference::Undesirable }, completion)])
        }
        other if preferences == Preferences::Keep => {
            let what = match other {
                RowKind::Text(_) | RowKind::Labelled { .. } => "a text",
                _ => "a single answer",
            };
            return Err(Error::Input(format!(
                "preferences = \"keep\" prepares answers that are compared or judged, and this row holds {what}; put it into a \
                 data set of its own"
            )));
        }
        other => return Ok(vec![(Preference::Plain, Cow::Borrowed(other))]),
    };
    let answer = |answer: &Turns| match (prompt, answer) {
        (Turns::Messages(prompt), Turns::Messages(answer)) => Ok(Cow::Owned(RowKind::Messages {
            messages: [&prompt[..], answer].concat(),
            trained_from: prompt.len(),
            tools: tools.clone(),
        })),
        (Turns::Text(prompt), Turns::Text(answer)) => {
            Ok(Cow::Owned(RowKind::PromptCompletion { prompt: prompt.clone(), completion: answer.clone() }))
        }
        _ => Err(Error::Failure("a prompt and its answer are not of one sort".into())),
    };
    match preferences {
        Preferences::Refuse => Err(Error::Input(
            "these rows hold answers that are preferred to others, and training learns from single answers; preferences = \
             \"chosen\" trains on the better ones"
                .into(),
        )),
        Preferences::Chosen => {
            let better = answers.into_iter().filter(|(preference, _)| matches!(preference, Preference::Chosen | Preference::Desirable));
            better.map(|(_, turns)| Ok((Preference::Plain, answer(turns)?))).collect()
        }
        Preferences::Keep => answers.into_iter().map(|(preference, turns)| Ok((preference, answer(turns)?))).collect(),
    }
}

/// A whole row, before it is shortened. All lists have one entry a token.
pub(crate) struct Masked {
    pub(crate) ids: Vec<u32>,
    pub(crate) trained: Vec<bool>,
    /// Bytes of text that each token adds to those before it.
    bytes: Vec<usize>,
    /// The offsets of each token in `text`.
    pub(crate) offsets: Vec<(usize, usize)>,
    pub(crate) text: String,
}

impl Masked {
    fn new(text: &str, encoded: Encoded, spans: &[Range<usize>], tokenizer: &Tokenizer) -> Self {
        let mut done = 0;
        let mut bytes = Vec::with_capacity(encoded.ids.len());
        for (&id, &(_, end)) in encoded.ids.iter().zip(&encoded.offsets) {
            // From the end of the token before: offsets may leave out the blank that a token begins with, and several
            // tokens may share one character.
            bytes.push(if tokenizer.is_added(id) { 0 } else { end.saturating_sub(done) });
            done = done.max(end);
        }
        let inside = |(start, end): (usize, usize)| spans.iter().any(|span| end > span.start && start < span.end);
        let trained = encoded.offsets.iter().map(|&offsets| inside(offsets)).collect();
        Self { ids: encoded.ids, trained, bytes, offsets: encoded.offsets, text: text.to_owned() }
    }

    /// A text of its own: BOS before it if the tokenizer adds one, EOS after it, which is trained.
    fn of_text(text: &str, span: Range<usize>, tokenizer: &Tokenizer) -> Result<Self> {
        let encoded = tokenizer.encode_with_offsets(text, false)?;
        let mut masked = Self::new(text, encoded, &[span], tokenizer);
        if let Some(bos) = tokenizer.bos_id().filter(|_| tokenizer.adds_bos())
            && masked.ids.first() != Some(&bos)
        {
            masked.ids.insert(0, bos);
            masked.trained.insert(0, false);
            masked.bytes.insert(0, 0);
            masked.offsets.insert(0, (0, 0));
        }
        let Some(eos) = tokenizer.eos_id() else {
            return Err(Error::Input(
                "the tokenizer names no eos_token, so that a model cannot learn where a text ends; add eos_token to \
                 tokenizer_config.json"
                    .into(),
            ));
        };
        if masked.ids.last() != Some(&eos) {
            masked.ids.push(eos);
            masked.trained.push(true);
            masked.bytes.push(0);
            masked.offsets.push((text.len(), text.len()));
        }
        Ok(masked)
    }

    fn of_conversation(
        conversation: &Conversation<'_>,
        trained_from: usize,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &SampleOptions,
        counts: &mut RowCounts,
    ) -> Result<Self> {
        let Some(template) = template else {
            return Err(Error::Input(
                "this row is a conversation, but the model has no chat template; give one with chat_template = \
                 \"file.jinja\""
                    .into(),
            ));
        };
        let (text, blocks) = template.render_with_blocks(conversation)?;
        let encoded = tokenizer.encode_with_offsets(&text, false)?;
        let spans = match &options.train_on {
            TrainOn::All => std::iter::once(0..text.len()).collect(),
            TrainOn::Completions => answers(conversation, trained_from, template, &text, blocks)?,
            TrainOn::Last => answers(conversation, trained_from, template, &text, blocks)?.pop().into_iter().collect(),
            TrainOn::Roles(roles) => role_spans(conversation, trained_from, roles, template, &text, blocks)?,
        };
        let mut masked = Self::new(&text, encoded, &spans, tokenizer);
        if options.train_on == TrainOn::All {
            return Ok(masked);
        }
        for span in &spans {
            counts.turns_without_end += usize::from(!masked.end_with_special(span, tokenizer));
        }
        Ok(masked)
    }

    /// Takes the blanks at the end of a turn out of training, if a special token stands before them. Whether one does.
    fn end_with_special(&mut self, span: &Range<usize>, tokenizer: &Tokenizer) -> bool {
        let inside = |&index: &usize| {
            let (start, end) = self.offsets[index];
            end > span.start && start < span.end
        };
        let is_blank = |index: &&usize| {
            let (start, end) = self.offsets[**index];
            !tokenizer.is_added(self.ids[**index]) && self.text[start..end].trim().is_empty()
        };
        let turn: Vec<usize> = (0..self.ids.len()).filter(inside).collect();
        let blanks = turn.iter().rev().take_while(is_blank).count();
        let (turn, blanks) = turn.split_at(turn.len() - blanks);
        let ends = turn.last().is_some_and(|&last| tokenizer.is_added(self.ids[last]));
        if ends {
            blanks.iter().for_each(|&blank| self.trained[blank] = false);
        }
        ends
    }

    fn checked(mut self, tokenizer: &Tokenizer) -> Result<Self> {
        if let Some(first) = self.trained.first_mut() {
            *first = false;
        }
        if let (Some(bos), [first, second, ..]) = (tokenizer.bos_id(), &self.ids[..])
            && (*first, *second) == (bos, bos)
        {
            return Err(Error::Input(format!(
                "the row begins with two BOS tokens ({:?}): take it out of the row, the program adds it",
                tokenizer.special_tokens().bos.as_deref().unwrap_or_default()
            )));
        }
        if !self.trained.contains(&true) {
            return Err(Error::Input(
                "nothing in this row is trained: it needs an assistant message, a completion or text that is not empty; \
                 or set train_on = \"all\""
                    .into(),
            ));
        }
        Ok(self)
    }

    fn num_trained(&self, range: Range<usize>) -> usize {
        self.trained[range].iter().filter(|&&trained| trained).count()
    }

    fn sample(&self, window: Range<usize>, prompt_loss_weight: f32, source: &Source) -> Sample {
        let mut trained = self.trained[window.clone()].to_vec();
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let bytes = self.bytes[window.clone()].iter().zip(&trained).filter(|(_, trained)| **trained);
        let bytes = bytes.map(|(bytes, _)| bytes).sum();
        let mut weights = Vec::new();
        if prompt_loss_weight > 0.0 {
            weights.extend(trained.iter().map(|&trained| if trained { 1.0 } else { prompt_loss_weight }));
            weights[0] = 0.0;
        }
        let (preference, shared) = (Preference::Plain, 0);
        Sample { ids: self.ids[window].to_vec(), trained, weights, bytes, source: source.clone(), preference, shared }
    }
}

/// The byte range of each answer: the `{% generation %}` blocks of the template, if it has any, else the assistant's
/// turns.
fn answers(
    conversation: &Conversation<'_>,
    trained_from: usize,
    template: &ChatTemplate,
    text: &str,
    blocks: Option<Vec<Range<usize>>>,
) -> Result<Vec<Range<usize>>> {
    let Some(blocks) = blocks else {
        return role_spans(conversation, trained_from, &["assistant".into()], template, text, None);
    };
    // Blocks of the prompt are not trained: one a turn of the assistant.
    let given = conversation.messages[..trained_from].iter().filter(|message| message.role == "assistant").count();
    Ok(blocks.into_iter().skip(given).collect())
}

/// The byte range of each turn of `roles` in the rendered `text`, from after its header to the end of what the template
/// writes for it.
fn role_spans(
    conversation: &Conversation<'_>,
    trained_from: usize,
    roles: &[String],
    template: &ChatTemplate,
    text: &str,
    blocks: Option<Vec<Range<usize>>>,
) -> Result<Vec<Range<usize>>> {
    let messages = conversation.messages;
    let mut spans = match blocks.is_some() && roles.iter().any(|role| role == "assistant") {
        true => answers(conversation, trained_from, template, text, blocks.clone())?,
        false => Vec::new(),
    };
    for index in trained_from..messages.len() {
        let message = &messages[index];
        let is_assistant = message.role == "assistant";
        if !roles.contains(&message.role) || is_assistant && blocks.is_some() {
            continue;
        }
        let end = match index + 1 == messages.len() {
            true => text.len(),
            false => prefix(conversation, index + 1, false, template, text)?,
        };
        let start = prefix(conversation, index, is_assistant, template, text)?;
        if start > end {
            return Err(unstable(index, text, start, "the header of the answer"));
        }
        // The header of another role is told by where what is said begins.
        let header = match is_assistant {
            true => 0,
            false => text[start..end].find(message.content.trim()).ok_or_else(|| {
                Error::Input(format!(
                    "the chat template does not write what message {} says as it is, so that it cannot be told which tokens \
                     are the {}'s; take the role out of train_on",
                    index + 1,
                    message.role
                ))
            })?,
        };
        spans.push(start + header..end);
    }
    spans.sort_unstable_by_key(|span| span.start);
    Ok(spans)
}

/// Length of the first `count` messages rendered, which must be how `text` begins.
fn prefix(
    conversation: &Conversation<'_>,
    count: usize,
    add_generation_prompt: bool,
    template: &ChatTemplate,
    text: &str,
) -> Result<usize> {
    let messages = &conversation.messages[..count];
    let part = template.render_conversation(&Conversation { messages, add_generation_prompt, ..*conversation })?;
    if text.starts_with(&part) {
        return Ok(part.len());
    }
    let same = part.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
    let what = if add_generation_prompt { "the header of the answer" } else { "a turn" };
    Err(unstable(count, text, same, what))
}

fn unstable(count: usize, text: &str, at: usize, what: &str) -> Error {
    let at = text.floor_char_boundary(at.min(text.len()));
    let before: String = text[..at].chars().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect();
    Error::Input(format!(
        "the chat template writes {what} after the first {count} messages differently when the conversation goes on \
         (after {before:?}), so that it cannot be told which tokens are the assistant's; use a template that only appends, \
         or set train_on = \"all\""
    ))
}

/// The parts of a row that become documents.
fn shorten(masked: &Masked, is_text: bool, options: &SampleOptions, counts: &mut RowCounts) -> Vec<Range<usize>> {
    let (length, max) = (masked.ids.len(), options.max_length);
    counts.longest_row = length;
    if length <= max {
        return std::iter::once(0..length).collect();
    }
    counts.overlong_rows = 1;
    let policy = match options.overlong {
        Overlong::Auto if is_text => Overlong::Split,
        Overlong::Auto => Overlong::Truncate,
        chosen => chosen,
    };
    // The first token of a document is no label, so it does not keep a window alive.
    let has_labels = |window: &Range<usize>| masked.num_trained(window.start + 1..window.end) > 0;
    let windows: Vec<Range<usize>> = match policy {
        Overlong::Split => (0..length).step_by(max).map(|start| start..length.min(start + max)).collect(),
        Overlong::Truncate => std::iter::once(0..max).collect(),
        Overlong::Auto | Overlong::Drop => Vec::new(),
    };
    let kept: Vec<_> = windows.into_iter().filter(has_labels).collect();
    counts.tokens_lost = length - kept.iter().map(Range::len).sum::<usize>();
    let labels_kept: usize = kept.iter().map(|window| masked.num_trained(window.start + 1..window.end)).sum();
    counts.trained_tokens_lost = masked.num_trained(0..length) - labels_kept;
    match policy {
        _ if kept.is_empty() => counts.dropped_rows = 1,
        Overlong::Split => counts.split_rows = 1,
        _ => counts.truncated_rows = 1,
    }
    kept
}

#[cfg(test)]
mod tests;
