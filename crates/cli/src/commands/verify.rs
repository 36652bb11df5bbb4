//! `tunesmith verify`: this engine against numbers that another implementation wrote.

use super::evaluate::write_json;
use crate::args::{MethodName, VerifyArgs};
use crate::load;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use tunesmith_files::table;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_model::{AdapterFile, Checkpoint, Llama, Storage};
use tunesmith_train::verify::{Check, Reference, read_curve, verify_curve, verify_reference};

pub(crate) fn run(args: &VerifyArgs, settings: &Settings) -> Result<ExitCode> {
    let checks = match (&args.reference, &args.batches, &args.curves, args.method) {
        (Some(reference), ..) => against_reference(args, reference, settings)?,
        (None, Some(batches), Some(curves), Some(method)) => against_curve(args, batches, curves, method, settings)?,
        _ => return Err(Error::Input("give --reference, or --batches with --curves and --method".into())),
    };
    let passed = checks.iter().all(Check::passed);
    print!("{}", table(&checks, args.show));
    let beyond = checks.iter().filter(|check| !check.passed()).count();
    match beyond {
        0 => println!("{} comparisons, all within tolerance", checks.len()),
        _ => println!("{} comparisons, {beyond} beyond tolerance", checks.len()),
    }
    if let Some(file) = &args.json {
        let with_verdict = |c: &Check| {
            // JSON has no NaN: a difference that is none is null.
            json!({"what": c.what, "difference": c.difference, "tolerance": c.tolerance, "passed": c.passed()})
        };
        let listed: Vec<_> = checks.iter().map(with_verdict).collect();
        write_json(file, &json!({"passed": passed, "checks": listed}))?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn against_reference(args: &VerifyArgs, file: &Path, settings: &Settings) -> Result<Vec<Check>> {
    if args.method.is_some() || args.weight_decay != 0.0 || args.label_smoothing != 0.0 {
        return Err(Error::Input(
            "--method, --weight-decay and --label-smoothing belong to --curves, not to --reference".into(),
        ));
    }
    let reference = Reference::open(file)?;
    let adapter = open_adapter(args, settings)?;
    let mut llama = load_llama(args, settings)?;
    if let Some(adapter) = adapter {
        llama.attach_adapter(adapter, false)?;
    }
    verify_reference(&mut llama, &reference)
}

fn against_curve(
    args: &VerifyArgs,
    batches: &Path,
    curves: &Path,
    method: MethodName,
    settings: &Settings,
) -> Result<Vec<Check>> {
    if !(args.weight_decay >= 0.0 && args.weight_decay.is_finite()) {
        return Err(Error::Input(format!("--weight-decay {} is not allowed; it must be 0 or more", args.weight_decay)));
    }
    if !(0.0..1.0).contains(&args.label_smoothing) {
        let given = args.label_smoothing;
        return Err(Error::Input(format!(
            "--label-smoothing {given} is not allowed; it must be 0 or more and below 1"
        )));
    }
    let method_name = match method {
        MethodName::Full => "full",
        MethodName::Lora => "lora",
        MethodName::Rslora => "rslora",
    };
    let curve = read_curve(curves, args.curve.as_deref().unwrap_or(method_name))?;
    let batches = Reference::open(batches)?;
    let adapter = match (method, open_adapter(args, settings)?) {
        (MethodName::Full, Some(_)) => {
            return Err(Error::Input("--method full trains every weight of the model; leave --adapter out".into()));
        }
        (MethodName::Full, None) => None,
        (_, None) => {
            return Err(Error::Input(format!(
                "--method {method_name} needs the adapter that the curve started from: --adapter FOLDER"
            )));
        }
        (_, Some(adapter)) => {
            let use_rslora = adapter.config.use_rslora;
            if use_rslora != (method == MethodName::Rslora) {
                return Err(Error::Input(format!(
                    "--method {method_name} contradicts the adapter, whose use_rslora is {use_rslora}; give the other method or the \
                     other adapter"
                )));
            }
            Some(adapter)
        }
    };
    let mut llama = load_llama(args, settings)?;
    match adapter {
        Some(adapter) => llama.attach_adapter(adapter, true)?,
        None => llama.train_all(),
    }
    verify_curve(&mut llama, &batches, &curve, args.weight_decay, args.label_smoothing)
}

fn open_adapter(args: &VerifyArgs, settings: &Settings) -> Result<Option<AdapterFile>> {
    let Some(adapter) = &args.model.adapter else { return Ok(None) };
    Ok(Some(AdapterFile::open(&load::resolve(adapter, settings)?.path)?))
}

/// The weights alone: numbers can be compared where there is no tokenizer.
fn load_llama(args: &VerifyArgs, settings: &Settings) -> Result<Llama> {
    if args.model.chat_template.is_some() {
        return Err(Error::Input("--chat-template has no use here: verify compares numbers, not texts".into()));
    }
    let checkpoint = Checkpoint::open(&load::resolve(&args.model.model, settings)?.path)?;
    Llama::load(&checkpoint, Storage::F32, |_, _| ())
}

/// The `show` largest differences, measured by their tolerances; what is not a number comes first.
fn table(checks: &[Check], show: usize) -> String {
    let ratio = |check: &Check| check.difference / check.tolerance;
    let mut sorted: Vec<&Check> = checks.iter().collect();
    let rank = |check: &Check| if check.difference.is_nan() { f64::INFINITY } else { ratio(check) };
    sorted.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
    let row = |check: &&Check| {
        let verdict = if check.passed() { "ok" } else { "BEYOND" };
        vec![
            check.what.clone(),
            format!("{:.2e}", check.difference),
            format!("{:.0e}", check.tolerance),
            format!("{:.3}", ratio(check)),
            verdict.into(),
        ]
    };
    let rows: Vec<Vec<String>> = sorted.iter().take(show).map(row).collect();
    table::table(&["largest differences", "relative", "tolerance", "of it", ""], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_first() {
        let check = |what: &str, difference, tolerance| Check { what: what.into(), difference, tolerance };
        let checks = [check("a", 1e-6, 1e-3), check("b", 2e-4, 1e-4), check("c", f64::NAN, 1e-5), check("d", 0.0, 1.0)];
        let text = table(&checks, 3);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[1].starts_with("c") && lines[1].contains("NaN") && lines[1].ends_with("BEYOND"));
        assert!(lines[2].starts_with("b") && lines[2].contains("2.000") && lines[2].ends_with("BEYOND"));
        assert!(lines[3].starts_with("a") && lines[3].ends_with("ok"));
    }
}
