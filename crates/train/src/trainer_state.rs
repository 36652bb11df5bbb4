//! `trainer_state.json` as Hugging Face's `Trainer` writes it, so that tools that plot or compare runs read ours too.

use std::{collections::BTreeMap, fs, path::Path};
use tunesmith_files::atomic;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result, metrics::MetricRecord};

/// One entry of the log history: keys sorted, as Hugging Face writes them.
pub type LogEntry = BTreeMap<String, Value>;

/// The file, field by field in the order of the file (sorted); all fields are always written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Step of the lowest validation loss so far.
    #[serde(default)]
    pub best_global_step: Option<u64>,
    /// The lowest validation loss so far, in nats.
    pub best_metric: Option<f64>,
    /// Folder of the checkpoint of that step, if it was kept.
    pub best_model_checkpoint: Option<String>,
    /// Passes over the training data, with the fraction of the present one.
    pub epoch: Option<f64>,
    /// Steps between evaluations.
    pub eval_steps: u64,
    /// Optimizer steps done.
    pub global_step: u64,
    /// Always false: a search over settings is no part of one run.
    pub is_hyper_param_search: bool,
    /// True for the process that writes.
    pub is_local_process_zero: bool,
    /// True for the process that writes.
    pub is_world_process_zero: bool,
    /// Training entries {epoch, grad_norm, learning_rate, loss, num_tokens, step}, evaluation entries {epoch, eval_loss,
    /// eval_num_tokens, eval_perplexity, step} and at the end of the run {epoch, step, total_flos, train_loss,
    /// train_runtime, train_samples_per_second, train_steps_per_second}.
    pub log_history: Vec<LogEntry>,
    /// Steps between training entries.
    pub logging_steps: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Tokens that went through the model.
    pub num_input_tokens_seen: u64,
    /// Passes over the training data of the whole run, rounded up.
    pub num_train_epochs: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// State of Hugging Face's callbacks; the entry of `TrainerControl` is always there.
    pub stateful_callbacks: Value,
    /// Floating-point operations so far.
    pub total_flos: f64,
    /// Rows in one micro-batch.
    pub train_batch_size: Option<u64>,
    /// Name of a search trial: null.
    pub trial_name: Option<String>,
    /// Settings of a search trial: null.
    pub trial_params: Value,
}

/// What the metric records do not say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunProgress {
    /// Optimizer steps done.
    pub global_step: u64,
    /// Passes over the training data, with the fraction of the present one.
    pub epoch: f64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Passes over the training data of the whole run, rounded up.
    pub num_train_epochs: u64,
    /// Steps between training records.
    pub logging_steps: u64,
    /// Steps between evaluations; 0 for a run without.
    pub eval_steps: u64,
    /// Steps between checkpoints; 0 for a run without.
    pub save_steps: u64,
    /// Rows in one micro-batch.
    pub train_batch_size: u64,
    /// Tokens that went through the model.
    pub num_input_tokens_seen: u64,
    /// Floating-point operations so far; 0 where unknown.
    pub total_flos: f64,
    /// Folder of the checkpoint with the lowest validation loss, if it was kept.
    pub best_model_checkpoint: Option<String>,
    /// The end of the run; `None` in a checkpoint on the way.
    pub summary: Option<RunSummary>,
}

/// What Hugging Face logs when a run ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunSummary {
    /// Mean training loss of the whole run, in nats.
    pub train_loss: f64,
    /// Seconds.
    pub train_runtime: f64,
    /// Training rows seen, repeats counted.
    pub num_samples: u64,
}

impl TrainerState {
    /// The state of a run from its metric records (those after `progress.global_step` are left out).
    pub fn from_metrics(records: &[MetricRecord], progress: &RunProgress) -> Self {
        let mut log_history = Vec::new();
        let mut best: Option<(u64, f64)> = None;
        for record in records.iter().filter(|record| record.step() <= progress.global_step) {
            match *record {
                MetricRecord::Train { step, epoch, loss, learning_rate, grad_norm, num_tokens, .. } => {
                    log_history.push(entry([
                        ("epoch", json!(epoch)),
                        ("grad_norm", json!(grad_norm)),
                        ("learning_rate", json!(learning_rate)),
                        ("loss", json!(loss)),
                        ("num_tokens", json!(num_tokens)),
                        ("step", json!(step)),
                    ]));
                }
                MetricRecord::Eval { step, epoch, eval_loss, eval_perplexity, num_tokens } => {
                    if eval_loss.is_finite() && best.is_none_or(|(_, lowest)| eval_loss < lowest) {
                        best = Some((step, eval_loss));
                    }
                    log_history.push(entry([
                        ("epoch", json!(epoch)),
                        ("eval_loss", json!(eval_loss)),
                        ("eval_num_tokens", json!(num_tokens)),
                        ("eval_perplexity", json!(eval_perplexity)),
                        ("step", json!(step)),
                    ]));
                }
                MetricRecord::Sample { .. } | MetricRecord::Note { .. } => {}
            }
        }
        if let Some(summary) = progress.summary {
            let rate = |count: u64| {
                if summary.train_runtime > 0.0 { count as f64 / summary.train_runtime } else { 0.0 }
            };
            log_history.push(entry([
                ("epoch", json!(progress.epoch)),
                ("step", json!(progress.global_step)),
                ("total_flos", json!(progress.total_flos)),
                ("train_loss", json!(summary.train_loss)),
                ("train_runtime", json!(summary.train_runtime)),
                ("train_samples_per_second", json!(rate(summary.num_samples))),
                ("train_steps_per_second", json!(rate(progress.global_step))),
            ]));
        }
        let finished = progress.summary.is_some();
        Self {
            best_global_step: best.map(|(step, _)| step),
            best_metric: best.map(|(_, loss)| loss),
            best_model_checkpoint: progress.best_model_checkpoint.clone(),
            epoch: Some(progress.epoch),
            eval_steps: progress.eval_steps,
            global_step: progress.global_step,
            is_hyper_param_search: false,
            is_local_process_zero: true,
            is_world_process_zero: true,
            log_history,
            logging_steps: progress.logging_steps,
            max_steps: progress.max_steps,
            num_input_tokens_seen: progress.num_input_tokens_seen,
            num_train_epochs: progress.num_train_epochs,
            save_steps: progress.save_steps,
            stateful_callbacks: json!({
                "TrainerControl": {
                    "args": {
                        "should_epoch_stop": false,
                        "should_evaluate": false,
                        "should_log": false,
                        "should_save": true,
                        "should_training_stop": finished,
                    },
                    "attributes": {},
                }
            }),
            total_flos: progress.total_flos,
            train_batch_size: Some(progress.train_batch_size),
            trial_name: None,
            trial_params: Value::Null,
        }
    }

    /// The content of the file: indent 2, sorted keys, a line end at the end.
    ///
    /// # Errors
    /// [`Error::Failure`] when it cannot be expressed in JSON.
    pub fn to_json(&self) -> Result<String> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Failure(format!("cannot write trainer_state.json: {error}")))?;
        Ok(json + "\n")
    }

    /// Writes the file as a whole or not at all.
    ///
    /// # Errors
    /// [`Error::Input`] when the folder is missing; [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        atomic::write(path, self.to_json()?)
    }

    /// Reads a file of this program or of Hugging Face's `Trainer`.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no such file or it is no such state (line and column are named); [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::io("cannot read", path, source))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::Input(format!(
                "{} is no trainer_state.json: {error}; restore it from another checkpoint",
                path.display()
            ))
        })
    }
}

fn entry<const N: usize>(fields: [(&str, Value); N]) -> LogEntry {
    fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<MetricRecord> {
        let train = |step: u64, loss: f64| MetricRecord::Train {
            step,
            epoch: step as f64 / 8.0,
            loss,
            learning_rate: 2e-4,
            grad_norm: 1.5,
            num_tokens: 100 * step,
            tokens_per_s: 400.0,
            elapsed_s: 1.0,
            rss_bytes: 1,
        };
        let eval = |step: u64, eval_loss: f64| MetricRecord::Eval {
            step,
            epoch: step as f64 / 8.0,
            eval_loss,
            eval_perplexity: 8.0,
            num_tokens: 50,
        };
        vec![
            train(2, 3.0),
            eval(2, 2.5),
            MetricRecord::Note { step: 2, message: "saved".into() },
            train(4, 2.0),
            eval(4, 2.25),
            train(6, 1.5),
            eval(6, f64::NAN),
            eval(8, 1.0),
        ]
    }

    fn progress() -> RunProgress {
        RunProgress {
            global_step: 6,
            epoch: 0.75,
            max_steps: 8,
            num_train_epochs: 1,
            logging_steps: 2,
            eval_steps: 2,
            save_steps: 2,
            train_batch_size: 4,
            num_input_tokens_seen: 12_288,
            total_flos: 1.5e12,
            best_model_checkpoint: Some("run/checkpoints/step-4".into()),
            summary: None,
        }
    }

    #[test]
    fn a_checkpoint_knows_its_history_and_its_best_step() {
        let state = TrainerState::from_metrics(&records(), &progress());
        assert_eq!((state.best_global_step, state.best_metric), (Some(4), Some(2.25)));
        assert_eq!(state.log_history.len(), 6, "the evaluation of step 8 has not happened yet");
        assert_eq!(state.log_history[0]["loss"], json!(3.0));
        assert_eq!(state.log_history[1]["eval_loss"], json!(2.5));
        assert_eq!(state.log_history[5]["eval_loss"], Value::Null);
    }

    #[test]
    fn the_file_has_the_form_of_hugging_face() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer_state.json");
        let state = TrainerState::from_metrics(&records(), &progress());
        state.write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\n  \"best_global_step\": 4,\n  \"best_metric\": 2.25,\n"), "{text}");
        assert!(
            text.contains(
                "    {\n      \"epoch\": 0.25,\n      \"grad_norm\": 1.5,\n      \"learning_rate\": 0.0002,\n"
            )
        );
        assert!(text.ends_with("  \"trial_params\": null\n}\n"), "{text}");
        // The keys of the top level, in the order of the file: all of them, sorted.
        let keys: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("  \""))
            .filter_map(|line| line.trim_start_matches("  \"").split('"').next())
            .collect();
        let expected = "best_global_step best_metric best_model_checkpoint epoch eval_steps global_step \
            is_hyper_param_search is_local_process_zero is_world_process_zero log_history logging_steps max_steps \
            num_input_tokens_seen num_train_epochs save_steps stateful_callbacks total_flos train_batch_size trial_name \
            trial_params";
        assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
        let read = TrainerState::read(&path).unwrap();
        assert_eq!(read, state);
    }

    #[test]
    fn the_end_of_a_run_is_summed_up() {
        let summary = RunSummary { train_loss: 2.25, train_runtime: 3.0, num_samples: 24 };
        let state = TrainerState::from_metrics(&records(), &RunProgress { summary: Some(summary), ..progress() });
        let last = state.log_history.last().unwrap();
        let keys: Vec<_> = last.keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "epoch",
                "step",
                "total_flos",
                "train_loss",
                "train_runtime",
                "train_samples_per_second",
                "train_steps_per_second"
            ]
        );
        assert_eq!((&last["train_samples_per_second"], &last["train_steps_per_second"]), (&json!(8.0), &json!(2.0)));
        assert_eq!(state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"], json!(true));
    }

    #[test]
    fn a_run_without_records_has_a_state() {
        let state = TrainerState::from_metrics(&[], &RunProgress::default());
        assert_eq!(state.best_metric, None);
        assert!(state.log_history.is_empty());
    }

    #[test]
    fn broken_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer_state.json");
        assert!(TrainerState::read(&path).unwrap_err().to_string().contains("no such file"));
        fs::write(&path, "{\"epoch\": 1.0}").unwrap();
        let message = TrainerState::read(&path).unwrap_err().to_string();
        assert!(message.contains("no trainer_state.json: missing field"), "{message}");
    }
}
