//! One new token of each of several sequences on a GPU: its key and value go to a row of the cache, and it attends to
//! the rows of its sequence. Which rows these are lies at one address from token to token, so that a pass can be
//! captured ([`crate::CapturedGraph`]).

use crate::contract::{Heads, Segment};
use crate::cuda::attention_decode::{self, Seen};
use crate::cuda::gpu::Buffer;
use crate::cuda::rows;
use crate::tensor::Tensor;

/// Cache slot (a row) of each new token, and what it sees.
#[derive(Debug, Default)]
pub struct SlotMapping {
    index: Option<Buffer>,
    seen: Option<Seen>,
}

impl SlotMapping {
    /// Sets the slots `index` [T] of the cache that the new tokens take and the `segments` of their attention, where
    /// `like` is; says whether there is a kernel for them ([`crate::ops::attention::forward_cached`] takes the others).
    ///
    /// # Panics
    /// When `like` is on the CPU.
    pub fn set(&mut self, like: &Tensor, index: &[u32], segments: &[Segment], heads: Heads) -> bool {
        let Some(gpu) = like.gpu() else { panic!("{like:?} must be on a GPU") };
        if !attention_decode::takes(segments, heads) {
            return false;
        }
        let bytes = size_of_val(index);
        let memory = self.index.take().filter(|memory| memory.bytes() >= bytes);
        self.index.insert(memory.unwrap_or_else(|| gpu.allocate(bytes))).write(0, bytemuck::cast_slice(index));
        self.seen = Some(Seen::new(gpu, segments, self.seen.take()));
        true
    }

    /// What launches depend on: equal keys, equal launches.
    pub fn key(&self) -> impl Iterator<Item = u64> {
        let index = self.index.as_ref().map(Buffer::address);
        index.into_iter().chain(self.seen.iter().flat_map(Seen::key))
    }

    /// Writes `k` and `v` [T, K·D] to their rows of `all_k` and `all_v` and attends: `o` [T, H·D] for `q` [T, H·D].
    ///
    /// # Panics
    /// When nothing was set, or shapes do not fit.
    pub fn attend(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        (all_k, all_v): (&mut Tensor, &mut Tensor),
        heads: Heads,
        o: &mut Tensor,
    ) {
        let (Some(index), Some(seen), Some(gpu)) = (&self.index, &self.seen, q.gpu()) else {
            panic!("nothing was set")
        };
        assert!(4 * q.rows() <= index.bytes() && k.rows() == q.rows() && v.rows() == q.rows(), "{q:?}, {k:?}, {v:?}");
        for (new, all) in [(k, &*all_k), (v, &*all_v)] {
            assert_eq!(new.cols(), all.cols());
            rows::rows_at(gpu, new, index, new.rows(), all, true);
        }
        attention_decode::attention_over(gpu, q, all_k, all_v, seen, heads, o);
    }
}
