//! However a text is fed to [`Llama::decode`], its logits are those of one pass without a cache.

#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tunesmith_model::{
    Adapter, AdapterFile, Batch, Checkpoint, End, FinishReason, KvCache, Llama, Sampler, Sampling, Storage, Workspace,
    generate, generate_together,
};
use tunesmith_tensor::rng::Rng;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

/// A tiny model and an adapter of it.
fn model() -> (Llama, Adapter) {
    let mut llama = Llama::load(&Checkpoint::open(&fixture("tiny-llama3")).unwrap(), Storage::F32, |_, _| ()).unwrap();
    let file = AdapterFile::open(&fixture("tiny-llama3/lora_final")).unwrap();
    let adapter = Adapter::open(&mut llama, file, false).unwrap();
    (llama, adapter)
}

fn text(num: usize) -> Vec<u32> {
    let mut rng = Rng::new(8, 0);
    (0..num).map(|_| rng.below(512)).collect()
}

/// The logits behind `ids`, fed in parts of these sizes.
fn decoded((llama, adapter): &(Llama, Adapter), ids: &[u32], parts: impl IntoIterator<Item = usize>) -> Vec<f32> {
    let mut cache = KvCache::new(&llama.config, ids.len());
    let mut ws = Workspace::default();
    let mut logits = Vec::new();
    for part in parts {
        let start = cache.len();
        logits = llama.decode(&ids[start..start + part], Some(adapter), &mut cache, &mut ws).to_vec();
    }
    assert_eq!(cache.len(), ids.len());
    logits
}

/// Distance of `a` from `b` in units of `b`.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn parts_do_not_matter() {
    let model = model();
    let ids = text(600);
    let mut batch = Batch::default();
    batch.push(&ids, &[true; 600]);
    let mut ws = Workspace::default();
    let want = model.0.logits(&batch, Some(&model.1), &mut ws).row(599).to_vec();
    for parts in [vec![600], vec![1; 600], vec![3, 597], vec![512, 4, 84], vec![100, 499, 1], vec![596, 4]] {
        let got = decoded(&model, &ids, parts.iter().copied());
        let off = difference(&got, &want);
        assert!(off < 1e-5, "{off} with {} parts", parts.len());
    }
}

#[test]
fn a_cache_forgets_and_goes_on() {
    let model = model();
    let (llama, adapter) = (&model.0, Some(&model.1));
    let ids = text(300);
    let mut ws = Workspace::default();
    let mut cache = KvCache::half(&llama.config, 300);
    llama.decode(&[&ids[..250], &[7; 50]].concat(), adapter, &mut cache, &mut ws);
    cache.truncate(250);
    let again = llama.decode(&ids[250..], adapter, &mut cache, &mut ws).to_vec();
    assert!(difference(&again, &decoded(&model, &ids, [300])) < 1e-3);
    // Two of k and v, three layers of two heads of 16, 512 tokens in f16.
    assert_eq!(cache.bytes(), 2 * 3 * 32 * 512 * 2);
}

#[test]
fn integers_are_near_and_do_not_depend_on_threads() {
    let exact = model();
    let mut rounded = model();
    rounded.0.round_activations();
    let ids = text(200);
    for parts in [vec![200], vec![150, 1, 49], vec![196, 4]] {
        let want = decoded(&exact, &ids, parts.iter().copied());
        let got = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| decoded(&rounded, &ids, parts.iter().copied()))
        });
        let off = difference(&got[0], &want);
        assert!(off > 1e-5 && off < 0.03, "{off}");
        assert_eq!(got[0], got[1]);
    }
}

/// Prompts of unequal length, more than there are places.
fn prompts() -> Vec<Vec<u32>> {
    let ids = text(400);
    [0..3, 3..40, 40..41, 41..341, 341..346, 346..400].map(|range: std::ops::Range<usize>| ids[range].to_vec()).to_vec()
}

fn samplers(num: usize, options: &Sampling) -> Vec<Sampler> {
    let seeded = |i| Sampler::new(Sampling { seed: options.seed + i as u64, ..options.clone() }).unwrap();
    (0..num).map(seeded).collect()
}

#[test]
fn prompts_together_become_what_each_becomes_alone() {
    let prompts = prompts();
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    for ((mut llama, adapter), rounds) in [(model(), false), (model(), true)] {
        if rounds {
            llama.round_activations();
        }
        for options in [
            Sampling::default(),
            Sampling { do_sample: true, top_p: 0.9, repetition_penalty: 1.2, seed: 5, ..Sampling::default() },
        ] {
            let mut ws = Workspace::default();
            let mut alone = Vec::new();
            for (prompt, sampler) in slices.iter().zip(&mut samplers(6, &options)) {
                let mut cache = llama.new_cache(prompt.len() + 20);
                let go_on = |_| ControlFlow::Continue(());
                alone.push(
                    generate(&llama, Some(&adapter), prompt, &mut cache, sampler, &[7], 20, &mut ws, go_on).unwrap(),
                );
            }
            // Products of integers with more rows add up in another order, which a rounding of activations may then show.
            for places in if rounds { [1, 2, 3] } else { [1, 2, 6] } {
                let mut seen = vec![Vec::new(); 6];
                let on_token = |number: usize, id| {
                    seen[number].push(id);
                    ControlFlow::Continue(())
                };
                let mut samplers = samplers(6, &options);
                let got = generate_together(
                    &llama,
                    Some(&adapter),
                    &slices,
                    &mut samplers,
                    &[7],
                    20,
                    places,
                    &mut ws,
                    on_token,
                );
                let got = got.unwrap();
                assert_eq!(got, alone, "{places} places, integers {rounds}, {options:?}");
                for (seen, (ids, reason)) in seen.iter().zip(&got) {
                    assert_eq!(seen[..], ids[..ids.len() - usize::from(*reason == FinishReason::Stop)]);
                }
            }
        }
    }
}

#[test]
fn a_caller_ends_one_sequence_or_all() {
    let ((llama, adapter), prompts) = (model(), prompts());
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let mut ws = Workspace::default();
    let mut run = |end: End| {
        let mut tokens = 0;
        let on_token = |number: usize, _| {
            tokens += 1;
            if number == 1 { ControlFlow::Break(end) } else { ControlFlow::Continue(()) }
        };
        generate_together(
            &llama,
            Some(&adapter),
            &slices,
            &mut samplers(6, &Sampling::default()),
            &[],
            4,
            2,
            &mut ws,
            on_token,
        )
        .unwrap()
        .into_iter()
        .map(|(ids, reason)| (ids.len(), reason))
        .collect::<Vec<_>>()
    };
    let (length, caller) = ((4, FinishReason::Length), FinishReason::Caller);
    assert_eq!(run(End::This), [length, (1, caller), length, length, length, length]);
    assert_eq!(run(End::All), [(1, caller), (1, caller), (0, caller), (0, caller), (0, caller), (0, caller)]);
}

#[test]
fn prompts_that_cannot_be_continued_are_named() {
    let (llama, _) = model();
    let context = llama.config.max_position_embeddings;
    let long = vec![1; context];
    for (bad, said) in
        [(&[][..], "prompt 2: there is nothing"), (&[512][..], "prompt 2: token 512"), (&long, "shorten it")]
    {
        let mut samplers = samplers(2, &Sampling::default());
        let go_on = |_, _| ControlFlow::Continue(());
        let error =
            generate_together(&llama, None, &[&[1], bad], &mut samplers, &[], 4, 2, &mut Workspace::default(), go_on);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
