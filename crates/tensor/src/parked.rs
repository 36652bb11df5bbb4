//! Activations of a GPU that wait in the processor's memory between the forward and the backward pass.

use crate::cuda::offload::{Event, HostBuffer};
use crate::tensor::Tensor;

/// Tensors under numbers, put in ascending order and taken out in descending order. Two at a time are on the GPU, one with an even and
/// one with an odd number: while the device works with one, the other is on its way.
#[derive(Debug, Default)]
pub struct Parked {
    places: [Place; 2],
    waiting: Vec<Waiting>,
}

/// Where tensors are on the GPU.
#[derive(Debug, Default)]
struct Place {
    tensor: Tensor,
    /// Number of the tensor that is here.
    holds: Option<usize>,
    under_way: Option<Way>,
    /// Is reached when the last copy from or to here is done.
    copied: Option<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

/// A tensor in the processor's memory.
#[derive(Debug)]
struct Waiting {
    memory: HostBuffer,
    shape: Vec<usize>,
}

impl Parked {
    /// Keeps a copy of `x` under number `i`.
    ///
    /// # Panics
    /// When `x` is on the processor, or the tensor before it was never put.
    pub fn put(&mut self, i: usize, x: &Tensor) {
        let Some(gpu) = x.gpu() else { panic!("{x:?} must be on a GPU") };
        assert!(i <= self.waiting.len(), "number {i} behind {} others", self.waiting.len());
        let bytes = x.len() * x.dtype().bytes();
        if i == self.waiting.len() {
            self.waiting.push(Waiting { memory: gpu.allocate_host(bytes), shape: Vec::new() });
        }
        let place = &mut self.places[i % 2];
        place.settle();
        place.tensor.assign(x);
        place.holds = Some(i);
        let Waiting { memory, shape } = &mut self.waiting[i];
        if memory.bytes() < bytes {
            *memory = gpu.allocate_host(bytes);
        }
        shape.clear();
        shape.extend_from_slice(x.shape());
        memory.copy_out(0, place.tensor.device_buffer(), 0, bytes);
        place.copied.get_or_insert_with(|| gpu.event()).record();
        place.under_way = Some(Way::Out);
    }

    /// Begins to bring tensor `i` back, unless it is there: beside the work that is asked for next.
    ///
    /// # Panics
    /// When it was never put.
    pub fn fetch(&mut self, i: usize) {
        let place = &mut self.places[i % 2];
        if place.holds == Some(i) {
            return;
        }
        place.settle();
        let Waiting { memory, shape } = &self.waiting[i];
        place.tensor.resize(shape);
        memory.copy_in(0, place.tensor.device_buffer(), 0, place.tensor.len() * place.tensor.dtype().bytes());
        if let Some(event) = &place.copied {
            event.record();
        }
        (place.holds, place.under_way) = (Some(i), Some(Way::In));
    }

    /// Tensor `i`: what is asked for next waits until it is there.
    ///
    /// # Panics
    /// When it was never put.
    pub fn get(&mut self, i: usize) -> &Tensor {
        self.fetch(i);
        let place = &mut self.places[i % 2];
        if place.under_way == Some(Way::In) {
            place.settle();
        }
        &place.tensor
    }

    /// Bytes on the GPU.
    pub fn num_bytes(&self) -> usize {
        self.places.iter().map(|place| place.tensor.capacity_bytes()).sum()
    }
}

impl Place {
    /// What is asked for next waits for the copy from or to here.
    fn settle(&mut self) {
        if self.under_way.take().is_some()
            && let Some(event) = &self.copied
        {
            event.wait();
        }
    }
}

impl Drop for Place {
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
            let mut parked = Parked::default();
            // The second time is longer, the third shorter; numbers are an even and an odd count.
            for (count, rows) in [(5, 3), (4, 7), (6, 2), (1, 2)] {
                let tensors: Vec<Tensor> = (0..count).map(|_| lab.random(&[rows, 8], 1.0)).collect();
                let mut stream = Tensor::default();
                for (i, x) in tensors.iter().enumerate() {
                    stream.assign(&lab.up(x));
                    parked.put(i, &stream);
                }
                for (i, x) in tensors.iter().enumerate().rev() {
                    lab.close("parked", parked.get(i), x, 0.0);
                    if i >= 2 {
                        parked.fetch(i - 2);
                    }
                }
            }
            let gpu = lab.device.gpu().unwrap().clone();
            let waiting: usize = parked.waiting.iter().map(|w| w.memory.bytes()).sum();
            assert_eq!((gpu.host_memory(), waiting > 0), (waiting, true));
            assert_eq!(parked.num_bytes(), 2 * 7 * 8 * lab.dtype.bytes());
            let x = lab.random(&[2, 8], 1.0);
            parked.put(0, &lab.up(&x));
            drop(parked);
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
