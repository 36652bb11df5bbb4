//! CUDA graphs: work that is captured once and replayed.
//!
//! A pass of generation launches hundreds of small kernels, each through the driver. Captured, they are one launch. A
//! graph has the addresses of all memory that it uses; what was allocated during capture stays its own.

use super::error::Error;
use super::gpu::{Gpu, backend};
use super::work::locked;
use crate::device::Device;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A captured graph that is ready to run.
struct Graph {
    gpu: Arc<Gpu>,
    handle: u64,
    /// Addresses of the memory that only this graph uses.
    memory: Vec<u64>,
}

impl Gpu {
    /// Captures what `work` launches instead of doing it; `None`, said once, where that cannot be done.
    fn capture(self: &Arc<Self>, work: &mut dyn FnMut()) -> Option<Graph> {
        if self.capture_failed.load(Ordering::Relaxed) || self.failure.get().is_some() {
            return None;
        }
        let captured = backend!(self, begin_capture()).and_then(|()| {
            self.capturing.store(true, Ordering::Relaxed);
            work();
            self.capturing.store(false, Ordering::Relaxed);
            let (ended, memory) = backend!(self, end_capture());
            let failed = locked(&self.capture_error).take();
            match (failed, ended) {
                (None, Ok(handle)) => Ok(Graph { gpu: self.clone(), handle, memory }),
                (failed, ended) => {
                    memory.iter().for_each(|address| backend!(self, free(*address)));
                    if let Ok(handle) = ended {
                        backend!(self, destroy_graph(handle));
                    }
                    Err(failed
                        .or_else(|| ended.err())
                        .unwrap_or(Error::Call { call: "capture".into(), what: "it failed".into() }))
                }
            }
        });
        captured
            .map_err(|e| {
                self.capture_failed.store(true, Ordering::Relaxed);
                backend!(
                    self,
                    note(&format!("work is not captured as CUDA graphs, since {e}; it goes on one kernel at a time"))
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

/// Work that is done again and again, with the graph of its last form.
#[derive(Debug, Default)]
pub struct CapturedGraph {
    key: Vec<u64>,
    graph: Option<Graph>,
}

impl CapturedGraph {
    /// Does `work` on a GPU. Whenever `key` is what it was the time before, `work` must ask for the same kernels at the
    /// same addresses and neither read nor write the device's memory itself: it is captured the second time, and
    /// replayed from then on.
    ///
    /// # Panics
    /// When `device` is the CPU.
    pub fn run(&mut self, device: &Device, key: Vec<u64>, mut work: impl FnMut()) {
        let Some(gpu) = device.gpu() else { panic!("the CPU captures nothing") };
        if self.key != key {
            // The first time whatever is made at first use is made: code is loaded, algorithms are chosen, buffers
            // grow.
            *self = Self { key, graph: None };
            return work();
        }
        if self.graph.is_none() {
            self.graph = gpu.capture(&mut work);
        }
        match &self.graph {
            Some(graph) => {
                gpu.attempt(|| backend!(gpu, run_graph(graph.handle)));
            }
            None => work(),
        }
    }

    /// Whether the work is captured.
    pub fn is_captured(&self) -> bool {
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
    fn a_captured_graph_reads_what_is_there_when_it_is_replayed() {
        for mut lab in labs(41) {
            let [w, first] = [(); 2].map(|()| lab.random(&[8, 8], 1.0));
            let (w, mut x, mut y) = (lab.up(&w), lab.up(&first), Tensor::default());
            let mut captured = CapturedGraph::default();
            let gpu = lab.device.gpu().unwrap().clone();
            let mut asked = 0;
            for round in 0..5 {
                let input = lab.random(&[8, 8], 1.0);
                x.assign(&lab.up(&input));
                let before = gpu.memory().0;
                captured.run(&lab.device, vec![x.address()], || {
                    asked += 1;
                    // Memory that is given back within the work stays the graph's.
                    let mut between = Tensor::default();
                    linear::matmul(&x, &w, 1.0, &mut between, Store::Overwrite);
                    swiglu::forward(&between, &x, &mut y);
                });
                let kept = gpu.memory().0 - before;
                assert_eq!((captured.is_captured(), kept > 0), (round > 0, round < 2), "round {round}: {kept}");
                let (mut product, mut want) = (Tensor::default(), Tensor::default());
                linear::matmul(&x, &w, 1.0, &mut product, Store::Overwrite);
                swiglu::forward(&product, &x, &mut want);
                assert_eq!(y.to_host().data(), want.to_host().data(), "round {round}");
            }
            assert_eq!(asked, 2, "once as it is, once to be captured");
            // Another key is other work; the memory of the graph is given back.
            let before = gpu.memory().0;
            captured.run(&lab.device, vec![0], || y.clear());
            assert!(!captured.is_captured() && gpu.memory().0 < before);
            assert!(y.to_host().data().iter().all(|y| *y == 0.0));
            lab.device.synchronize().unwrap();
        }
    }

    #[test]
    fn what_cannot_be_captured_is_done_as_it_is() {
        let [lab, _] = labs(42);
        let mut y = Tensor::zeros_on(&lab.device, Dtype::F32, &[2]);
        let (mut captured, mut rounds) = (CapturedGraph::default(), 0.0);
        for round in 0..4 {
            captured.run(&lab.device, vec![1], || {
                rounds += 1.0;
                y = Tensor::from_slice(&[2], &[rounds; 2]).to_device(&lab.device, Dtype::F32);
            });
            // The second round was begun twice: to be captured, and then as it is.
            let want = if round == 0 { 1.0 } else { round as f32 + 2.0 };
            assert_eq!((y.to_host().data(), captured.is_captured()), (&[want; 2][..], false));
        }
        let said = lab.device.synchronize().unwrap_err().to_string();
        assert!(said.contains("upload") && said.contains("one kernel at a time"), "{said}");
    }
}
