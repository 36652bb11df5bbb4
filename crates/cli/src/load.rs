//! From what the user calls a model to weights, tokenizer, template and end tokens: one way for every command.

use crate::args::{ComputeName, DeviceArgs, ModelArgs};
use crate::device;
use crate::error::{Error, Result};
use crate::source::{self, Settings};
use crate::terminal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use tunesmith_model::{Adapter, AdapterConfig, AdapterFile, Checkpoint, Config, GgufMetadata, Llama, Storage};
use tunesmith_text::{ChatTemplate, GgufVocabulary, Tokenizer};
use tunesmith_train::config::ModelConfig;
use tunesmith_train::train::Start;

/// A model's files, looked at but with no weight read, and everything about its text.
pub struct Opened {
    /// What the user wrote.
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

/// Opens the model of a configuration, with the tokens that it adds or that its adapter has.
///
/// # Errors
/// As [`open`]; a token that cannot be added.
pub(crate) fn open_configured(model: &ModelConfig, settings: &Settings) -> Result<Opened> {
    let mut opened = open(&model.source, model.chat_template.as_deref(), settings)?;
    for (field, texts, special) in
        [("model.add_special_tokens", &model.add_special_tokens, true), ("model.add_tokens", &model.add_tokens, false)]
    {
        if !texts.is_empty() {
            let ids = opened.tokenizer.add_tokens(texts, special).map_err(|e| match e {
                tunesmith_text::Error::Input(why) => Error::Input(format!("{field}: {why}")),
                other => other.into(),
            })?;
            opened.new_tokens.extend(ids);
        }
    }
    if let Some(adapter) = &model.adapter {
        let folder = resolve(adapter, settings)?.path;
        opened.speak_as(&folder, model.chat_template.as_deref())?;
        opened.adapter = Some(folder);
    }
    Ok(opened)
}

/// Opens a model named on the command line, with the tokens that its adapter has.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_with_adapter(args: &ModelArgs, settings: &Settings) -> Result<Opened> {
    let mut opened = open(&args.model, args.chat_template.as_deref(), settings)?;
    if let Some(adapter) = &args.adapter {
        opened.speak_as(&resolve(adapter, settings)?.path, args.chat_template.as_deref())?;
    }
    Ok(opened)
}

/// Resolves `spec`, fetching it if need be, and opens its files.
///
/// # Errors
/// When the source cannot be fetched, or what it holds is damaged, not supported, or does not belong together.
pub fn open(spec: &str, chat_template: Option<&Path>, settings: &Settings) -> Result<Opened> {
    let resolved = resolve(spec, settings)?;
    let checkpoint = Checkpoint::open(&resolved.path)?;
    let mut tokenizer = match checkpoint.gguf_metadata() {
        Some(metadata) => Tokenizer::from_gguf(vocabulary(metadata)?)?,
        None => Tokenizer::from_folder(&resolved.path)?,
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
    Ok(Opened {
        spec: spec.to_owned(),
        origin: resolved.origin,
        checkpoint,
        tokenizer,
        template,
        new_tokens: Vec::new(),
        adapter: None,
    })
}

fn template_of(tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| i64::try_from(d.as_secs()).ok());
    Ok(ChatTemplate::of(tokenizer, now)?)
}

/// The tokenizer of `spec`: a model, or a folder that has a tokenizer and no model. With it the metadata of a GGUF file.
///
/// # Errors
/// As [`open`].
pub(crate) fn tokenizer(spec: &str, settings: &Settings) -> Result<(Tokenizer, Option<GgufMetadata>)> {
    let path = resolve(spec, settings)?.path;
    if path.is_dir() && !path.join("config.json").exists() {
        return Ok((Tokenizer::from_folder(&path)?, None));
    }
    let opened = open(spec, None, settings)?;
    Ok((opened.tokenizer, opened.checkpoint.gguf_metadata().cloned()))
}

/// Resolves a spec with a bar for what is fetched.
pub(crate) fn resolve(spec: &str, settings: &Settings) -> Result<source::Resolved> {
    with_bar(|progress| source::resolve(spec, settings, progress))
}

/// The files of data that a spec means, with a bar for what is fetched. `split` is the one wanted where the spec says none.
pub(crate) fn data_files(spec: &str, split: &str, settings: &Settings) -> Result<Vec<PathBuf>> {
    with_bar(|progress| source::data_files(spec, split, settings, progress))
}

/// Does something with a bar for what is fetched.
pub(crate) fn with_bar<T>(fetch: impl FnOnce(&mut dyn FnMut(source::Progress<'_>)) -> T) -> T {
    let mut bar: Option<(String, indicatif::ProgressBar)> = None;
    let found = fetch(&mut |progress| {
        if bar.as_ref().is_none_or(|(what, _)| what != progress.what) {
            if let Some((_, old)) = bar.take() {
                old.finish_and_clear();
            }
            bar = Some((progress.what.to_owned(), terminal::bytes_bar(progress.what)));
        }
        if let Some((_, bar)) = &bar {
            if let Some(total) = progress.total_bytes {
                bar.set_length(total);
            }
            bar.set_position(progress.done_bytes);
        }
    });
    if let Some((_, bar)) = bar {
        bar.finish_and_clear();
    }
    found
}

impl Opened {
    /// What training starts from.
    pub(crate) fn start(&self) -> Start {
        Start { base: self.base_name(), adapter: self.adapter.clone(), new_tokens: self.new_tokens.clone() }
    }

    /// The model's configuration with rows for all tokens.
    pub(crate) fn model(&self) -> Config {
        let config = self.checkpoint.config();
        Config { vocab_size: config.vocab_size.max(self.tokenizer.vocab_size()), ..config.clone() }
    }

    /// Takes over the tokenizer and the template that lie beside the adapter in `folder`, when the adapter has tokens of its
    /// own; `template` was given by the user and stays.
    fn speak_as(&mut self, folder: &Path, template: Option<&Path>) -> Result<()> {
        // What else is wrong with the adapter is said where it is read whole.
        let has_tokens = AdapterConfig::read(folder).is_ok_and(|config| !config.trainable_token_indices.is_empty());
        if !has_tokens || !folder.join("tokenizer.json").exists() {
            return Ok(());
        }
        let mut tokenizer = Tokenizer::from_folder(folder)?;
        if template.is_some() {
            tokenizer.set_chat_template(self.tokenizer.chat_template().map(str::to_owned));
        }
        self.template = template_of(&tokenizer)?;
        self.tokenizer = tokenizer;
        Ok(())
    }

    /// Reads the weights; matrices are kept as `storage` says.
    ///
    /// # Errors
    /// When a weight cannot be read or is not finite.
    pub fn llama(&self, storage: Storage) -> Result<Llama> {
        let bar = terminal::count_bar("reading weights", 0);
        let llama = Llama::load(&self.checkpoint, storage, |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        Ok(llama?)
    }

    /// How weights are read that will be kept as `storage` says on a GPU. Frozen floats stay in the mapped file until they are moved, matrix
    /// by matrix: expanded to f32 first, the model would be in memory as a whole, at twice its size or more, for the same numbers.
    pub(crate) fn storage_before_gpu(&self, storage: Storage, trained: bool) -> Storage {
        match storage {
            Storage::F32 if !trained && !self.checkpoint.is_quantised() => Storage::Stored,
            storage => storage,
        }
    }

    /// Reads the weights, and the adapter if there is one.
    pub(crate) fn llama_with(
        &self,
        adapter: Option<&str>,
        storage: Storage,
        settings: &Settings,
    ) -> Result<(Llama, Option<Adapter>)> {
        let mut llama = self.llama(storage)?;
        let Some(adapter) = adapter else { return Ok((llama, None)) };
        let folder = resolve(adapter, settings)?.path;
        let adapter = Adapter::open(&mut llama, AdapterFile::open(&folder)?, false)?;
        Ok((llama, Some(adapter)))
    }

    /// Reads the weights for generation, and the adapter if there is one.
    ///
    /// Without a wish for `compute`, files of quantised blocks are computed with in 8 bits, which is what they are made for,
    /// and everything else in f32. On a GPU quantised weights stay as they are and are multiplied exactly.
    pub(crate) fn generator(
        &self,
        compute: Option<ComputeName>,
        adapter: Option<&str>,
        device: Option<&DeviceArgs>,
        settings: &Settings,
    ) -> Result<(Llama, Option<Adapter>)> {
        device.map_or(Ok(()), device::check)?;
        if let Some(args) = device.filter(|args| args.device != "cpu") {
            if compute == Some(ComputeName::Int8) {
                return Err(Error::Input(
                    "--compute int8 is the processor's; leave it out, or use --device cpu".into(),
                ));
            }
            let mut loaded = self.llama_with(adapter, Storage::Stored, settings)?;
            device::place(&mut loaded.0, loaded.1.as_mut(), args, settings)?;
            return Ok(loaded);
        }
        let default = if self.checkpoint.is_quantised() { ComputeName::Int8 } else { ComputeName::F32 };
        match compute.unwrap_or(default) {
            ComputeName::F32 => self.llama_with(adapter, Storage::F32, settings),
            ComputeName::Int8 => {
                let mut loaded = self.llama_with(adapter, Storage::Stored, settings)?;
                loaded.0.round_activations();
                Ok(loaded)
            }
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

    /// The template, or an error that says how to bring one.
    pub(crate) fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            Error::Input(format!("{} has no chat template; give one with --chat-template FILE.jinja", self.spec))
        })
    }

    /// What an adapter should name as its base, so that PEFT finds it: a hub name where there is one.
    pub(crate) fn base_name(&self) -> String {
        let pinned = source::hub_name(&self.spec).unwrap_or(self.origin.as_str());
        let name = pinned.strip_prefix("hf:").unwrap_or(pinned);
        name.split_once('@').map_or(name, |(name, _)| name).to_owned()
    }

    /// Files of the model, for hashing.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.checkpoint.files()
    }
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
