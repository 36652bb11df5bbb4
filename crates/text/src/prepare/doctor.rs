//! What is wrong with data, tokenizer and template together, with the rows that show it: the faults that otherwise show
//! after days of training.
use super::files::{self, DataSet, Input, Numbered};
use crate::{
    ChatTemplate, Conversation, Error, PrepareOptions, PrepareProgress, Result, RowKind, Tokenizer, TrainOn,
    clean::Cleaner,
    row::{self, place},
    sample::{self, Masked, Preference, RowCounts, SampleOptions},
};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;

/// Rows that are named for each check.
const EXAMPLES: usize = 5;

/// One thing that must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Every row can be read.
    Readable,
    /// The chat template takes every conversation.
    Renders,
    /// What is generated from, the conversation with the header of an answer, is how the training text begins.
    GenerationPrompt,
    /// No row begins with two BOS tokens.
    OneBos,
    /// Something is trained in every row.
    Trained,
    /// The token that ends a turn is trained.
    EndOfTurn,
    /// The tokens of a text decode to that text.
    RoundTrip,
    /// Every token has a row in the embedding.
    Embedding,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Readable,
        Self::Renders,
        Self::GenerationPrompt,
        Self::OneBos,
        Self::Trained,
        Self::EndOfTurn,
        Self::RoundTrip,
        Self::Embedding,
    ];

    /// What must hold, in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Readable => "every row can be read",
            Self::Renders => "the chat template takes every conversation",
            Self::GenerationPrompt => "the generation prompt is how the training text begins",
            Self::OneBos => "no row begins with two BOS tokens",
            Self::Trained => "something is trained in every row",
            Self::EndOfTurn => "the token that ends a turn is trained",
            Self::RoundTrip => "tokens decode to the text they came from",
            Self::Embedding => "every token has a row in the embedding",
        }
    }
}

/// The rows that fail one check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How many.
    pub rows: usize,
    /// The first of them: place and what is wrong.
    pub examples: Vec<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// Rows looked at.
    pub rows: usize,
    /// Checks that failed.
    pub failed: BTreeMap<Check, Finding>,
}

/// Looks at every row of `options`' data as it would be trained on. `embedding_rows` is the model's vocabulary size.
///
/// # Errors
/// Options out of range, or a file that cannot be read.
pub fn examine(
    options: &PrepareOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    embedding_rows: usize,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Diagnosis> {
    options.check()?;
    // Another kind of tokenizer takes longer, and that is all.
    let _ = tokenizer.for_bulk();
    let sets = files::data_sets(options)?;
    let inputs = files::inputs(&sets, progress)?;
    let bytes = inputs.iter().map(|input| input.bytes).sum();
    let doctor = Doctor {
        sets: &sets,
        cleaner: Cleaner::new(&options.clean)?,
        tokenizer,
        template,
        embedding_rows,
        options: sets.iter().map(|set| SampleOptions::from(&set.options)).collect(),
    };
    let mut diagnosis = Diagnosis::default();
    let look =
        |group: Vec<Numbered>| -> Vec<_> { group.par_iter().map(|row| doctor.look(row, &inputs[row.input])).collect() };
    let mut note = |found: Vec<Vec<(Check, String)>>| {
        diagnosis.rows += found.len();
        for (check, what) in found.into_iter().flatten() {
            let finding = diagnosis.failed.entry(check).or_default();
            finding.rows += 1;
            if finding.examples.len() < EXAMPLES {
                finding.examples.push(what);
            }
        }
        Ok(())
    };
    files::for_each_group(&inputs, (0..inputs.len(), 0), &sets, &look, &mut note, &mut |bytes_done| {
        progress(PrepareProgress::Scanning { bytes_done, bytes });
    })?;
    Ok(diagnosis)
}

struct Doctor<'a> {
    sets: &'a [DataSet],
    cleaner: Cleaner,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    embedding_rows: usize,
    /// By data set.
    options: Vec<SampleOptions>,
}

impl Doctor<'_> {
    fn look(&self, row: &Numbered, input: &Input) -> Vec<(Check, String)> {
        let (file, options) = (&input.name, &self.options[input.source]);
        let at = place(file, row.raw.line);
        let mut row = match row::understand(&row.raw, file, &self.sets[input.source].rows, &mut |_| ()) {
            Ok(understood) => understood.row,
            Err(bad) => return vec![(Check::Readable, bad.error(file).to_string())],
        };
        self.cleaner.clean(&mut row);
        let mut counts = RowCounts::default();
        let masked = match sample::masks(&row.kind, self.tokenizer, self.template, options, &mut counts) {
            Ok(masked) => masked,
            Err(error) => {
                let check = if self.renders(&row.kind) { Check::GenerationPrompt } else { Check::Renders };
                return vec![(check, format!("{at}: {error}"))];
            }
        };
        let mut found: Vec<(Check, String)> = Vec::new();
        for (preference, masked) in &masked {
            let preference = if *preference == Preference::Plain {
                String::new()
            } else {
                format!("the {} answer: ", preference.name())
            };
            let failed = self.check(masked, &counts, &options.train_on);
            // Each row once for each check, whichever of its answers fails it.
            let new: Vec<_> = failed.into_iter().filter(|(check, _)| !found.iter().any(|(c, _)| c == check)).collect();
            found.extend(new.into_iter().map(|(check, what)| (check, format!("{at}: {preference}{what}"))));
        }
        found
    }

    /// What is wrong with a row, or with one of its answers.
    fn check(&self, masked: &Masked, counts: &RowCounts, train_on: &TrainOn) -> Vec<(Check, String)> {
        let mut found = Vec::new();
        let mut fails = |check, what: String| found.push((check, what));
        if let (Some(bos), [first, second, ..]) = (self.tokenizer.bos_id(), &masked.ids[..])
            && [first, second] == [&bos, &bos]
        {
            fails(Check::OneBos, format!("the text begins with {:?} twice", self.token(bos)));
        }
        if !masked.trained.iter().skip(1).any(|&trained| trained) {
            fails(Check::Trained, "no token is trained".into());
        } else if counts.turns_without_end > 0 {
            let turns = counts.turns_without_end;
            fails(Check::EndOfTurn, format!("the template ends {turns} of the trained turns without a special token"));
        } else if !self.ends(masked, train_on) {
            fails(Check::EndOfTurn, "the last trained token is not one that ends a turn".into());
        }
        if let Some(&id) = masked.ids.iter().find(|&&id| id as usize >= self.embedding_rows) {
            let rows = self.embedding_rows;
            fails(Check::Embedding, format!("token {:?} has id {id}, the embedding {rows} rows", self.token(id)));
        }
        if let Some(what) = self.lost(masked) {
            fails(Check::RoundTrip, what);
        }
        found
    }

    fn token(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    /// Whether the template takes the conversation as a whole.
    fn renders(&self, kind: &RowKind) -> bool {
        match (kind, self.template) {
            (RowKind::Messages { messages, tools, .. }, Some(template)) => {
                let conversation = Conversation { messages, tools: tools.as_ref(), ..Conversation::default() };
                template.render_conversation(&conversation).is_ok()
            }
            _ => false,
        }
    }

    /// Whether the last trained token is a special one.
    fn ends(&self, masked: &Masked, train_on: &TrainOn) -> bool {
        let mut trained = (0..masked.ids.len()).rev().filter(|&index| masked.trained[index]);
        // Where everything is trained a line end may follow.
        match train_on {
            TrainOn::All => trained.any(|index| self.tokenizer.is_added(masked.ids[index])),
            _ => trained.next().is_some_and(|index| self.tokenizer.is_added(masked.ids[index])),
        }
    }

    /// The first piece of text between special tokens that does not come back when its tokens are decoded. Blanks at
    /// the beginning are not looked at: SentencePiece adds and takes away one.
    fn lost(&self, masked: &Masked) -> Option<String> {
        let is_text = |index: &usize| !self.tokenizer.is_added(masked.ids[*index]);
        let indices: Vec<usize> = (0..masked.ids.len()).filter(is_text).collect();
        for run in indices.chunk_by(|a, b| a + 1 == *b) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            let text = &masked.text[masked.offsets[first].0..masked.offsets[last].1];
            let back = match self.tokenizer.decode(&masked.ids[first..=last], false) {
                Ok(back) => back,
                Err(Error::Input(what) | Error::Failure(what)) => return Some(what),
                Err(error) => return Some(error.to_string()),
            };
            if back.trim_start() != text.trim_start() {
                let same = back.trim_start().chars().zip(text.trim_start().chars()).take_while(|(a, b)| a == b).count();
                let some =
                    |text: &str| text.trim_start().chars().skip(same.saturating_sub(10)).take(30).collect::<String>();
                return Some(format!("{:?} comes back as {:?}", some(text), some(&back)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{CHATML, chatml, tokenizer};

    /// The failed checks with the lines they name, of rows in `d.jsonl`.
    fn examined(rows: &[&str], template: Option<&ChatTemplate>, embedding_rows: usize) -> Vec<(Check, Vec<usize>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        let options = PrepareOptions { train: vec![path.display().to_string()], ..PrepareOptions::default() };
        let found = examine(&options, &tokenizer(), template, embedding_rows, &mut |_| ()).unwrap();
        assert_eq!(found.rows, rows.len());
        let line = |what: &String| {
            let (_, rest) = what.split_once("d.jsonl, line ").expect("file and line are named");
            rest.split([':', ',']).next().unwrap().parse().unwrap()
        };
        found
            .failed
            .into_iter()
            .map(|(check, finding)| {
                assert_eq!(finding.rows, finding.examples.len());
                (check, finding.examples.iter().map(line).collect())
            })
            .collect()
    }

    const CHAT: &str = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}"#;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, tokenizer().special_tokens(), None).unwrap()
    }

    #[test]
    fn sound_data_passes() {
        let rows = [CHAT, CHAT];
        assert!(examined(&rows, Some(&chatml()), 10_000).is_empty());
        assert!(examined(&[r#"{"text": "Ünï 🙂"}"#], None, 10_000).is_empty());
    }

    #[test]
    fn each_fault_is_found_in_its_rows() {
        let empty = r#"{"messages": [{"role": "user", "content": "u"}]}"#;
        let rows = [CHAT, r#"{"messages": 3}"#, empty];
        let found = examined(&rows, Some(&chatml()), 10_000);
        assert_eq!(found, [(Check::Readable, vec![2]), (Check::Trained, vec![3])]);
        assert_eq!(examined(&[CHAT], None, 10_000), [(Check::Renders, vec![1])]);
        let refuses = template("{{ raise_exception('no') }}");
        assert_eq!(examined(&[CHAT], Some(&refuses), 10_000), [(Check::Renders, vec![1])]);
        let bos = template(&format!("{{{{ bos_token }}}}{CHATML}"));
        assert_eq!(examined(&[CHAT], Some(&bos), 10_000), [(Check::OneBos, vec![1])]);
        let endless = template(&CHATML.replace("+ '<|im_end|>' ", ""));
        assert_eq!(examined(&[CHAT], Some(&endless), 10_000), [(Check::EndOfTurn, vec![1])]);
        let other = template(&CHATML.replace("assistant\n' }}{% endif %}", "bot\n' }}{% endif %}"));
        assert_eq!(examined(&[CHAT], Some(&other), 10_000), [(Check::GenerationPrompt, vec![1])]);
        assert_eq!(examined(&[CHAT], Some(&chatml()), 2), [(Check::Embedding, vec![1])]);
    }

    #[test]
    fn text_that_is_lost_in_the_tokens_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        tokenizer().save(folder.path()).unwrap();
        let path = folder.path().join("tokenizer.json");
        let mut json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        json["normalizer"] = serde_json::json!({"type": "Lowercase"});
        std::fs::write(&path, json.to_string()).unwrap();
        let lower = Tokenizer::from_folder(folder.path()).unwrap();
        let data = folder.path().join("d.jsonl");
        std::fs::write(&data, "{\"text\": \"all lower\"}\n{\"text\": \"not Lower\"}").unwrap();
        let options = PrepareOptions { train: vec![data.display().to_string()], ..PrepareOptions::default() };
        let found = examine(&options, &lower, None, 10_000, &mut |_| ()).unwrap();
        let finding = &found.failed[&Check::RoundTrip];
        assert_eq!((found.failed.len(), finding.rows), (1, 1));
        assert!(finding.examples[0].ends_with("line 2: \"not Lower\" comes back as \"not lower\""), "{finding:?}");
    }
}
