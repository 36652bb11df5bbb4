//! A model's files, opened together: weights, tokenizer, template and end tokens, one way for every caller.

use crate::Placement;
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};
use tunesmith_files::{Error, Observer, Progress, Result};
use tunesmith_model::{AdapterConfig, AdapterFile, Checkpoint, Config, GgufMetadata, Llama, Storage};
use tunesmith_text::{ChatTemplate, GgufVocabulary, Tokenizer};

/// A model's files, looked at but with no weight read, and everything about its text.
pub struct Opened {
    /// What the user calls it.
    pub spec: String,
    /// Where it came from, pinned.
    pub origin: String,
    /// The weights, to be read.
    pub checkpoint: Checkpoint,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// The chat template: the one given, else the model's own.
    pub template: Option<ChatTemplate>,
    /// Ids of tokens that a configuration adds to the model's.
    pub new_tokens: Vec<u32>,
    /// Folder of the adapter that a configuration goes on with.
    pub adapter: Option<PathBuf>,
}

impl Opened {
    /// Opens the files at `path`, which the user calls `spec` and which came from `origin`. `chat_template` replaces the
    /// model's own.
    ///
    /// # Errors
    /// When what is there is damaged, not supported, or does not belong together.
    pub fn open(spec: &str, path: &Path, origin: String, chat_template: Option<&Path>) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let mut tokenizer = match checkpoint.gguf_metadata() {
            Some(metadata) => Tokenizer::from_gguf(vocabulary(metadata)?)?,
            None => Tokenizer::from_folder(path)?,
        };
        if let Some(file) = chat_template {
            let text = std::fs::read_to_string(file).map_err(|e| Error::io("cannot read", file, e))?;
            tokenizer.set_chat_template(Some(text));
        }
        let template = template_of(&tokenizer)?;
        let vocab = checkpoint.config().vocab_size;
        if tokenizer.vocab_size() > vocab {
            return Err(Error::Input(format!(
                "{spec}: the tokenizer has {} tokens and the model's embedding only {vocab}; they do not belong together",
                tokenizer.vocab_size()
            )));
        }
        let (new_tokens, adapter) = (Vec::new(), None);
        Ok(Self { spec: spec.to_owned(), origin, checkpoint, tokenizer, template, new_tokens, adapter })
    }

    /// Adds tokens that the tokenizer does not have.
    ///
    /// # Errors
    /// A token that cannot be added.
    pub fn add_tokens(&mut self, texts: &[String], special: bool) -> Result<()> {
        if !texts.is_empty() {
            self.new_tokens.extend(self.tokenizer.add_tokens(texts, special)?);
        }
        Ok(())
    }

    /// Adopts the tokenizer and the template beside the adapter in `folder`, when the adapter has tokens of its own; with
    /// `keep_template` the template stays.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn adopt_tokenizer(&mut self, folder: &Path, keep_template: bool) -> Result<()> {
        // What else is wrong with the adapter is said where it is read whole.
        let has_tokens = AdapterConfig::read(folder).is_ok_and(|config| !config.trainable_token_indices.is_empty());
        if !has_tokens || !folder.join("tokenizer.json").exists() {
            return Ok(());
        }
        let mut tokenizer = Tokenizer::from_folder(folder)?;
        if keep_template {
            tokenizer.set_chat_template(self.tokenizer.chat_template().map(str::to_owned));
        }
        self.template = template_of(&tokenizer)?;
        self.tokenizer = tokenizer;
        Ok(())
    }

    /// The model's configuration with rows for all tokens.
    pub fn model(&self) -> Config {
        let config = self.checkpoint.config();
        Config { vocab_size: config.vocab_size.max(self.tokenizer.vocab_size()), ..config.clone() }
    }

    /// Reads the weights; matrices are kept as `storage` says.
    ///
    /// # Errors
    /// When a weight cannot be read or is not finite.
    pub fn load(&self, storage: Storage, observer: &mut Observer<'_>) -> Result<Llama> {
        let what = "reading weights";
        Llama::load(&self.checkpoint, storage, |done, all| observer(Progress::items(what, done, all)))
    }

    /// Reads the weights and puts the adapter in a folder on top, if there is one.
    ///
    /// # Errors
    /// As [`Self::load`]; an adapter that does not fit.
    pub fn load_with(&self, adapter: Option<&Path>, storage: Storage, observer: &mut Observer<'_>) -> Result<Llama> {
        let mut llama = self.load(storage, observer)?;
        if let Some(folder) = adapter {
            llama.attach_adapter(AdapterFile::open(folder)?, false)?;
        }
        Ok(llama)
    }

    /// Reads the weights for generation, puts the adapter on top, if there is one, and moves all of it to its place.
    ///
    /// Unless `int8` says otherwise, files of quantised blocks are computed with in 8 bits, which is what they are made for,
    /// and everything else in f32. On a GPU quantised weights stay as they are and are multiplied exactly.
    ///
    /// # Errors
    /// As [`Self::load_with`] and [`Placement::place`].
    pub fn load_generator(
        &self,
        int8: Option<bool>,
        adapter: Option<&Path>,
        placement: &Placement,
        observer: &mut Observer<'_>,
    ) -> Result<Llama> {
        if placement.device.gpu().is_some() {
            if int8 == Some(true) {
                return Err(Error::Unsupported(
                    "--compute int8 is the CPU's; leave it out, or use --device cpu".into(),
                ));
            }
            let mut llama = self.load_with(adapter, Storage::Stored, observer)?;
            placement.place(&mut llama)?;
            return Ok(llama);
        }
        if !int8.unwrap_or(self.checkpoint.is_quantised()) {
            return self.load_with(adapter, Storage::F32, observer);
        }
        let mut llama = self.load_with(adapter, Storage::Stored, observer)?;
        llama.round_activations();
        Ok(llama)
    }

    /// How weights are read that will be kept as `storage` says on a GPU. Frozen floats stay in the mapped file until they
    /// are moved, matrix by matrix: expanded to f32 first, the model would be in host memory at twice its size or more, for
    /// the same numbers.
    pub fn storage_before_gpu(&self, storage: Storage, trained: bool) -> Storage {
        match storage {
            Storage::F32 if !trained && !self.checkpoint.is_quantised() => Storage::Stored,
            storage => storage,
        }
    }

    /// Every token that ends a text: those of generation_config.json (a number or a list), of config.json, and the
    /// tokenizer's own.
    ///
    /// # Errors
    /// When generation_config.json lists something that is no token id.
    pub fn end_tokens(&self) -> Result<Vec<u32>> {
        let mut ids = self.checkpoint.config().eos_token_id.clone();
        let listed = self.checkpoint.generation_config().and_then(|c| c.get("eos_token_id"));
        let numbers: Vec<&Value> = match listed {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.iter().collect(),
            Some(one) => vec![one],
        };
        for number in numbers {
            let id = number.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.push(id.ok_or_else(|| {
                Error::Input(format!(
                    "{}: generation_config.json: eos_token_id has {number}, which is no token id",
                    self.spec
                ))
            })?);
        }
        ids.extend(self.tokenizer.eos_id());
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The template.
    ///
    /// # Errors
    /// When there is none: how to give one.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            Error::Input(format!("{} has no chat template; give one with --chat-template FILE.jinja", self.spec))
        })
    }
}

fn template_of(tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| i64::try_from(d.as_secs()).ok());
    ChatTemplate::of(tokenizer, now)
}

/// The tokenizer's part of a GGUF file's metadata.
fn vocabulary(metadata: &GgufMetadata) -> Result<GgufVocabulary> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let id = |name: &str| metadata.u32(&key(name));
    let Some(model) = metadata.string(&key("model"))? else {
        return Err(Error::Input("the GGUF file has no tokenizer (tokenizer.ggml.model); use one that has".into()));
    };
    Ok(GgufVocabulary {
        model,
        pre: metadata.string(&key("pre"))?,
        tokens: metadata.strings(&key("tokens"))?.unwrap_or_default(),
        scores: metadata.f32s(&key("scores"))?.unwrap_or_default(),
        token_types: metadata.i32s(&key("token_type"))?.unwrap_or_default(),
        merges: metadata.strings(&key("merges"))?.unwrap_or_default(),
        bos: id("bos_token_id")?,
        eos: id("eos_token_id")?,
        eot: id("eot_token_id")?,
        eom: id("eom_token_id")?,
        unknown: id("unknown_token_id")?,
        padding: id("padding_token_id")?,
        add_bos: metadata.bool(&key("add_bos_token"))?,
        add_eos: metadata.bool(&key("add_eos_token"))?,
        add_space_prefix: metadata.bool(&key("add_space_prefix"))?,
        chat_template: metadata.string("tokenizer.chat_template")?,
    })
}
