//! From names to opened models and local data.

use crate::config::ModelConfig;
use crate::train::Start;
use std::path::Path;
use tunesmith_files::{Observer, Result};
use tunesmith_hub::{Settings, resolve};
use tunesmith_infer::Opened;
use tunesmith_text::PrepareOptions;

impl Start {
    /// What training of `opened` starts from.
    pub fn of(opened: &Opened) -> Self {
        let base = tunesmith_hub::base_name(&opened.spec, &opened.origin);
        Self { base, adapter: opened.adapter.clone(), new_tokens: opened.new_tokens.clone() }
    }
}

/// Opens the model that `spec` names, downloading it if need be.
///
/// # Errors
/// When it cannot be downloaded, or what is there is damaged, not supported, or does not belong together.
pub fn model(
    spec: &str,
    chat_template: Option<&Path>,
    settings: &Settings,
    observer: &mut Observer<'_>,
) -> Result<Opened> {
    let resolved = resolve(spec, settings, observer)?;
    Opened::open(spec, &resolved.path, resolved.origin, chat_template)
}

/// The same, with the tokens that the adapter named by `adapter` has.
///
/// # Errors
/// As [`model`].
pub fn with_adapter(
    spec: &str,
    adapter: Option<&str>,
    chat_template: Option<&Path>,
    settings: &Settings,
    observer: &mut Observer<'_>,
) -> Result<Opened> {
    let mut opened = model(spec, chat_template, settings, observer)?;
    if let Some(adapter) = adapter {
        opened.adopt_tokenizer(&resolve(adapter, settings, observer)?.path, chat_template.is_some())?;
    }
    Ok(opened)
}

/// Opens the model of a configuration, with the tokens that it adds or that its adapter has.
///
/// # Errors
/// As [`model`]; a token that cannot be added.
pub fn configured(config: &ModelConfig, settings: &Settings, observer: &mut Observer<'_>) -> Result<Opened> {
    let template = config.chat_template.as_deref();
    let mut opened = model(&config.source, template, settings, observer)?;
    for (field, texts, special) in [
        ("model.add_special_tokens", &config.add_special_tokens, true),
        ("model.add_tokens", &config.add_tokens, false),
    ] {
        opened.add_tokens(texts, special).map_err(|e| e.within(field))?;
    }
    if let Some(adapter) = &config.adapter {
        let folder = resolve(adapter, settings, observer)?.path;
        opened.adopt_tokenizer(&folder, template.is_some())?;
        opened.adapter = Some(folder);
    }
    Ok(opened)
}

/// `options` with local paths for what they name by `hf:`, `s3://` and the like, downloaded if need be.
///
/// # Errors
/// When something cannot be downloaded.
pub fn data(options: &PrepareOptions, settings: &Settings, observer: &mut Observer<'_>) -> Result<PrepareOptions> {
    let mut options = options.clone();
    for (split, places) in options.places_mut() {
        for place in std::mem::take(places) {
            if tunesmith_hub::is_remote(&place) {
                let found = tunesmith_hub::data_files(&place, split.name(), settings, observer)?;
                places.extend(found.iter().map(|path| path.display().to_string()));
            } else {
                places.push(place);
            }
        }
    }
    Ok(options)
}
