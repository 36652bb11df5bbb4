//! However a text is fed to a model, its logits are those of one pass without a cache; and whatever else an engine does, a request
//! becomes what it becomes alone.

#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tunesmith_infer::{Completion, End, Engine, Event, FinishReason, Request, RequestId, Sampler, Sampling, complete};
use tunesmith_model::{AdapterFile, Batch, Checkpoint, InferWorkspace, Llama, Storage, Tokens, Workspace};
use tunesmith_tensor::cuda::Gpu;
use tunesmith_tensor::ops::attention::Heads;
use tunesmith_tensor::rng::Rng;
use tunesmith_tensor::{Device, Dtype, PAGE, PagedCache, Tensor};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(path)
}

/// A tiny model with an adapter on top.
fn model() -> Llama {
    let mut llama = Llama::load(&Checkpoint::open(&fixture("tiny-llama3")).unwrap(), Storage::F32, |_, _| ()).unwrap();
    llama.attach_adapter(AdapterFile::open(&fixture("tiny-llama3/lora_final")).unwrap(), false).unwrap();
    llama
}

fn text(num: usize) -> Vec<u32> {
    let mut rng = Rng::new(8, 0);
    (0..num).map(|_| rng.below(512)).collect()
}

/// The logits after `ids`, fed in parts of these sizes.
fn decoded(llama: &Llama, ids: &[u32], parts: impl IntoIterator<Item = usize>) -> Vec<f32> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE) as u32).rev().collect();
    let (mut cache, mut ws) = (llama.new_cache(pages.len()), InferWorkspace::default());
    let (mut logits, mut past) = (Vec::new(), 0);
    for part in parts {
        let new = Tokens { ids: &ids[past..past + part], past, pages: &pages, logits: true };
        logits = llama.infer(&[new], &mut cache, &mut ws).data().to_vec();
        past += part;
    }
    assert_eq!(past, ids.len());
    logits
}

/// Distance of `a` from `b` in units of `b`.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn parts_do_not_matter() {
    let llama = model();
    let ids = text(600);
    let mut batch = Batch::default();
    batch.push(&ids, &[true; 600]);
    let mut ws = Workspace::default();
    let want = llama.logits(&batch, &mut ws).row(599).to_vec();
    for parts in [vec![600], vec![1; 600], vec![3, 597], vec![512, 4, 84], vec![100, 499, 1], vec![596, 4]] {
        let got = decoded(&llama, &ids, parts.iter().copied());
        let off = difference(&got, &want);
        assert!(off < 1e-5, "{off} with {} parts", parts.len());
    }
}

#[test]
fn a_cache_forgets_and_goes_on() {
    let llama = model();
    let ids = text(300);
    let mut ws = InferWorkspace::default();
    let mut cache = PagedCache::f16(Heads { num_heads: 4, num_kv_heads: 2, head_dim: 16 }, 3, 19);
    let pages: Vec<u32> = (0..19).collect();
    let part = |ids, past| Tokens { ids, past, pages: &pages, logits: true };
    let other = [&ids[..250], &[7; 50]].concat();
    llama.infer(&[part(&other, 0)], &mut cache, &mut ws);
    let again = llama.infer(&[part(&ids[250..], 250)], &mut cache, &mut ws).data().to_vec();
    assert!(difference(&again, &decoded(&llama, &ids, [300])) < 1e-3);
    // Two of k and v, three layers of two heads of 16, 512 tokens in f16.
    assert_eq!(cache.bytes(), 2 * 3 * 32 * 512 * 2);
}

#[test]
fn integers_are_near_and_do_not_depend_on_threads() {
    let exact = model();
    let mut llama = model();
    llama.round_activations();
    let ids = text(200);
    for parts in [vec![200], vec![150, 1, 49], vec![196, 4]] {
        let want = decoded(&exact, &ids, parts.iter().copied());
        let got = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| decoded(&llama, &ids, parts.iter().copied()))
        });
        let off = difference(&got[0], &want);
        assert!(off > 1e-5 && off < 0.03, "{off}");
        assert_eq!(got[0], got[1]);
    }
}

/// Several sequences in one pass, parts of prompts among them: the logits of those that want them.
#[test]
fn parts_of_several_sequences_go_together() {
    let llama = model();
    let (a, b, c) = (text(60), text(33), text(7));
    let mut ws = InferWorkspace::default();
    let mut cache = llama.new_cache(9);
    let pages = [[8, 0, 2, 4], [1, 3, 5, 5], [7, 7, 7, 7]];
    let mut feed = |parts: &[(usize, &[u32], usize, bool)]| {
        let parts: Vec<Tokens<'_>> = parts
            .iter()
            .map(|(i, ids, past, logits)| Tokens { ids, past: *past, pages: &pages[*i], logits: *logits })
            .collect();
        let logits = llama.infer(&parts, &mut cache, &mut ws);
        (0..logits.rows()).map(|row| logits.row(row).to_vec()).collect::<Vec<_>>()
    };
    assert!(feed(&[(0, &a[..40], 0, false), (1, &b[..20], 0, false)]).is_empty());
    let first = feed(&[(1, &b[20..21], 20, true), (0, &a[40..], 40, true), (2, &c[..6], 0, false)]);
    let second = feed(&[(2, &c[6..], 6, true), (1, &b[21..], 21, true)]);
    for (got, ids) in first.iter().chain(&second).zip([&b[..21], &a, &c, &b]) {
        assert!(difference(got, &decoded(&llama, ids, [ids.len()])) < 1e-5);
    }
}

/// Prompts of unequal length, more than go at once.
fn prompts() -> Vec<Vec<u32>> {
    let ids = text(400);
    [0..3, 3..40, 40..41, 41..341, 341..346, 346..400].map(|range: std::ops::Range<usize>| ids[range].to_vec()).to_vec()
}

fn go_on(_: usize, _: u32) -> ControlFlow<End> {
    ControlFlow::Continue(())
}

fn request(prompt: &[u32], options: &Sampling, new: usize) -> Request {
    Request::new(prompt, Sampler::new(options.clone()).unwrap(), &[7], new)
}

/// A request for each of `prompts`, with a seed of its own.
fn requests(prompts: &[Vec<u32>], options: &Sampling, new: usize) -> Vec<Request> {
    let seeded = |i| Sampling { seed: options.seed + i, ..options.clone() };
    prompts.iter().zip(0..).map(|(prompt, i)| request(prompt, &seeded(i), new)).collect()
}

/// What each request becomes on its own.
fn alone(llama: &Llama, requests: Vec<Request>) -> Vec<Completion> {
    requests.into_iter().map(|request| complete(llama, vec![request], 1, go_on).unwrap().remove(0)).collect()
}

fn drawn() -> Sampling {
    Sampling { do_sample: true, top_p: 0.9, repetition_penalty: 1.2, seed: 5, ..Sampling::default() }
}

#[test]
fn prompts_together_become_what_each_becomes_alone() {
    let prompts = prompts();
    for (mut llama, rounds) in [(model(), false), (model(), true)] {
        if rounds {
            llama.round_activations();
        }
        for options in [Sampling::default(), drawn()] {
            let alone = alone(&llama, requests(&prompts, &options, 20));
            // Products of integers with more rows add up in another order, which a rounding of activations may then show.
            for at_once in if rounds { [1, 2, 3] } else { [1, 2, 6] } {
                let mut seen = vec![Vec::new(); 6];
                let on_token = |number: usize, id| {
                    seen[number].push(id);
                    ControlFlow::Continue(())
                };
                let got = complete(&llama, requests(&prompts, &options, 20), at_once, on_token).unwrap();
                assert_eq!(got, alone, "{at_once} at once, integers {rounds}, {options:?}");
                for (seen, Completion { ids, reason }) in seen.iter().zip(&got) {
                    assert_eq!(seen[..], ids[..ids.len() - usize::from(*reason == FinishReason::Stop)]);
                }
            }
        }
    }
}

/// A sampler that has drawn for one text goes on in the next.
#[test]
fn a_random_stream_goes_on() {
    let llama = model();
    let first = complete(&llama, vec![request(&[3, 4], &drawn(), 12)], 1, go_on).unwrap().remove(0);
    let mut rest = request(&[&[3, 4], &first.ids[..5]].concat(), &drawn(), 7);
    rest.sampler.skip(5);
    assert_eq!(complete(&llama, vec![rest], 1, go_on).unwrap()[0].ids, first.ids[5..]);
}

#[test]
fn a_caller_ends_one_sequence_or_all() {
    let (llama, prompts) = (model(), prompts());
    let run = |end: End| {
        let on_token = |number: usize, _| if number == 1 { ControlFlow::Break(end) } else { ControlFlow::Continue(()) };
        let requests: Vec<Request> = prompts
            .iter()
            .map(|prompt| Request::new(prompt, Sampler::new(Sampling::default()).unwrap(), &[], 4))
            .collect();
        let completions = complete(&llama, requests, 2, on_token).unwrap();
        completions.into_iter().map(|c| (c.ids.len(), c.reason)).collect::<Vec<_>>()
    };
    let (length, caller) = ((4, FinishReason::Length), FinishReason::Caller);
    assert_eq!(run(End::This), [length, (1, caller), length, length, length, length]);
    assert_eq!(run(End::All), [(1, caller), (1, caller), (0, caller), (0, caller), (0, caller), (0, caller)]);
}

#[test]
fn prompts_that_cannot_be_continued_are_named() {
    let llama = model();
    let context = llama.config.max_position_embeddings;
    let long = vec![1; context];
    for (bad, said) in
        [(&[][..], "prompt 2: there is nothing"), (&[512][..], "prompt 2: token 512"), (&long, "shorten it")]
    {
        let requests = [&[1][..], bad].map(|prompt| request(prompt, &Sampling::default(), 4));
        let error = complete(&llama, requests.to_vec(), 2, go_on).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let error = Engine::new(&llama, 1, 2).submit(request(&[1; 20], &Sampling::default(), 14)).unwrap_err().to_string();
    assert!(error.contains("needs 3 pages of 16 tokens, and the cache has 2"), "{error}");
    // The context is full with the last token that is not fed.
    let long = vec![request(&long[1..], &Sampling::default(), 9)];
    assert_eq!(complete(&llama, long, 1, go_on).unwrap()[0].ids.len(), 2);
}

/// Steps until nothing is to be done; the ends of requests in their order.
fn finish(engine: &mut Engine<&Llama>) -> Vec<(RequestId, Completion)> {
    let mut ends = Vec::new();
    while !engine.is_idle() {
        for (id, event) in engine.step() {
            match event {
                Event::Token(_) => {}
                Event::Finished(completion) => ends.push((id, completion)),
                Event::Failed(error) => panic!("{error}"),
            }
        }
    }
    ends
}

#[test]
fn requests_come_and_go_and_wait_for_pages() {
    let (llama, prompts) = (model(), prompts());
    let want = alone(&llama, requests(&prompts, &drawn(), 12));
    // Enough for the largest alone: 300 tokens and what follows.
    let mut engine = Engine::new(&llama, 8, 20);
    let mut waiting = requests(&prompts, &drawn(), 12).into_iter();
    let mut ids = Vec::new();
    for request in waiting.by_ref().take(3) {
        ids.push(engine.submit(request).unwrap());
    }
    engine.step();
    assert_eq!(engine.available_pages(), 20 - 1 - 3 - 1);
    for request in waiting {
        ids.push(engine.submit(request).unwrap());
    }
    engine.step();
    assert_eq!(engine.available_pages(), 20 - 1 - 3 - 1, "the fourth needs all, and those after it wait their turn");
    let ends = finish(&mut engine);
    for (id, want) in ids.iter().zip(&want) {
        assert_eq!(&ends.iter().find(|(other, _)| other == id).unwrap().1, want);
    }
    assert_eq!(engine.available_pages(), 20);
    let nothing = engine.submit(request(&[1], &drawn(), 0)).unwrap();
    let none = Completion { ids: vec![], reason: FinishReason::Length };
    assert_eq!(finish(&mut engine), [(nothing, none)]);
}

#[test]
fn cancelled_requests_give_back_their_pages() {
    let (llama, prompts) = (model(), prompts());
    let mut engine = Engine::new(&llama, 2, 40);
    let ids: Vec<RequestId> =
        requests(&prompts, &drawn(), 20).into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let mut tokens = 0;
    for _ in 0..3 {
        tokens += engine.step().iter().filter(|(id, event)| *id == ids[1] && matches!(event, Event::Token(_))).count();
    }
    assert_eq!(engine.cancel(ids[1]).unwrap().len(), tokens);
    assert_eq!(engine.cancel(ids[1]), None);
    assert_eq!(engine.cancel(ids[5]), Some(Vec::new()), "it had not begun");
    let ends: Vec<RequestId> = finish(&mut engine).into_iter().map(|(id, _)| id).collect();
    assert!(ends.len() == 4 && !ends.contains(&ids[1]) && !ends.contains(&ids[5]));
    assert_eq!(engine.available_pages(), 40);
}

#[test]
fn a_common_beginning_goes_through_the_model_once() {
    let llama = model();
    let ids = text(200);
    let after = |rest: &[u32]| request(&[&ids[..150], rest].concat(), &drawn(), 10);
    let mut engine = Engine::new(&llama, 4, 60);
    let same = vec![after(&[1, 2]), after(&[1, 2]), after(&[3]), after(&[])];
    let want = alone(&llama, same.clone());
    for _ in 0..2 {
        let ids: Vec<RequestId> = same.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        engine.step();
        // Nine full pages are shared by all; each has its own for the rest.
        assert_eq!(engine.available_pages(), 60 - 9 - 2 - 2 - 1 - 1);
        let got = finish(&mut engine);
        for (id, want) in ids.iter().zip(&want) {
            assert_eq!(&got.iter().find(|(other, _)| other == id).unwrap().1, want);
        }
    }
    // Another adapter: other keys and values.
    let other = Request { adapter_version: 1, ..after(&[3]) };
    engine.submit(other).unwrap();
    engine.step();
    assert_eq!(engine.available_pages(), 60 - 10);
    // A text that goes on after an answer finds the answer's pages too.
    let answer = finish(&mut engine).remove(0).1.ids;
    let longer = [&ids[..150], &[3], &answer[..], &ids[..30]].concat();
    let more = request(&longer, &drawn(), 10);
    let want = alone(&llama, vec![more.clone()]);
    assert_eq!(engine.complete(vec![Request { adapter_version: 1, ..more }], go_on).unwrap(), want);
}

#[test]
fn long_prompts_hold_nobody_up() {
    let mut llama = model();
    llama.config.max_position_embeddings = 2048;
    let long = text(1900);
    let mut engine = Engine::new(&llama, 3, 300);
    let first = engine.submit(request(&[5], &Sampling::default(), 8)).unwrap();
    engine.step();
    engine.submit(request(&long, &Sampling::default(), 3)).unwrap();
    engine.submit(request(&[6, 7], &Sampling::default(), 3)).unwrap();
    for _ in 0..3 {
        let events = engine.step();
        assert!(events.len() == 1 && events[0].0 == first, "{events:?}");
    }
    let want = alone(&llama, vec![request(&long, &Sampling::default(), 3)]);
    assert!(finish(&mut engine).iter().any(|(_, completion)| *completion == want[0]));
}

#[test]
fn a_device_that_fails_ends_its_requests() {
    let binary = std::env::current_exe().unwrap();
    let device = Device::Cuda(Gpu::emulated(&binary.with_file_name("emulator")).unwrap());
    let mut llama = model();
    llama.move_to(&device, Dtype::F32);
    let mut engine = Engine::new(&llama, 2, 12);
    for prompt in &prompts()[..3] {
        engine.submit(request(prompt, &Sampling::default(), 9)).unwrap();
    }
    assert!(engine.step().iter().all(|(_, event)| matches!(event, Event::Token(_))));
    // No device has as much memory.
    drop(Tensor::zeros_on(&device, Dtype::F32, &[1 << 58]));
    let failed = engine.step();
    assert_eq!(failed.len(), 3);
    for (_, event) in failed {
        let Event::Failed(error) = event else { panic!("{event:?}") };
        assert!(error.to_string().contains("the GPU"), "{error}");
    }
    assert!(engine.is_idle() && engine.available_pages() == 12);
    let error = engine.complete(vec![request(&[1, 2], &Sampling::default(), 4)], go_on).unwrap_err();
    assert!(error.to_string().contains("the GPU"), "{error}");
}
