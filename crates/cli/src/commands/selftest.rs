//! `tunesmith selftest`: does the engine agree with itself on this machine?

use super::write_json_line;
use crate::args::SelftestArgs;
use crate::load;
use crate::terminal;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use tunesmith_files::Result;
use tunesmith_files::table;
use tunesmith_hub::Settings;
use tunesmith_model::{Checkpoint, Llama};
use tunesmith_train::selftest::{self, Check};

pub(crate) fn run(args: &SelftestArgs, settings: &Settings) -> Result<ExitCode> {
    let start = Instant::now();
    let bar = terminal::count_bar("checking", 0);
    let mut checks = Vec::new();
    let mut observe = |check: Check| {
        bar.set_message(format!("{}: {}", check.model, check.check));
        bar.inc(1);
        checks.push(check);
    };
    let folder = super::temporary_folder()?;
    match &args.model {
        None => selftest::on_small_models(folder.path(), &mut observe)?,
        Some(spec) => {
            let mut model =
                Llama::load(&Checkpoint::open(&load::resolve(spec, settings)?.path)?, args.storage.into(), |_, _| ())?;
            selftest::on_model(spec, &mut model, folder.path(), &mut observe)?;
        }
    }
    bar.finish_and_clear();
    let failed = checks.iter().filter(|check| !check.passed()).count();
    if args.json.as_ref().is_none_or(|file| file.as_os_str() != "-") {
        print!("{}", table(&checks));
        println!(
            "{} checks, {}, in {:.1} s ({} instructions, {} threads)",
            checks.len(),
            if failed == 0 { "all passed".to_owned() } else { format!("{failed} FAILED") },
            start.elapsed().as_secs_f64(),
            tunesmith_tensor::simd_level(),
            rayon::current_num_threads(),
        );
    }
    if let Some(file) = &args.json {
        write_checks(file, &checks)?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Writes every check as one line of JSON.
pub(super) fn write_checks(file: &Path, checks: &[Check]) -> Result<()> {
    let with_verdict = |c: &Check| {
        // JSON has no NaN: an error that is none is null.
        json!({"model": c.model, "check": c.check, "compared": c.compared, "error": c.error, "bound": c.bound,
            "passed": c.passed()})
    };
    let listed: Vec<_> = checks.iter().map(with_verdict).collect();
    let passed = checks.iter().all(Check::passed);
    write_json_line(file, &json!({"passed": passed, "checks": listed}))
}

pub(super) fn table(checks: &[Check]) -> String {
    let number = |x: f64| if x == 0.0 { "0".to_owned() } else { format!("{x:.1e}") };
    let compared: Vec<String> = checks.iter().map(|check| format!("{}: {}", check.model, check.compared)).collect();
    // Texts read better from the left: all of one width, they fill the column.
    let width = compared.iter().map(|text| text.chars().count()).max().unwrap_or(0);
    let row = |(check, compared): (&Check, &String)| {
        let verdict = if check.passed() { "ok" } else { "FAILED" };
        let (error, bound) = (number(check.error), number(check.bound));
        vec![check.check.to_owned(), format!("{compared:<width$}"), error, bound, verdict.to_owned()]
    };
    let rows: Vec<Vec<String>> = checks.iter().zip(&compared).map(row).collect();
    table::table(&["check", &format!("{:<width$}", "compared"), "error", "bound", ""], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_marked() {
        let check = |error| Check {
            model: "m".into(),
            check: "merged = adapter",
            compared: "logits".into(),
            error,
            bound: 1e-4,
        };
        let text = table(&[check(0.0), check(2e-3), check(f64::NAN)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("merged = adapter  m: logits  ") && lines[1].ends_with("1.0e-4      ok"),
            "{text}"
        );
        assert!(lines[2].contains("2.0e-3") && lines[2].ends_with("FAILED"));
        assert!(lines[3].contains("NaN") && lines[3].ends_with("FAILED"));
    }
}
