//! Keys and values of several sequences that are continued together.

use crate::{Config, KvCache};
use tunesmith_tensor::ops::attention::{self, Heads, Segment};
use tunesmith_tensor::ops::rows;
use tunesmith_tensor::{Device, Dtype, Tensor};

/// A cache with a number of places; each holds a sequence of up to `capacity` tokens. See [`Llama::feed`](crate::Llama::feed).
#[derive(Debug)]
pub struct Sequences {
    places: Places,
    capacity: usize,
}

#[derive(Debug)]
enum Places {
    Host(Vec<KvCache>),
    Device(DeviceCache),
}

/// Rows [places · capacity, K·D] of keys and values for each layer, in the model's type.
#[derive(Debug)]
struct DeviceCache {
    layers: Vec<(Tensor, Tensor)>,
    lens: Vec<usize>,
    heads: Heads,
}

impl Sequences {
    /// Places on the processor.
    pub(crate) fn on_host(caches: Vec<KvCache>, capacity: usize) -> Self {
        Self { places: Places::Host(caches), capacity }
    }

    /// `places` places on a GPU, whose memory is taken at once.
    pub(crate) fn on_device(device: &Device, dtype: Dtype, config: &Config, places: usize, capacity: usize) -> Self {
        let heads = Heads {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        let rows = || {
            let mut rows = Tensor::default();
            rows.resize_on(device, dtype, &[places * capacity, heads.kv_cols()]);
            rows
        };
        let layers = (0..config.num_hidden_layers).map(|_| (rows(), rows())).collect();
        Self { places: Places::Device(DeviceCache { layers, lens: vec![0; places], heads }), capacity }
    }

    /// Number of places.
    pub fn num_places(&self) -> usize {
        match &self.places {
            Places::Host(caches) => caches.len(),
            Places::Device(cache) => cache.lens.len(),
        }
    }

    /// Tokens that a place has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens of the sequence at `place`.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn len(&self, place: usize) -> usize {
        match &self.places {
            Places::Host(caches) => caches[place].len(),
            Places::Device(cache) => cache.lens[place],
        }
    }

    /// Forgets the sequence at `place`.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn clear(&mut self, place: usize) {
        match &mut self.places {
            Places::Host(caches) => caches[place].truncate(0),
            Places::Device(cache) => cache.lens[place] = 0,
        }
    }

    /// Bytes of memory held for keys and values.
    pub fn bytes(&self) -> usize {
        match &self.places {
            Places::Host(caches) => caches.iter().map(KvCache::bytes).sum(),
            Places::Device(cache) => cache.layers.iter().map(|(k, v)| k.capacity_bytes() + v.capacity_bytes()).sum(),
        }
    }

    /// The caches of the processor; `None` on a GPU.
    pub(crate) fn host_mut(&mut self) -> Option<&mut [KvCache]> {
        match &mut self.places {
            Places::Host(caches) => Some(caches),
            Places::Device(_) => None,
        }
    }

    /// Where new tokens of `parts` (place, how many) go: the rows of the cache, one a token, and the segments of their attention.
    pub(crate) fn layout(&self, parts: &[(usize, usize)]) -> (Vec<u32>, Vec<Segment>) {
        let (mut index, mut segments, mut next) = (Vec::new(), Vec::new(), 0);
        for (place, count) in parts {
            let (start, len) = (place * self.capacity, self.len(*place));
            assert!(len + count <= self.capacity, "a place has room for {} tokens", self.capacity);
            let keys = start..start + len + count;
            index.extend((start + len..keys.end).map(|row| row as u32));
            segments.push(Segment { queries: next..next + count, keys });
            next += count;
        }
        (index, segments)
    }

    /// Writes `k` and `v` [T, K·D] of `layer` to the rows `index` and attends: `o` [T, H·D] for `q` [T, H·D].
    ///
    /// # Panics
    /// When the cache is not on a GPU.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        index: &[u32],
        segments: &[Segment],
        o: &mut Tensor,
    ) {
        let Places::Device(DeviceCache { layers, heads, .. }) = &mut self.places else {
            panic!("the sequences are on the processor");
        };
        let (all_k, all_v) = &mut layers[layer];
        rows::scatter(k, index, all_k);
        rows::scatter(v, index, all_v);
        attention::forward_cached(attention::Qkv { q, k: all_k, v: all_v, segments, heads: *heads }, o);
    }

    /// Keys and values of all layers on a GPU; `None` on the processor.
    pub(crate) fn device_rows(&mut self) -> Option<&mut [(Tensor, Tensor)]> {
        match &mut self.places {
            Places::Host(_) => None,
            Places::Device(cache) => Some(&mut cache.layers),
        }
    }

    /// Counts the new tokens of `parts` (place, how many) on a GPU; caches of the processor count their own.
    pub(crate) fn advance(&mut self, parts: &[(usize, usize)]) {
        if let Places::Device(cache) = &mut self.places {
            parts.iter().for_each(|(place, count)| cache.lens[*place] += count);
        }
    }
}
