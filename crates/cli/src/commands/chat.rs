//! `tunesmith chat`: a conversation in the terminal, or line by line from a pipe.

use super::sampling::{limits, sampling, show};
use crate::args::ChatArgs;
use crate::{load, stop};
use std::io::{self, BufRead, IsTerminal};
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_infer::{Finish, Writer};
use tunesmith_text::{ChatTemplate, Message, Tokenizer};

const HELP: &str = "\
/help          this list
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message; without TEXT, remove it
/undo          forget the last question and its answer
/exit          leave (also Ctrl-D; Ctrl-C stops an answer)
A line that begins with a space is sent as it is, also when a / follows.";

/// What a line from the user asks for.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    Help,
    Reset,
    System(&'a str),
    Undo,
    Exit,
    Unknown(&'a str),
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let text = line.trim();
        if text.is_empty() {
            return Self::Nothing;
        }
        if !line.starts_with('/') {
            return Self::Say(text);
        }
        let (command, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        match (command, rest.trim()) {
            ("/help", "") => Self::Help,
            ("/reset", "") => Self::Reset,
            ("/system", rest) => Self::System(rest),
            ("/undo", "") => Self::Undo,
            ("/exit" | "/quit", "") => Self::Exit,
            _ => Self::Unknown(text),
        }
    }
}

/// The messages so far: an optional system message, then questions and answers in turn.
#[derive(Default)]
struct Conversation {
    system: Option<Message>,
    turns: Vec<Message>,
}

impl Conversation {
    fn prompt(&self, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let messages: Vec<Message> = self.system.iter().chain(&self.turns).cloned().collect();
        tokenizer.encode(&template.render(&messages, true)?, false)
    }

    /// The prompt after the last question. While it leaves fewer than `reserve` of the context's tokens for the answer,
    /// the oldest question and answer are forgotten; returns how many were. A question that is too long even alone
    /// changes nothing: the engine will refuse it.
    fn fit(
        &mut self,
        context: usize,
        reserve: usize,
        prompt: impl Fn(&Self) -> Result<Vec<u32>>,
    ) -> Result<(Vec<u32>, usize)> {
        let whole = self.turns.clone();
        loop {
            let ids = prompt(self)?;
            if ids.len() + reserve > context && self.turns.len() >= 3 {
                self.turns.drain(..2);
                continue;
            }
            if ids.len() >= context {
                self.turns = whole;
                return Ok((ids, 0));
            }
            return Ok((ids, (whole.len() - self.turns.len()) / 2));
        }
    }
}

pub(crate) fn run(args: &ChatArgs, settings: &Settings) -> Result<()> {
    let opened = load::open_with_adapter(&args.model, settings)?;
    let sampling = sampling(&args.sampling, opened.checkpoint.generation_config())?;
    let end_tokens = opened.end_tokens()?;
    let template = opened.template()?;
    stop::install(None)?;
    let llama = load::generator(&opened, args.compute, args.model.adapter.as_deref(), Some(&args.device), settings)?;
    let context = llama.config.max_position_embeddings;
    // An answer should have room, but a long wish for one must not push the whole conversation out.
    let reserve = args.sampling.max_new_tokens.min(context / 4).max(1);
    let mut writer =
        Writer::new(&llama, &opened.tokenizer, end_tokens, limits(&args.sampling), sampling, stop::flag())?;

    let system = |text: &str| Some(Message::new("system", text));
    let mut conversation = Conversation { system: args.system.as_deref().and_then(system), turns: Vec::new() };
    let terminal = io::stdin().is_terminal();
    if terminal {
        eprintln!("{} - /help lists the commands", opened.spec);
    }
    while let Some(line) = next_line(terminal)? {
        match Line::parse(&line) {
            Line::Nothing => {}
            Line::Help => eprintln!("{HELP}"),
            Line::Exit => break,
            Line::Reset => conversation.turns.clear(),
            Line::System(text) => conversation.system = Some(text).filter(|text| !text.is_empty()).and_then(system),
            Line::Undo if conversation.turns.is_empty() => eprintln!("there is nothing to undo"),
            Line::Undo => conversation.turns.truncate(conversation.turns.len() - 2),
            Line::Unknown(text) => eprintln!("{text}: no such command; /help lists them"),
            Line::Say(text) => {
                conversation.turns.push(Message::new("user", text));
                let prompt = |conversation: &Conversation| conversation.prompt(template, &opened.tokenizer);
                let answer = conversation.fit(context, reserve, prompt).and_then(|(ids, forgotten)| {
                    if forgotten > 0 {
                        let oldest = match forgotten {
                            1 => "question and answer are".to_owned(),
                            n => format!("{n} questions and answers are"),
                        };
                        eprintln!("the context of {context} tokens is full: the oldest {oldest} forgotten");
                    }
                    stop::listening(|| writer.write(&ids, show))
                });
                match answer {
                    Ok(answer) => {
                        show("\n")?;
                        if answer.finish == Finish::Length {
                            eprintln!("(cut off after {} tokens)", answer.ids.len());
                        }
                        conversation.turns.push(Message::new("assistant", answer.text));
                    }
                    // A question that is too long, or that the template refuses, ends only itself.
                    Err(Error::Input(reason)) => {
                        conversation.turns.pop();
                        eprintln!("error: {reason}");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(())
}

/// The next line of standard input; `None` at its end.
fn next_line(terminal: bool) -> Result<Option<String>> {
    if terminal {
        eprint!("> ");
    }
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => Error::Input("a line on standard input is not UTF-8".into()),
        _ => Error::Io { what: "cannot read from standard input".into(), source },
    })?;
    Ok((read > 0).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_questions() {
        assert_eq!(Line::parse("hello there\n"), Line::Say("hello there"));
        assert_eq!(Line::parse(" /undo\n"), Line::Say("/undo"));
        assert_eq!(Line::parse("/undo\n"), Line::Undo);
        assert_eq!(Line::parse("/system  Be brief. \n"), Line::System("Be brief."));
        assert_eq!(Line::parse("/system\n"), Line::System(""));
        assert_eq!(Line::parse("/reset now\n"), Line::Unknown("/reset now"));
        assert_eq!(Line::parse("/what\n"), Line::Unknown("/what"));
        assert_eq!(Line::parse("  \n"), Line::Nothing);
        assert_eq!([Line::parse("/exit"), Line::parse("/quit")], [Line::Exit, Line::Exit]);
    }

    #[test]
    fn a_full_context_loses_its_oldest_turns() {
        let turn = |role: &str, n: usize| Message::new(role, "x".repeat(n));
        let mut conversation = Conversation {
            system: Some(turn("system", 2)),
            turns: vec![turn("user", 5), turn("assistant", 5), turn("user", 3), turn("assistant", 3), turn("user", 1)],
        };
        // As many tokens as characters.
        let prompt = |c: &Conversation| {
            Ok(c.system.iter().chain(&c.turns).flat_map(|m| m.content.bytes().map(u32::from)).collect::<Vec<_>>())
        };
        assert_eq!(conversation.fit(24, 5, prompt).unwrap().1, 0);
        let (ids, forgotten) = conversation.fit(23, 5, prompt).unwrap();
        assert_eq!((ids.len(), forgotten, conversation.turns.len()), (9, 1, 3));
        let (ids, forgotten) = conversation.fit(3, 1, prompt).unwrap();
        assert_eq!((ids.len(), forgotten, conversation.turns.len()), (3, 0, 3), "no room even for the question alone");
        let (ids, forgotten) = conversation.fit(4, 1, prompt).unwrap();
        assert_eq!((ids.len(), forgotten, conversation.turns.len()), (3, 1, 1), "the question itself is never dropped");
        assert!(conversation.system.is_some());
    }
}
