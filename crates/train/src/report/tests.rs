use super::*;
use crate::statistics::{Bootstrap, DocumentLoss, compare};

fn train(step: u64, loss: f64) -> MetricRecord {
    let progress = step as f64 / 400.0;
    MetricRecord::Train {
        step,
        epoch: 2.0 * progress,
        loss,
        learning_rate: 2e-4 * (step as f64 / 12.0).min(0.5 * (1.0 + (std::f64::consts::PI * progress).cos())),
        grad_norm: 0.9 + 0.4 * (step as f64 * 1.7).sin() + if step == 37 { 2.5 } else { 0.0 },
        num_tokens: 1600 * step,
        tokens_per_s: 412.0 + 20.0 * (step as f64 * 0.61).sin(),
        elapsed_s: 0.46 * step as f64,
        rss_bytes: 1_900_000_000 + step,
    }
}

/// A whole report of a run as it may be.
fn example() -> RunReport {
    let noise = |step: u64| 0.09 * (step as f64 * 2.3).sin() + 0.06 * (step as f64 * 0.77).cos();
    let mut metrics = vec![MetricRecord::Note { step: 0, message: "started on 2 CPU threads".into() }];
    for step in 1..=400 {
        metrics.push(train(step, 2.95 + 0.85 * (-(step as f64) / 60.0).exp() + noise(step)));
        if step % 50 == 0 {
            let eval_loss = 3.02 + 0.7 * (-(step as f64) / 70.0).exp();
            metrics.push(MetricRecord::Eval {
                step,
                epoch: step as f64 / 200.0,
                eval_loss,
                eval_perplexity: eval_loss.exp(),
                num_tokens: 20_480,
            });
        }
        if step % 200 == 0 {
            metrics.push(MetricRecord::Sample {
                step,
                prompt: "ROMEO:".into(),
                text: "What light is this that breaks upon the wall?\nIt is the morn.".into(),
            });
            metrics.push(MetricRecord::Note { step, message: format!("saved checkpoints/step-{step}") });
        }
    }
    let document = |i: u64, mean: f64| DocumentLoss {
        loss_sum: (500 + i) as f64 * (mean + 0.3 * (i as f64 * 1.3).sin()),
        num_tokens: 500 + i,
        num_bytes: 2000 + 4 * i,
    };
    let base: Vec<_> = (0..120).map(|i| document(i, 3.78)).collect();
    let tuned: Vec<_> = (0..120).map(|i| document(i, 3.11 + 0.05 * (i as f64 * 0.7).cos())).collect();
    let split = |split: &str, num_rows, num_tokens| SplitCounts {
        split: split.into(),
        num_rows,
        num_tokens,
        num_trained_tokens: num_tokens - num_rows,
        num_blocks: num_tokens / 512,
        num_too_long: num_rows / 9,
    };
    RunReport {
        title: "smollm2-135m-instruct on Shakespeare's plays".into(),
        subtitle: "Finished 400 of 400 steps".into(),
        warnings: vec!["12 rows were longer than the context of 512 tokens and were split.".into()],
        metrics,
        compared_on: "Test split (hamlet, macbeth, tempest)".into(),
        comparison: Some(compare(&base, &tuned, &Bootstrap::default()).unwrap()),
        samples: vec![
            SamplePair {
                prompt: "HAMLET:\nTo be, or not to be,".into(),
                base: Some(
                    "that is the question. The phrase is from the play Hamlet, and it is one of the most famous \
                            lines in English literature."
                        .into(),
                ),
                tuned: "that is the point I stand upon:\nWhether the night be long, or longer yet\nThe sorrow that it \
                        brings. Good friends, away."
                    .into(),
            },
            SamplePair {
                prompt: "Show <script>alert('x')</script> & \"quotes\"".into(),
                base: Some("<script src=//evil.example/x.js></script>".into()),
                tuned: "<img src=x onerror=alert(1)>".into(),
            },
        ],
        data: vec![split("train", 1034, 1_121_344), split("validation", 54, 58_233), split("test", 120, 67_140)],
        model: Some(ModelFacts {
            name: "smollm2-135m-instruct".into(),
            origin: "hf:HuggingFaceTB/SmolLM2-135M-Instruct@7e27bd9f95328f0f3b08261d1252705110c806f8".into(),
            num_parameters: 134_515_008,
            num_trained_parameters: 4_884_480,
            method: "LoRA, rank 16, alpha 32, all seven linear layers".into(),
        }),
        config: "model = \"smollm2-135m-instruct\"\nlearning_rate = 2e-4\n\n[lora]\nr = 16\nlora_alpha = 32\n".into(),
        provenance: vec![
            ("tunesmith".into(), "0.1.0".into()),
            ("data sha256".into(), "9f2c1e6ab0c44f1d7f6f0f0d8e3b0a7744b2e0f3c1d2e4a5968778695a4b3c2d".into()),
        ],
    }
}

#[test]
fn every_part_is_there() {
    let page = render(&example()).unwrap();
    for part in [
        "<title>smollm2-135m-instruct on Shakespeare&#39;s plays</title>",
        "Finished 400 of 400 steps",
        "longer than the context",
        "class=\"verdict better\"",
        "The fine-tuned model is better",
        "120 documents",
        "<h3>Perplexity",
        "<h3>Bits per byte",
        "Median tokens/s",
        "<h3>Loss</h3>",
        "<h3>Learning rate</h3>",
        "<h3>Gradient norm</h3>",
        "<h3>Speed</h3>",
        ">validation<",
        "nats per token",
        "that is the point I stand upon:\n",
        "1,121,344",
        "4,884,480 (4.88 M), 3.6 % of the model",
        "[lora]",
        "Samples while training",
        "saved checkpoints/step-400",
        "data sha256",
    ] {
        assert!(page.contains(part), "{part:?} is missing");
    }
    assert_eq!(page.matches("<svg ").count(), 4);
    assert_eq!(page.matches("<article").count(), page.matches("</article>").count());
    assert_eq!(page.matches("<div").count(), page.matches("</div>").count());
    assert_eq!(page.matches("<details").count(), page.matches("</details>").count());
}

#[test]
fn text_cannot_become_markup_and_nothing_is_loaded() {
    let hostile = "<script>alert(1)</script>\"'&";
    let mut report = example();
    report.title = hostile.into();
    report.subtitle = hostile.into();
    report.warnings = vec![hostile.into()];
    report.compared_on = hostile.into();
    report.config = hostile.into();
    report.provenance = vec![(hostile.into(), hostile.into())];
    report.data[0].split = hostile.into();
    report.model = Some(ModelFacts {
        name: hostile.into(),
        origin: hostile.into(),
        method: hostile.into(),
        ..ModelFacts::default()
    });
    report.metrics.push(MetricRecord::Sample { step: 1, prompt: hostile.into(), text: hostile.into() });
    report.metrics.push(MetricRecord::Note { step: 1, message: hostile.into() });
    let page = render(&report).unwrap();
    assert!(!page.contains("<script") && !page.contains("<img"));
    assert!(page.matches("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;").count() >= 14);
    // Addresses appear nowhere but as the name space of SVG.
    let page = page.replace("http://www.w3.org/2000/svg", "");
    for part in ["http://", "https://", "url(", "@import", " src=\"", "<iframe"] {
        assert!(!page.contains(part), "{part}");
    }
}

#[test]
fn missing_parts_leave_no_trace() {
    let page = render(&RunReport::default()).unwrap();
    assert!(page.contains("<h1>Fine-tuning report</h1>") && page.contains("Nothing has been measured"));
    let body = &page[page.find("<body>").unwrap()..];
    for part in ["<h2>", "<svg", "<table", "<details", "remarks", "verdict"] {
        assert!(!body.contains(part), "{part}");
    }
    // Training without validation, evaluation without training.
    let training = RunReport { metrics: vec![train(1, f64::NAN), train(2, 3.0)], ..RunReport::default() };
    let page = render(&training).unwrap();
    assert!(page.contains("<h3>Loss</h3>") && !page.contains(">validation<") && !page.contains("NaN"));
    let evaluation = RunReport { metrics: vec![], ..example() };
    let page = render(&evaluation).unwrap();
    assert!(page.contains("class=\"verdict better\"") && !page.contains("<svg") && !page.contains("Nothing has been"));
}

#[test]
fn verdicts_without_an_interval_and_tuned_samples_alone_are_shown() {
    let row = DocumentLoss { loss_sum: 30.0, num_tokens: 10, num_bytes: 0 };
    let report = RunReport {
        comparison: Some(compare(&[row], &[row], &Bootstrap::default()).unwrap()),
        samples: vec![SamplePair { prompt: "Hi".into(), base: None, tuned: String::new() }],
        ..RunReport::default()
    };
    let page = render(&report).unwrap();
    assert!(page.contains("verdict too-few") && page.contains("Too few held-out documents"));
    assert!(!page.contains("Bits per byte") && !page.contains(">Base</p>"));
    assert!(page.contains("(empty)"));
}

#[test]
fn long_runs_make_a_page_of_bounded_size() {
    let metrics = (1..=100_000).map(|step| train(step, 3.0 + (step as f64).sin())).collect();
    let page = render(&RunReport { metrics, ..RunReport::default() }).unwrap();
    assert!(page.len() < 300_000, "{} bytes", page.len());
}

#[test]
fn the_page_is_written_as_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.html");
    write(&path, &example()).unwrap();
    write(&path, &example()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), render(&example()).unwrap());
}
