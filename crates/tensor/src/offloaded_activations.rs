//! Activation offloading: inputs of blocks in pinned host memory between the forward and the backward pass.

use crate::cuda::offload::{Event, HostBuffer};
use crate::tensor::Tensor;

/// Tensors under numbers, put in ascending order and taken out in descending order. Two at a time are on the GPU, one
/// with an even and one with an odd number: while the device works with one, the other is on its way.
#[derive(Debug, Default)]
pub struct OffloadedActivations {
    slots: [Slot; 2],
    offloaded: Vec<Offloaded>,
}

/// A tensor on the GPU.
#[derive(Debug, Default)]
struct Slot {
    tensor: Tensor,
    /// Number of the tensor.
    holds: Option<usize>,
    copying: Option<Direction>,
    /// Is reached when the last copy from or to here is done.
    copied: Option<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Out,
    In,
}

/// A tensor in host memory.
#[derive(Debug)]
struct Offloaded {
    memory: HostBuffer,
    shape: Vec<usize>,
}

impl OffloadedActivations {
    /// Keeps a copy of `x` under number `i`.
    ///
    /// # Panics
    /// When `x` is on the CPU, or the tensor before it was never offloaded.
    pub fn put(&mut self, i: usize, x: &Tensor) {
        let Some(gpu) = x.gpu() else { panic!("{x:?} must be on a GPU") };
        assert!(i <= self.offloaded.len(), "number {i} after {} others", self.offloaded.len());
        let bytes = x.len() * x.dtype().bytes();
        if i == self.offloaded.len() {
            self.offloaded.push(Offloaded { memory: gpu.allocate_host(bytes), shape: Vec::new() });
        }
        let slot = &mut self.slots[i % 2];
        slot.settle();
        slot.tensor.assign(x);
        slot.holds = Some(i);
        let Offloaded { memory, shape } = &mut self.offloaded[i];
        if memory.bytes() < bytes {
            *memory = gpu.allocate_host(bytes);
        }
        shape.clear();
        shape.extend_from_slice(x.shape());
        memory.copy_out(0, slot.tensor.device_buffer(), 0, bytes);
        slot.copied.get_or_insert_with(|| gpu.event()).record();
        slot.copying = Some(Direction::Out);
    }

    /// Begins to copy tensor `i` back, unless it is on the GPU: beside the work that is asked for next.
    ///
    /// # Panics
    /// When it was never offloaded.
    pub fn fetch(&mut self, i: usize) {
        let slot = &mut self.slots[i % 2];
        if slot.holds == Some(i) {
            return;
        }
        slot.settle();
        let Offloaded { memory, shape } = &self.offloaded[i];
        slot.tensor.resize(shape);
        memory.copy_in(0, slot.tensor.device_buffer(), 0, slot.tensor.len() * slot.tensor.dtype().bytes());
        if let Some(event) = &slot.copied {
            event.record();
        }
        (slot.holds, slot.copying) = (Some(i), Some(Direction::In));
    }

    /// Tensor `i`: what is asked for next waits until it is there.
    ///
    /// # Panics
    /// When it was never offloaded.
    pub fn get(&mut self, i: usize) -> &Tensor {
        self.fetch(i);
        let slot = &mut self.slots[i % 2];
        if slot.copying == Some(Direction::In) {
            slot.settle();
        }
        &slot.tensor
    }

    /// Bytes on the GPU.
    pub fn num_bytes(&self) -> usize {
        self.slots.iter().map(|slot| slot.tensor.capacity_bytes()).sum()
    }
}

impl Slot {
    /// What is asked for next waits for the copy from or to here.
    fn settle(&mut self) {
        if self.copying.take().is_some()
            && let Some(event) = &self.copied
        {
            event.wait();
        }
    }
}

impl Drop for Slot {
    /// Memory of the GPU that is given back may be used again at once.
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::lab::labs;

    #[test]
    fn what_was_put_comes_back() {
        for mut lab in labs(31) {
            let mut activations = OffloadedActivations::default();
            // The second time is longer, the third shorter; numbers are an even and an odd count.
            for (count, rows) in [(5, 3), (4, 7), (6, 2), (1, 2)] {
                let tensors: Vec<Tensor> = (0..count).map(|_| lab.random(&[rows, 8], 1.0)).collect();
                let mut stream = Tensor::default();
                for (i, x) in tensors.iter().enumerate() {
                    stream.assign(&lab.up(x));
                    activations.put(i, &stream);
                }
                for (i, x) in tensors.iter().enumerate().rev() {
                    lab.close("offloaded", activations.get(i), x, 0.0);
                    if i >= 2 {
                        activations.fetch(i - 2);
                    }
                }
            }
            let gpu = lab.device.gpu().unwrap().clone();
            let offloaded: usize = activations.offloaded.iter().map(|w| w.memory.bytes()).sum();
            assert_eq!((gpu.host_memory(), offloaded > 0), (offloaded, true));
            assert_eq!(activations.num_bytes(), 2 * 7 * 8 * lab.dtype.bytes());
            let x = lab.random(&[2, 8], 1.0);
            activations.put(0, &lab.up(&x));
            drop(activations);
            assert_eq!(gpu.host_memory(), 0);
            lab.device.synchronize().unwrap();
        }
    }

    /// The emulated device is one on which a copy that nobody waits for goes wrong.
    #[test]
    fn copies_must_be_waited_for() {
        let [mut lab, _] = labs(32);
        let [x, y] = [(); 2].map(|()| lab.random(&[4, 8], 1.0));
        let (mut on_device, gpu) = (lab.up(&x), lab.device.gpu().unwrap().clone());
        let memory = gpu.allocate_host(128);
        memory.copy_out(0, on_device.device_buffer(), 0, 128);
        on_device.assign(&lab.up(&y));
        let mut arrived = [0f32; 32];
        memory.read(0, bytemuck::cast_slice_mut(&mut arrived));
        assert_eq!(arrived, y.data(), "what was written meanwhile");
        memory.copy_out(0, on_device.device_buffer(), 0, 128);
        drop(on_device);
        let error = lab.device.synchronize().unwrap_err().to_string();
        assert!(error.contains("128 bytes were given back while they were copied"), "{error}");
    }
}
