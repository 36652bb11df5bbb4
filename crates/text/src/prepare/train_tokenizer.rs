//! A byte-level BPE tokenizer learned from rows.
use super::{
    facts::Decision,
    files::{self, DataSet, Input, Numbered},
    scan,
};
use crate::{
    ChatTemplate, Error, PrepareOptions, PrepareProgress, Result, SpecialTokens, Tokenizer, WordRule,
    clean::{self, Cleaner},
    gguf, row,
};
use std::{collections::HashSet, sync::mpsc, thread};
use tokenizers::{
    AddedToken,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

/// Every byte is a token: nothing is ever unknown.
const NUM_BYTES: usize = 256;

/// The library counts pairs in 32 bits with a sign.
const MAX_BYTES: u64 = i32::MAX as u64;

/// Texts that wait to be counted.
const WAITING: usize = 1024;

/// What tokenizer is wanted.
#[derive(Clone, Debug)]
pub struct TokenizerOptions {
    /// Tokens in all, with bytes and special tokens.
    pub vocab_size: usize,
    /// Pairs seen fewer times are not joined.
    pub min_frequency: u64,
    /// How text is cut into words; no token reaches across them.
    pub words: WordRule,
    /// The special tokens; those that are given are in the vocabulary.
    pub special: SpecialTokens,
    /// Further special tokens, such as those that mark turns.
    pub more_special: Vec<String>,
    /// Whether every text gets the BOS token in front.
    pub add_bos: bool,
    /// Source of a chat template.
    pub chat_template: Option<String>,
}

impl TokenizerOptions {
    /// Special tokens in the order of their ids, which begin at 0.
    fn special_texts(&self) -> Vec<&str> {
        let SpecialTokens { bos, eos, pad, unk } = &self.special;
        let named = [bos, eos, pad, unk].into_iter().flatten();
        let mut seen = HashSet::new();
        named.chain(&self.more_special).map(String::as_str).filter(|text| seen.insert(*text)).collect()
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The first value out of range.
    pub fn check(&self) -> Result<()> {
        let special = self.special_texts();
        let least = NUM_BYTES + special.len();
        if self.vocab_size < least {
            return Err(Error::Input(format!(
                "vocab_size is {}; {NUM_BYTES} bytes and {} special tokens need at least {least}",
                self.vocab_size,
                special.len()
            )));
        }
        if u32::try_from(self.vocab_size).is_err() {
            return Err(Error::Input(format!("vocab_size is {}; at most {} is possible", self.vocab_size, u32::MAX)));
        }
        if let Some(short) = special.iter().find(|text| text.trim().is_empty() || text.chars().count() < 2) {
            return Err(Error::Input(format!(
                "{short:?} cannot be a special token: it would be cut out of ordinary text; use something like \
                 \"<|name|>\""
            )));
        }
        if self.add_bos && self.special.bos.is_none() {
            return Err(Error::Input("texts cannot begin with a BOS token, since none is named".into()));
        }
        if let Some(source) = &self.chat_template {
            ChatTemplate::new(source, &self.special, None)?;
        }
        Ok(())
    }
}

/// A new tokenizer, and what it was learned from.
#[derive(Clone, Debug)]
pub struct TrainedTokenizer {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Rows that it was learned from.
    pub rows: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Learns a byte-level BPE tokenizer from the rows that `data` would train on: cleaned, without duplicates where that
/// is asked for, and without held-out rows. The same data and options give the same tokenizer. It has fewer tokens than
/// asked for when the data has no more pairs.
///
/// # Errors
/// Options out of range; data as in [`prepare`](super::prepare); no rows; more than 2 GiB of text.
pub fn train_tokenizer(
    data: &PrepareOptions,
    options: &TokenizerOptions,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<TrainedTokenizer> {
    data.check()?;
    options.check()?;
    // Pairs are counted over all rows: there is nothing to begin with before they have been read.
    let data = &PrepareOptions { streaming: false, ..data.clone() };
    let sets = files::data_sets(data)?;
    let inputs = files::inputs(&sets, progress)?;
    let scan = scan::scan(data, &sets, &inputs, progress)?;
    let alphabet = ByteLevel::alphabet().into_iter().collect();
    let tokens = options.special_texts().into_iter().map(|text| AddedToken::from(text, true)).collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(options.vocab_size)
        .min_frequency(options.min_frequency)
        .special_tokens(tokens)
        .initial_alphabet(alphabet)
        .show_progress(false)
        .build();
    let failed = |e: tokenizers::Error| Error::Failure(format!("the tokenizer cannot be learned: {e}"));
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    gguf::cut_bytes(&mut inner, options.words, false)?;
    // Threads of its own: those that wait for text must not be those that read it.
    let pool = rayon::ThreadPoolBuilder::new().build();
    let pool = pool.map_err(|e| Error::Failure(format!("cannot start threads: {e}")))?;
    let (rows, bytes) = thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(WAITING);
        let inner = &mut inner;
        let learning = scope.spawn(move || {
            let mut trainer = TrainerWrapper::BpeTrainer(trainer);
            pool.install(|| inner.train(&mut trainer, receiver.into_iter()).map(drop))
        });
        let fed = feed(data, &sets, &inputs, &scan.decisions, &sender, progress);
        drop(sender);
        let learned = learning.join().map_err(|_| Error::Failure("a thread that learns the tokenizer ended".into()))?;
        let fed = fed?;
        learned.map_err(failed)?;
        Ok::<_, Error>(fed)
    })?;
    if rows == 0 {
        let places = data.train.join(", ");
        return Err(Error::Input(format!("no row of {places} is left to learn from; see `tunesmith prepare` for why")));
    }
    let bos = options.special.bos.as_deref().filter(|_| options.add_bos);
    let around = gguf::surround(bos.and_then(|text| Some((inner.token_to_id(text)?, text))), None)?;
    inner.with_post_processor(Some(around));
    let tokenizer = Tokenizer::assemble(inner, options.special.clone(), options.chat_template.clone())?;
    Ok(TrainedTokenizer { tokenizer, rows, bytes })
}

/// Sends the texts of all rows to train on; their number and bytes.
fn feed(
    data: &PrepareOptions,
    sets: &[DataSet],
    inputs: &[Input],
    decisions: &[Decision],
    sender: &mpsc::SyncSender<String>,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<(usize, u64)> {
    let cleaner = Cleaner::new(&data.clean)?;
    let all = inputs.iter().map(|input| input.bytes).sum();
    let (mut rows, mut bytes) = (0, 0);
    let mut take = |group: Vec<Numbered>| {
        for numbered in group {
            if decisions.get(numbered.index) != Some(&Decision::Keep(crate::Split::Train)) {
                continue;
            }
            let Input { name, source, .. } = &inputs[numbered.input];
            let understood = row::understand(&numbered.raw, name, &sets[*source].rows, &mut |_| ());
            let mut row = understood.map_err(|bad| bad.error(name))?.row;
            cleaner.clean(&mut row);
            rows += 1;
            clean::for_each_text(&mut row.kind, &mut |text| {
                bytes += text.len() as u64;
                // A receiver that is gone has failed, and says so itself.
                let _ = sender.send(std::mem::take(text));
            });
            if bytes > MAX_BYTES {
                return Err(Error::Input(format!(
                    "there are more than {MAX_BYTES} bytes of text to learn from, which is more than pairs are counted \
                     for; give a part of the data, which is enough for a vocabulary"
                )));
            }
        }
        Ok(())
    };
    files::for_each_group(inputs, (0..inputs.len(), 0), sets, &|group| group, &mut take, &mut |bytes_done| {
        progress(PrepareProgress::Learning { bytes_done, bytes: all });
    })?;
    inputs.iter().try_for_each(Input::check_unchanged)?;
    Ok((rows, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vocab_size: usize) -> TokenizerOptions {
        TokenizerOptions {
            vocab_size,
            min_frequency: 2,
            words: WordRule::default(),
            special: SpecialTokens {
                bos: Some("<|begin|>".into()),
                eos: Some("<|end|>".into()),
                pad: Some("<|end|>".into()),
                unk: None,
            },
            more_special: vec!["<|turn|>".into(), "<|begin|>".into()],
            add_bos: true,
            chat_template: None,
        }
    }

    fn data(folder: &std::path::Path) -> PrepareOptions {
        let file = folder.join("rows.jsonl");
        let mut text = String::new();
        for i in 0..200 {
            text += &format!(
                "{{\"prompt\": \"count the sheep {i}\", \"completion\": \"the sheep are {}, Mühle\"}}\n",
                i * 7
            );
        }
        std::fs::write(&file, text).unwrap();
        PrepareOptions { train: vec![file.display().to_string()], ..PrepareOptions::default() }
    }

    #[test]
    fn it_is_the_same_each_time_and_gives_every_text_back() {
        let folder = tempfile::tempdir().unwrap();
        let data = data(folder.path());
        let mut seen = Vec::new();
        let first = train_tokenizer(&data, &options(300), &mut |p| seen.push(p)).unwrap();
        let again = train_tokenizer(&data, &options(300), &mut |_| ()).unwrap();
        assert_eq!(first.tokenizer.fingerprint().unwrap(), again.tokenizer.fingerprint().unwrap());
        assert!(matches!(seen.last(), Some(PrepareProgress::Learning { bytes_done, bytes }) if bytes_done == bytes));
        // Some of the 200 are held out.
        assert!((190..200).contains(&first.rows) && first.bytes > 4000, "{} {}", first.rows, first.bytes);
        let tokenizer = first.tokenizer;
        assert_eq!(tokenizer.vocab_size(), 300);
        assert_eq!(["<|begin|>", "<|end|>", "<|turn|>"].map(|t| tokenizer.token_to_id(t)), [Some(0), Some(1), Some(2)]);
        let ids = tokenizer.encode("the sheep<|turn|>", true).unwrap();
        let names: Vec<_> = ids.iter().map(|id| tokenizer.id_to_token(*id).unwrap()).collect();
        assert_eq!(names, ["<|begin|>", "the", "Ġsheep", "<|turn|>"]);
        for text in ["", " ", "count the sheep", "🙂\u{0}\n\n\t é 漢字", "  12345  "] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        tokenizer.save(folder.path()).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(read.fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
        assert!(read.adds_bos());
    }

    #[test]
    fn small_data_gives_fewer_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let wide = train_tokenizer(&data(folder.path()), &options(100_000), &mut |_| ()).unwrap();
        assert!((300..1500).contains(&wide.tokenizer.vocab_size()), "{}", wide.tokenizer.vocab_size());
    }

    #[test]
    fn mistakes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let data = data(folder.path());
        let error = |change: fn(&mut TokenizerOptions)| {
            let mut options = options(300);
            change(&mut options);
            train_tokenizer(&data, &options, &mut |_| ()).unwrap_err().to_string()
        };
        assert!(
            error(|o| o.vocab_size = 258)
                .contains("vocab_size is 258; 256 bytes and 3 special tokens need at least 259")
        );
        assert!(error(|o| o.more_special.push(" ".into())).contains("\" \" cannot be a special token"));
        assert!(error(|o| o.special.bos = None).contains("none is named"));
        assert!(error(|o| o.chat_template = Some("{% if".into())).contains("template"));
        let empty =
            PrepareOptions { clean: crate::CleanOptions { min_chars: 1000, ..Default::default() }, ..data.clone() };
        let text = train_tokenizer(&empty, &options(300), &mut |_| ()).unwrap_err().to_string();
        assert!(text.contains("is left to learn from"), "{text}");
    }
}
