//! Work that is recorded once and asked for again as a whole: CUDA graphs.
//!
//! A pass of generation asks for hundreds of small kernels, each with its way through the driver. Recorded, they are one
//! request. A record has the addresses of all memory that it uses; what was allocated while it was made stays its own.

use super::error::Error;
use super::gpu::{Gpu, backend};
use super::work::locked;
use crate::device::Device;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A record.
struct Graph {
    gpu: Arc<Gpu>,
    handle: u64,
    /// Addresses of the memory that only this record uses.
    memory: Vec<u64>,
}

impl Gpu {
    /// Records what `work` asks for instead of doing it; `None`, said once, where that cannot be done.
    fn record_graph(self: &Arc<Self>, work: &mut dyn FnMut()) -> Option<Graph> {
        if self.records_failed.load(Ordering::Relaxed) || self.failure.get().is_some() {
            return None;
        }
        let recorded = backend!(self, begin_record()).and_then(|()| {
            self.records.store(true, Ordering::Relaxed);
            work();
            self.records.store(false, Ordering::Relaxed);
            let (ended, memory) = backend!(self, end_record());
            let failed = locked(&self.record_failure).take();
            match (failed, ended) {
                (None, Ok(handle)) => Ok(Graph { gpu: self.clone(), handle, memory }),
                (failed, ended) => {
                    memory.iter().for_each(|address| backend!(self, free(*address)));
                    if let Ok(handle) = ended {
                        backend!(self, destroy_graph(handle));
                    }
                    Err(failed
                        .or_else(|| ended.err())
                        .unwrap_or(Error::Call { call: "recording".into(), what: "it failed".into() }))
                }
            }
        });
        recorded
            .map_err(|e| {
                self.records_failed.store(true, Ordering::Relaxed);
                backend!(
                    self,
                    note(&format!("work is not recorded as CUDA graphs, since {e}; it goes on one kernel at a time"))
                );
            })
            .ok()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        backend!(self.gpu, destroy_graph(self.handle));
        self.memory.iter().for_each(|address| backend!(self.gpu, free(*address)));
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph({})", self.handle)
    }
}

/// Work that comes again and again, with the record of its last form.
#[derive(Debug, Default)]
pub struct Recorded {
    key: Vec<u64>,
    graph: Option<Graph>,
}

impl Recorded {
    /// Does `work` on a GPU. Whenever `key` is what it was the time before, `work` must ask for the same kernels at the same addresses
    /// and neither read nor write the device's memory itself: it is recorded the second time, and from then on only the record runs.
    ///
    /// # Panics
    /// When `device` is the processor.
    pub fn run(&mut self, device: &Device, key: Vec<u64>, mut work: impl FnMut()) {
        let Some(gpu) = device.gpu() else { panic!("the processor records nothing") };
        if self.key != key {
            // The first time whatever is made at first use is made: code is loaded, algorithms are chosen, buffers grow.
            *self = Self { key, graph: None };
            return work();
        }
        if self.graph.is_none() {
            self.graph = gpu.record_graph(&mut work);
        }
        match &self.graph {
            Some(graph) => {
                gpu.attempt(|| backend!(gpu, run_graph(graph.handle)));
            }
            None => work(),
        }
    }

    /// Whether the work is recorded.
    pub fn is_recorded(&self) -> bool {
        self.graph.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::lab::labs;
    use crate::ops::linear::{self, Store};
    use crate::ops::swiglu;
    use crate::{Dtype, Tensor};

    #[test]
    fn what_is_recorded_is_done_again_with_what_lies_there_then() {
        for mut lab in labs(41) {
            let [w, first] = [(); 2].map(|()| lab.random(&[8, 8], 1.0));
            let (w, mut x, mut y) = (lab.up(&w), lab.up(&first), Tensor::default());
            let mut recorded = Recorded::default();
            let gpu = lab.device.gpu().unwrap().clone();
            let mut asked = 0;
            for round in 0..5 {
                let input = lab.random(&[8, 8], 1.0);
                x.assign(&lab.up(&input));
                let before = gpu.memory().0;
                recorded.run(&lab.device, vec![x.address()], || {
                    asked += 1;
                    // Memory that is given back within the work stays the record's.
                    let mut between = Tensor::default();
                    linear::matmul(&x, &w, 1.0, &mut between, Store::Overwrite);
                    swiglu::forward(&between, &x, &mut y);
                });
                let kept = gpu.memory().0 - before;
                assert_eq!((recorded.is_recorded(), kept > 0), (round > 0, round < 2), "round {round}: {kept}");
                let (mut product, mut want) = (Tensor::default(), Tensor::default());
                linear::matmul(&x, &w, 1.0, &mut product, Store::Overwrite);
                swiglu::forward(&product, &x, &mut want);
                assert_eq!(y.to_host().data(), want.to_host().data(), "round {round}");
            }
            assert_eq!(asked, 2, "once as it is, once to be recorded");
            // Another key is other work; the memory of the record is given back.
            let before = gpu.memory().0;
            recorded.run(&lab.device, vec![0], || y.clear());
            assert!(!recorded.is_recorded() && gpu.memory().0 < before);
            assert!(y.to_host().data().iter().all(|y| *y == 0.0));
            lab.device.synchronize().unwrap();
        }
    }

    #[test]
    fn what_cannot_be_recorded_is_done_without_a_record() {
        let [lab, _] = labs(42);
        let mut y = Tensor::zeros_on(&lab.device, Dtype::F32, &[2]);
        let (mut recorded, mut rounds) = (Recorded::default(), 0.0);
        for round in 0..4 {
            recorded.run(&lab.device, vec![1], || {
                rounds += 1.0;
                y = Tensor::from_slice(&[2], &[rounds; 2]).to_device(&lab.device, Dtype::F32);
            });
            // The second round was begun twice: to be recorded, and then as it is.
            let want = if round == 0 { 1.0 } else { round as f32 + 2.0 };
            assert_eq!((y.to_host().data(), recorded.is_recorded()), (&[want; 2][..], false));
        }
        let said = lab.device.synchronize().unwrap_err().to_string();
        assert!(said.contains("upload") && said.contains("one kernel at a time"), "{said}");
    }
}
