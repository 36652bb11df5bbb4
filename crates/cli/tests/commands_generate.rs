//! `tunesmith generate` and `tunesmith chat` as a user runs them.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is a test")]

mod tiny;

use serde_json::Value;
use std::ops::ControlFlow;
use tiny::{Ran, refused, run, run_with};
use tunesmith_infer::{Request, Sampler, Sampling, complete};
use tunesmith_model::{Checkpoint, Llama, Storage};
use tunesmith_text::{ChatTemplate, Message, Tokenizer};

const PROMPT: &str = "To be, or not to be";

fn json(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{ran:?}");
    serde_json::from_str(&ran.stdout).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn greedy_is_what_the_engine_computes() {
    for name in ["tiny-llama2", "tiny-llama3"] {
        let model = tiny::model(name);
        let folder = model.path().to_str().unwrap();
        let args = ["generate", "--model", folder, "--max-new-tokens", "40", "--greedy", PROMPT];
        let streamed = run(&args);
        assert_eq!(streamed.code, 0, "{streamed:?}");
        assert_eq!(run(&args).stdout, streamed.stdout);

        let found = json(&run(&[&args[..], &["--json"]].concat()));
        assert_eq!(format!("{}\n", found["text"].as_str().unwrap()), streamed.stdout);

        let tokenizer = Tokenizer::from_folder(model.path()).unwrap();
        let llama = Llama::load(&Checkpoint::open(model.path()).unwrap(), Storage::F32, |_, _| ()).unwrap();
        let prompt = tokenizer.encode(PROMPT, true).unwrap();
        let request = Request::new(&prompt, Sampler::new(Sampling::default()).unwrap(), &[2], 40);
        let want = complete(&llama, vec![request], 1, |_, _| ControlFlow::Continue(())).unwrap().remove(0).ids;
        assert_eq!(ids(&found["ids"]), want);
        assert_eq!(found["prompt"], PROMPT);
        assert_eq!(found["prompt_tokens"], prompt.len());
        assert_eq!(found["new_tokens"], want.len());
        assert_eq!(found["finish_reason"], if want.ends_with(&[2]) { "stop" } else { "length" });
        assert!(found["tokens_per_s"].as_f64().unwrap() > 0.0);
        assert_eq!((&found["model"], &found["adapter"]), (&Value::from(folder), &Value::Null));
        // An embedding may be longer than the vocabulary: ids beyond it stand for no text.
        let known: Vec<u32> = want.iter().copied().filter(|id| (*id as usize) < tokenizer.vocab_size()).collect();
        let whole = tokenizer.decode(&[&prompt[..], &known].concat(), true).unwrap();
        let text = found["text"].as_str().unwrap();
        assert_eq!(whole.replace('\u{fffd}', ""), format!("{PROMPT}{text}").replace('\u{fffd}', ""));
    }
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_printed() {
    let model = tiny::model("tiny-llama2");
    let args = ["generate", "--model", model.path().to_str().unwrap(), "--greedy", "--max-new-tokens", "40", PROMPT];
    let whole = json(&run(&[&args[..], &["--json"]].concat()))["text"].as_str().unwrap().to_owned();
    let characters: Vec<char> = whole.chars().collect();
    let stop: String = characters[8..11].iter().collect();
    let before = &whole[..whole.find(&stop).unwrap()];
    let with_stop = [&args[..], &["--stop", "nowhere in it", "--stop", &stop]].concat();
    assert_eq!(run(&with_stop).stdout, format!("{before}\n"));
    let found = json(&run(&[&with_stop[..], &["--json"]].concat()));
    assert_eq!((&found["text"], &found["finish_reason"]), (&before.into(), &"stop_string".into()));
}

#[test]
fn every_end_token_of_the_generation_config_stops() {
    let model = tiny::model("tiny-llama3");
    let args = ["generate", "--model", model.path().to_str().unwrap(), "--greedy", "--json", PROMPT];
    let free = ids(&json(&run(&args))["ids"]);
    let config = serde_json::json!({"eos_token_id": [7, free[2]]});
    std::fs::write(model.path().join("generation_config.json"), config.to_string()).unwrap();
    let found = json(&run(&args));
    let end = free.iter().position(|id| *id == free[2]).unwrap();
    assert_eq!((ids(&found["ids"]), &found["finish_reason"]), (free[..=end].to_vec(), &"stop".into()));
    std::fs::write(model.path().join("generation_config.json"), r#"{"eos_token_id": [2, "end"]}"#).unwrap();
    refused(&args, 2, "eos_token_id has \"end\"");
}

#[test]
fn a_seed_makes_a_draw_reproducible() {
    let model = tiny::model("tiny-llama3");
    let args = ["generate", "--model", model.path().to_str().unwrap(), "--temperature", "1.2", PROMPT, "--seed"];
    let text = |seed: &str| run(&[&args[..], &[seed]].concat()).stdout;
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
    // The model's own defaults decide when no flag does.
    std::fs::write(model.path().join("generation_config.json"), r#"{"do_sample": true}"#).unwrap();
    let text = |seed: &str| run(&["generate", "--model", args[2], "--seed", seed, PROMPT]).stdout;
    assert_ne!(text("1"), text("2"));
    let greedy = |seed: &str| run(&["generate", "--model", args[2], "--seed", seed, "--greedy", PROMPT]).stdout;
    assert_eq!(greedy("1"), greedy("2"));
}

#[test]
fn standard_input_and_an_adapter() {
    let model = tiny::model("tiny-llama2");
    let folder = model.path().to_str().unwrap();
    let given = run(&["generate", "--model", folder, "--greedy", PROMPT]);
    let read = run_with(&["generate", "--model", folder, "--greedy", "-"], &format!("{PROMPT}\n"));
    assert_eq!((read.code, read.stdout), (0, given.stdout.clone()));
    assert!(given.stderr.contains("tokens/s"), "{given:?}");
    let adapter = tiny::fixture("tiny-llama2/lora_final");
    let found = json(&run(&["generate", "--model", folder, "--adapter", &adapter, "--greedy", "--json", PROMPT]));
    assert_eq!(found["adapter"], adapter);
    assert_ne!(format!("{}\n", found["text"].as_str().unwrap()), given.stdout);
}

#[test]
fn the_chat_template_makes_the_prompt() {
    let model = tiny::model("tiny-llama2");
    let folder = model.path().to_str().unwrap();
    let args =
        ["generate", "--model", folder, "--greedy", "--json", "--chat", "--system", "Be brief.", "Who is there?"];
    let tokenizer = Tokenizer::from_folder(model.path()).unwrap();
    let template = ChatTemplate::of(&tokenizer, None).unwrap().unwrap();
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Who is there?")];
    let rendered = template.render(&messages, true).unwrap();
    assert_eq!(rendered.matches("<|start|>").count(), 3);
    let want = tokenizer.encode(&rendered, false).unwrap();
    assert_eq!(json(&run(&args))["prompt_tokens"], want.len());

    let other = model.path().join("other.jinja");
    std::fs::write(&other, "{{ messages[0]['content'] }}").unwrap();
    let found = json(&run(&[&args[..], &["--chat-template", other.to_str().unwrap()]].concat()));
    assert_eq!(found["prompt_tokens"], tokenizer.encode("Be brief.", false).unwrap().len());

    std::fs::remove_file(model.path().join("chat_template.jinja")).unwrap();
    refused(&args, 2, "no chat template; give one with --chat-template");
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let model = tiny::model("tiny-llama2");
    let folder = model.path().to_str().unwrap();
    refused(&["generate", "--model", "smolm2-135m-instruct", "x"], 2, "nearest known names are smollm2-135m-instruct");
    refused(&["generate", "--model", folder, &"word ".repeat(400)], 2, "only 255 fit into the context");
    refused(&["generate", "--model", folder, ""], 2, "the prompt is empty");
    refused(&["generate", "--model", folder, "--tf32", "x"], 2, "--tf32: the processor's products are exact f32");
    let on_gpu = ["generate", "--model", folder, "--device", "cuda:0", "--tf32", "x"];
    refused(&on_gpu, 2, "--tf32: products in bf16 are not rounded to TF32");
    refused(&["generate", "--model", folder, "--top-p", "1.5", "x"], 2, "top_p = 1.5 is not allowed");
    refused(&["generate", "--model", folder, "--max-new-tokens", "0", "x"], 2, "at least 1");
    refused(&["generate", "--model", folder, "--chat-template", "x.jinja", "x"], 2, "no use without --chat");
    refused(&["generate", "--model", folder, "--chat", "--chat-template", "none.jinja", "x"], 2, "none.jinja");
    refused(&["generate", "--model", folder, "--greedy", "--temperature", "1", "x"], 2, "cannot be used with");
    refused(&["generate", "--model", folder], 2, "PROMPT");
    let other = tiny::fixture("tiny-llama3/lora_start");
    refused(
        &["generate", "--model", folder, "--adapter", &other, "x"],
        2,
        "made for another model: it adapts model.layers.",
    );
}

#[test]
fn a_piped_conversation_keeps_its_turns() {
    let model = tiny::model("tiny-llama2");
    let folder = model.path().to_str().unwrap();
    let args = ["chat", "--model", folder, "--greedy", "--max-new-tokens", "12", "--stop", "\n"];
    let answers = |input: &str| {
        let ran = run_with(&args, input);
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let alone = |question: &str| {
        let ran = run(&[
            "generate",
            "--model",
            folder,
            "--greedy",
            "--max-new-tokens",
            "12",
            "--stop",
            "\n",
            "--chat",
            question,
        ]);
        ran.stdout.trim_end_matches('\n').to_owned()
    };
    let two = answers("Who is there?\n\nNay, answer me.\n");
    assert_eq!(two.len(), 2);
    assert_eq!(two[0], alone("Who is there?"));
    assert_ne!(two[1], alone("Nay, answer me."), "the second answer sees the first turn");
    // What the cache keeps must not show: the same conversation after others gives the same answers.
    assert_eq!(answers("Who is there?\n/reset\nNay, answer me.\n")[1], alone("Nay, answer me."));
    let undone = answers("Who is there?\nWhat?\n/undo\nNay, answer me.\n/exit\nnot read\n");
    assert_eq!((undone.len(), &undone[0], &undone[2]), (3, &two[0], &two[1]));
    let with_system = run(&[
        "generate",
        "--model",
        folder,
        "--greedy",
        "--max-new-tokens",
        "12",
        "--stop",
        "\n",
        "--chat",
        "--system",
        "Be brief.",
        "Who?",
    ]);
    assert_eq!(answers("/system Be brief.\nWho?\n").join("\n") + "\n", with_system.stdout);
}

#[test]
fn a_conversation_outlives_its_context() {
    let model = tiny::model("tiny-llama2");
    let args = ["chat", "--model", model.path().to_str().unwrap(), "--greedy", "--max-new-tokens", "8", "--stop", "\n"];
    let long = format!("{}\n", "word ".repeat(15));
    let ran = run_with(&args, &format!("{}{}/nothing\n/undo\n/help\n", long.repeat(6), "word ".repeat(300) + "\n"));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.stdout.lines().count(), 6, "{ran:?}");
    assert!(
        ran.stderr.contains("the context of 256 tokens is full: the oldest question and answer are forgotten"),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("only 255 fit into the context"), "{ran:?}");
    assert!(ran.stderr.contains("/nothing: no such command") && ran.stderr.contains("/system TEXT"), "{ran:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_at_the_prompt_leaves() {
    use std::io::{BufRead, BufReader, Write};
    let model = tiny::model("tiny-llama2");
    let args = ["chat", "--model", model.path().to_str().unwrap(), "--greedy", "--max-new-tokens", "4", "--stop", "\n"];
    let mut child = tiny::binary().args(args).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // Its answer is the sign that Ctrl-C is listened to and nothing is being generated.
    input.write_all(b"/nothing\n").unwrap();
    let mut said = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("no such command"), "{said}");
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_file_of_prompts_becomes_a_line_for_each() {
    let model = tiny::model("tiny-llama3");
    let folder = model.path().to_str().unwrap();
    let common = ["generate", "--model", folder, "--max-new-tokens", "12"];
    let prompts = ["To be, or not to be", "Nay", "that is the question: whether", "the", "slings and arrows of"];
    let plain = model.path().join("prompts.txt");
    std::fs::write(&plain, prompts.join("\n") + "\n").unwrap();
    let lines = model.path().join("prompts.jsonl");
    let objects = prompts.iter().enumerate().map(|(i, prompt)| match i {
        0 => serde_json::json!(prompt).to_string(),
        _ => serde_json::json!({"prompt": prompt, "id": i}).to_string(),
    });
    std::fs::write(&lines, objects.collect::<Vec<_>>().join("\n")).unwrap();
    for (options, file) in
        [(&["--greedy"][..], &plain), (&["--seed", "3", "--temperature", "0.8", "--stop", "e"], &lines)]
    {
        let args = [&common[..], options, &["--prompts", file.to_str().unwrap(), "--batch", "3"]].concat();
        let ran = run(&args);
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(ran.stderr.contains("5 prompts"), "{}", ran.stderr);
        let found: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(found.len(), 5);
        for (i, (found, prompt)) in found.iter().zip(prompts).enumerate() {
            let seed = (3 + i).to_string();
            let mut options = options.to_vec();
            if let Some(at) = options.iter().position(|option| *option == "--seed") {
                options[at + 1] = &seed;
            }
            let alone = json(&run(&[&common[..], &options, &["--json", prompt]].concat()));
            for field in ["prompt", "text", "ids", "prompt_tokens", "new_tokens", "finish_reason"] {
                assert_eq!(found[field], alone[field], "{field} of {prompt:?}");
            }
        }
    }
}

#[test]
fn files_without_prompts_are_refused() {
    let model = tiny::model("tiny-llama3");
    let folder = model.path().to_str().unwrap().to_owned();
    let refuse = |name: &str, text: &str, said: &str| {
        let file = model.path().join(name);
        std::fs::write(&file, text).unwrap();
        refused(&["generate", "--model", &folder, "--prompts", file.to_str().unwrap()], 2, said);
    };
    refuse("a.txt", "", "there is no prompt");
    refuse("a.txt", "one\n\ntwo", "a.txt:2: the prompt is empty");
    refuse("a.jsonl", "\"one\"\nx", "a.jsonl:2: not JSON");
    refuse("a.jsonl", "{\"text\": \"x\"}", "a.jsonl:1: it must be a string");
    refused(&["generate", "--model", &folder, "--prompts", "p", "x"], 2, "cannot be used with");
    refused(&["generate", "--model", &folder], 2, "<PROMPT>");
    refused(&["generate", "--model", &folder, "--prompts", "p", "--batch", "0"], 2, "at least 1");
}
