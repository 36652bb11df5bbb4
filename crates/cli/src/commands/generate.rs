//! `tunesmith generate`: continue a prompt, or many.

mod many;

use super::sampling::{limits, sampling, show};
use crate::args::GenerateArgs;
use crate::{load, stop};
use serde::Serialize;
use std::io::{self, Read};
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_infer::{Finish, Writer};
use tunesmith_text::Message;

/// A prompt and what followed it, as printed in JSON.
#[derive(Serialize)]
struct Generated<'a> {
    prompt: &'a str,
    text: &'a str,
    prompt_tokens: usize,
    new_tokens: usize,
    ids: &'a [u32],
    finish_reason: Finish,
}

/// What `--json` prints of a single prompt.
#[derive(Serialize)]
struct Alone<'a> {
    #[serde(flatten)]
    generated: Generated<'a>,
    tokens_per_s: f64,
    model: &'a str,
    adapter: Option<&'a str>,
}

/// Prints `value` as a line of JSON.
fn show_json(value: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(value).map_err(|e| Error::Failure(format!("cannot encode the text: {e}")))?;
    show(&(line + "\n"))
}

pub(crate) fn run(args: &GenerateArgs, settings: &Settings) -> Result<()> {
    if args.model.chat_template.is_some() && !args.chat {
        return Err(Error::Input("--chat-template has no use without --chat".into()));
    }
    if args.batch == 0 {
        return Err(Error::Input("--batch 0 continues nothing; give at least 1".into()));
    }
    let prompts = match (&args.prompts, args.prompt.as_deref()) {
        (Some(file), _) => many::read_prompts(file)?,
        (None, Some("-")) => vec![from_stdin()?],
        (None, prompt) => vec![prompt.unwrap_or_default().to_owned()],
    };
    let opened = load::open_with_adapter(&args.model, settings)?;
    let sampling = sampling(&args.sampling, opened.checkpoint.generation_config())?;
    let end_tokens = opened.end_tokens()?;
    let encode = |prompt: &String| {
        if !args.chat {
            return opened.tokenizer.encode(prompt, true);
        }
        let system = args.system.as_ref().map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
        opened.tokenizer.encode(&opened.template()?.render(&messages, true)?, false)
    };
    let ids = prompts.iter().map(encode).collect::<Result<Vec<Vec<u32>>>>()?;

    stop::install(None)?;
    let adapter = args.model.adapter.as_deref();
    let llama = load::generator(&opened, args.compute, adapter, Some(&args.device), settings)?;
    if args.prompts.is_some() {
        let job = many::Job { args, llama: &llama, opened: &opened, end_tokens: &end_tokens };
        return many::run(&job, &prompts, &ids, sampling);
    }
    let (prompt, ids) = (&prompts[0], &ids[0]);
    let mut writer =
        Writer::new(&llama, &opened.tokenizer, end_tokens, limits(&args.sampling), sampling, stop::flag())?;
    let new = stop::listening(|| writer.write(ids, |piece| if args.json { Ok(()) } else { show(piece) }))?;
    if args.json {
        let generated = Generated {
            prompt,
            text: &new.text,
            prompt_tokens: ids.len(),
            new_tokens: new.ids.len(),
            ids: &new.ids,
            finish_reason: new.finish,
        };
        show_json(&Alone { generated, tokens_per_s: new.tokens_per_s, model: &opened.origin, adapter })?;
    } else {
        show("\n")?;
        eprintln!("{} tokens, {:.1} tokens/s, after a prompt of {}", new.ids.len(), new.tokens_per_s, ids.len());
    }
    if new.finish == Finish::Interrupted { Err(Error::Stopped) } else { Ok(()) }
}

/// All of standard input, without the line break that ends it: an editor or `echo` put it there, not the writer.
fn from_stdin() -> Result<String> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => Error::Input("the prompt on standard input is not UTF-8".into()),
        _ => Error::Io { what: "cannot read the prompt from standard input".into(), source },
    })?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
}
