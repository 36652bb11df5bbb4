//! However a text is fed to [`Llama::decode`], its logits are those of one pass without a cache.

#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

use std::path::{Path, PathBuf};
use tunesmith_model::{AdapterFile, Batch, Checkpoint, KvCache, Llama, Storage, Workspace};
use tunesmith_tensor::rng::Rng;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
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

/// The logits behind `ids`, fed in parts of these sizes.
fn decoded(llama: &Llama, ids: &[u32], parts: impl IntoIterator<Item = usize>) -> Vec<f32> {
    let mut cache = KvCache::new(&llama.config, ids.len());
    let mut ws = Workspace::default();
    let mut logits = Vec::new();
    for part in parts {
        let start = cache.len();
        logits = llama.decode(&ids[start..start + part], &mut cache, &mut ws).to_vec();
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
    let mut ws = Workspace::default();
    let mut cache = KvCache::half(&llama.config, 300);
    llama.decode(&[&ids[..250], &[7; 50]].concat(), &mut cache, &mut ws);
    cache.truncate(250);
    let again = llama.decode(&ids[250..], &mut cache, &mut ws).to_vec();
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
