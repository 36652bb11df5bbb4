//! Training steps on random tokens.

use super::{Args, CELLS, Case, Pair, RULES, load_average, ours, peer, shown, today};
use crate::Result;
use std::path::Path;
use tunesmith_hub::Resolved;

/// Reads `BATCHxSEQ`.
pub(super) fn shape(text: &str) -> Result<(usize, usize)> {
    let numbers = text.split_once('x').map(|(batch, seq)| (batch.parse(), seq.parse()));
    match numbers {
        Some((Ok(batch), Ok(seq))) if batch > 0 && seq > 1 => Ok((batch, seq)),
        _ => Err("a shape is written as rows of a step x tokens of a row, such as 4x512".into()),
    }
}

pub(super) fn run(root: &Path, binary: &Path, model: &Resolved, args: &Args) -> Result<()> {
    let shapes = if args.shape.is_empty() { vec![(4, 512), (1, 2048)] } else { args.shape.clone() };
    let load_before = load_average();
    let (mut versions, mut commands, mut threads, mut rows) = (None, Vec::new(), Vec::new(), Vec::new());
    for (batch, seq) in shapes {
        for case in Case::all(args) {
            let (mut ours, mut peer) = (ours(binary, model), peer(root, model, args));
            let name = case.set(&mut ours, &mut peer);
            for command in [&mut ours, &mut peer] {
                for (flag, value) in [("--batch", batch), ("--seq", seq), ("--steps", args.steps)] {
                    command.arg(flag).arg(value.to_string());
                }
            }
            let what = format!("{name} {batch} x {seq}");
            let pair = Pair::measure(&what, &mut ours, &mut peer, args.rounds)?;
            if commands.is_empty() {
                commands = vec![shown(&ours), shown(&peer)];
            }
            versions = versions.or_else(|| pair.versions());
            threads.extend([pair.ours[0].threads, pair.peer[0].threads]);
            rows.push(format!("| {what} | {} |", pair.cells()));
        }
    }
    threads.dedup();
    println!(
        "{}, {} ({}), threads {threads:?}, median of {} runs of {} steps in turn, load before {load_before}, peer: {}\n",
        today(),
        args.model,
        model.origin,
        args.rounds,
        args.steps,
        versions.unwrap_or_else(|| "versions unknown".to_owned()),
    );
    commands.iter().for_each(|command| println!("    {command}"));
    println!("\n| Method, batch x tokens | {CELLS} |\n|---|{RULES}|");
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        assert_eq!(shape("4x512"), Ok((4, 512)));
        for wrong in ["4", "x", "0x512", "4x1", "4x512x2"] {
            assert!(shape(wrong).unwrap_err().contains("such as 4x512"), "{wrong}");
        }
    }
}
