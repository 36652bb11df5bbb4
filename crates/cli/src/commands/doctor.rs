//! `tunesmith doctor`: what is wrong with data, tokenizer and template together.

use super::{prepare, write_json_line};
use crate::args::DoctorArgs;
use crate::load;
use crate::terminal;
use std::process::ExitCode;
use tunesmith_files::Result;
use tunesmith_files::table::grouped;
use tunesmith_hub::Settings;
use tunesmith_text::{Check, Diagnosis, examine};

pub(crate) fn run(args: &DoctorArgs, settings: &Settings) -> Result<ExitCode> {
    let config = prepare::load_config(&args.config, &args.set)?;
    let opened = load::open_configured(&config.model, settings)?;
    let options = prepare::local(&config.data, settings)?;
    let bar = terminal::bytes_bar("looking at all rows");
    let rows = opened.model().vocab_size;
    let found = examine(&options, &opened.tokenizer, opened.template.as_ref(), rows, &mut |p| prepare::show(&bar, p));
    bar.finish_and_clear();
    let found = found?;
    if args.json.as_ref().is_none_or(|file| file.as_os_str() != "-") {
        print!("{}", describe(&found));
    }
    if let Some(file) = &args.json {
        write_json_line(file, &found)?;
    }
    // What is wrong is in the user's hands.
    Ok(if found.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

fn describe(found: &Diagnosis) -> String {
    let mut text = String::new();
    for check in Check::ALL {
        match found.failed.get(&check) {
            None => text.push_str(&format!("ok      {}\n", check.words())),
            Some(finding) => {
                let rows = grouped(finding.rows);
                text.push_str(&format!("FAILED  {}: not in {rows} rows\n", check.words()));
                for example in &finding.examples {
                    text.push_str(&format!("        {example}\n"));
                }
                if finding.rows > finding.examples.len() {
                    text.push_str("        ...\n");
                }
            }
        }
    }
    let verdict = match found.failed.len() {
        0 => "nothing is wrong".to_owned(),
        failed => format!("{failed} of {} checks failed", Check::ALL.len()),
    };
    text.push_str(&format!("{} rows looked at; {verdict}\n", grouped(found.rows)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_text::Finding;

    #[test]
    fn every_check_has_its_line() {
        let mut found = Diagnosis { rows: 2000, ..Diagnosis::default() };
        assert_eq!(describe(&found).matches("ok ").count(), Check::ALL.len());
        assert!(describe(&found).ends_with("2,000 rows looked at; nothing is wrong\n"));
        let finding = Finding { rows: 7, examples: vec!["d.jsonl, line 3: no token is trained".into()] };
        found.failed.insert(Check::Trained, finding);
        let text = describe(&found);
        assert!(
            text.contains("FAILED  something is trained in every row: not in 7 rows\n        d.jsonl, line 3"),
            "{text}"
        );
        assert!(text.contains("\n        ...\n") && text.ends_with("1 of 8 checks failed\n"), "{text}");
    }
}
