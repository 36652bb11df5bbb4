//! From what the user calls a model to its opened files, with a bar for what is downloaded or read.

use crate::args::{ComputeName, DeviceArgs, ModelArgs};
use crate::{device, terminal};
use std::path::PathBuf;
use tunesmith_files::Result;
use tunesmith_hub::{Resolved, Settings};
use tunesmith_infer::{Opened, Placement};
use tunesmith_model::{GgufMetadata, Llama, Storage};
use tunesmith_text::Tokenizer;
use tunesmith_train::config::ModelConfig;
use tunesmith_train::open;

/// Opens the model of a configuration, with the tokens that it adds or that its adapter has.
///
/// # Errors
/// As [`open::model`].
pub(crate) fn open_configured(model: &ModelConfig, settings: &Settings) -> Result<Opened> {
    terminal::with_bar(|observer| open::configured(model, settings, observer))
}

/// Opens a model named on the command line, with the tokens that its adapter has.
///
/// # Errors
/// As [`open::model`].
pub(crate) fn open_with_adapter(args: &ModelArgs, settings: &Settings) -> Result<Opened> {
    let (template, adapter) = (args.chat_template.as_deref(), args.adapter.as_deref());
    terminal::with_bar(|observer| open::with_adapter(&args.model, adapter, template, settings, observer))
}

/// Opens the model that `spec` names.
///
/// # Errors
/// As [`open::model`].
pub fn open(spec: &str, settings: &Settings) -> Result<Opened> {
    terminal::with_bar(|observer| open::model(spec, None, settings, observer))
}

/// The tokenizer of `spec`: a model, or a folder that has a tokenizer and no model. With it the metadata of a GGUF file.
///
/// # Errors
/// As [`open::model`].
pub(crate) fn tokenizer(spec: &str, settings: &Settings) -> Result<(Tokenizer, Option<GgufMetadata>)> {
    let path = resolve(spec, settings)?.path;
    if path.is_dir() && !path.join("config.json").exists() {
        return Ok((Tokenizer::from_folder(&path)?, None));
    }
    let opened = open(spec, settings)?;
    Ok((opened.tokenizer, opened.checkpoint.gguf_metadata().cloned()))
}

/// The path that `spec` names.
pub(crate) fn resolve(spec: &str, settings: &Settings) -> Result<Resolved> {
    terminal::with_bar(|observer| tunesmith_hub::resolve(spec, settings, observer))
}

/// The folder of the adapter that `spec` names, if it names one.
pub(crate) fn adapter(spec: Option<&str>, settings: &Settings) -> Result<Option<PathBuf>> {
    spec.map(|spec| Ok(resolve(spec, settings)?.path)).transpose()
}

/// Reads the weights of `opened`.
pub fn llama(opened: &Opened, storage: Storage) -> Result<Llama> {
    terminal::with_bar(|observer| opened.load(storage, observer))
}

/// Reads the weights of `opened` for generation, on the device that `args` name.
pub(crate) fn generator(
    opened: &Opened,
    compute: Option<ComputeName>,
    adapter: Option<&str>,
    args: Option<&DeviceArgs>,
    settings: &Settings,
) -> Result<Llama> {
    let placement = args.map_or(Ok(Placement::default()), |args| device::placement(args, settings))?;
    let adapter = self::adapter(adapter, settings)?;
    let int8 = compute.map(|compute| compute == ComputeName::Int8);
    terminal::with_bar(|observer| opened.load_generator(int8, adapter.as_deref(), &placement, observer))
}
