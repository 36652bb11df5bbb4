//! Several sequences in one pass: prompts of unequal length one behind the other, without padding, and one token of each
//! sequence after them, so that weights are read once for all.

use super::decode::Buffers;
use super::{K, Llama, Q, V, Workspace};
use crate::Sequences;
use tunesmith_tensor::ops::attention::Segment;
use tunesmith_tensor::ops::linear::Store::Overwrite;
use tunesmith_tensor::ops::products::{self, Product};
use tunesmith_tensor::ops::{linear, rmsnorm, rope, rows};
use tunesmith_tensor::{Device, Dtype, Tensor, pool, team};

/// Tokens that go through a model on a GPU at once: enough for large products.
pub(crate) const PIECE: usize = 8192;

impl Llama {
    /// An empty cache for `places` sequences of up to `capacity` tokens each, where the model is.
    pub fn new_sequences(&self, places: usize, capacity: usize) -> Sequences {
        match self.device() {
            Device::Cpu => Sequences::on_host((0..places).map(|_| self.new_cache(capacity)).collect(), capacity),
            device => Sequences::on_device(&device, self.dtype(), &self.config, places, capacity),
        }
    }

    /// Puts the tokens of each of `parts` (place, new tokens) behind the sequence at that place and returns the logits [N, V] in
    /// f32 that follow them, a row for each part. They stay where the model is.
    ///
    /// # Panics
    /// When a part is empty, a place occurs twice, or has no room.
    pub fn feed<'w>(
        &self,
        parts: &[(usize, &[u32])],
        sequences: &mut Sequences,
        ws: &'w mut Workspace,
    ) -> &'w mut Tensor {
        assert!(parts.iter().all(|(_, ids)| !ids.is_empty()), "nothing to put behind a sequence");
        assert!((1..parts.len()).all(|i| parts[..i].iter().all(|p| p.0 != parts[i].0)), "a place occurs twice");
        if self.device() != Device::Cpu {
            self.feed_device(parts, sequences, ws);
        } else if parts.iter().all(|(_, ids)| ids.len() == 1) && parts.len() > 1 {
            self.feed_tokens(parts, sequences, ws);
        } else {
            self.feed_one_by_one(parts, sequences, ws);
        }
        &mut ws.logits
    }

    /// On a GPU: in passes of at most [`PIECE`] tokens.
    fn feed_device(&self, parts: &[(usize, &[u32])], sequences: &mut Sequences, ws: &mut Workspace) {
        let mut rest: Vec<(usize, &[u32])> = Vec::with_capacity(parts.len());
        for (place, ids) in parts {
            let mut ids = *ids;
            while ids.len() > PIECE {
                let (piece, behind) = ids.split_at(PIECE);
                self.pass_device(&[(*place, piece)], sequences, &mut ws.generation);
                ids = behind;
            }
            rest.push((*place, ids));
        }
        let groups = groups(&rest);
        if let [group] = groups[..] {
            if group.iter().all(|(_, ids)| ids.len() == 1) && self.feed_recorded(group, sequences, ws) {
                return;
            }
            self.pass_device(group, sequences, &mut ws.generation);
            return linear::logits(&ws.generation.normed_td, self.head_weight(), &mut ws.logits);
        }
        ws.logits.resize_on(&self.device(), Dtype::F32, &[rest.len(), self.config.vocab_size]);
        let (mut some, mut done) = (Tensor::default(), 0);
        for group in groups {
            self.pass_device(group, sequences, &mut ws.generation);
            linear::logits(&ws.generation.normed_td, self.head_weight(), &mut some);
            ws.logits.copy_rows(done, &some, group.len());
            done += group.len();
        }
    }

    /// One pass: leaves the normed output of the last token of each part in `normed_td`.
    fn pass_device(&self, parts: &[(usize, &[u32])], sequences: &mut Sequences, buffers: &mut Buffers) {
        let counts: Vec<(usize, usize)> = parts.iter().map(|(place, ids)| (*place, ids.len())).collect();
        let (index, segments) = sequences.layout(&counts);
        self.embed_parts(parts, sequences, buffers);
        for l in 0..self.layers.len() {
            self.keys_and_values(l, buffers);
            let Buffers { q_th, k_tk, v_tk, o_th, .. } = buffers;
            sequences.attend(l, (&*q_th, &*k_tk, &*v_tk), &index, &segments, o_th);
            if l + 1 == self.layers.len() && index.len() > parts.len() {
                // Behind the last attention only the last token of each part matters.
                let last: Vec<u32> = segments.iter().map(|s| s.queries.end as u32 - 1).collect();
                for x in [&mut buffers.stream_td, &mut buffers.o_th] {
                    rows::gather(x, &last, &mut buffers.normed_td);
                    x.assign(&buffers.normed_td);
                }
            }
            self.finish_layer(l, buffers);
        }
        sequences.advance(&counts);
        let Buffers { stream_td, normed_td, rstd_t, .. } = buffers;
        rmsnorm::forward(stream_td, self.tensor(self.norm), self.config.rms_norm_eps, normed_td, rstd_t);
    }

    /// On a GPU: one token of each sequence up to the logits. Says whether there is a kernel for it.
    fn feed_recorded(&self, parts: &[(usize, &[u32])], sequences: &mut Sequences, ws: &mut Workspace) -> bool {
        let counts: Vec<(usize, usize)> = parts.iter().map(|(place, _)| (*place, 1)).collect();
        let (index, segments) = sequences.layout(&counts);
        self.embed_parts(parts, sequences, &mut ws.generation);
        let Some(rows) = sequences.device_rows() else { return false };
        let done = self.token_pass(&index, &segments, rows, ws);
        if done {
            sequences.advance(&counts);
        }
        done
    }

    /// One embedded token of each sequence on a GPU, whose keys and values go to the rows `index` of `cache`, up to the logits: recorded
    /// when it comes again. Says whether there is a kernel for it.
    pub(super) fn token_pass(
        &self,
        index: &[u32],
        segments: &[Segment],
        cache: &mut [(Tensor, Tensor)],
        ws: &mut Workspace,
    ) -> bool {
        let Workspace { generation: buffers, logits, .. } = ws;
        let mut places = std::mem::take(&mut buffers.places);
        let taken = places.set(&buffers.stream_td, index, segments, self.heads());
        if taken {
            // Everything that launches depend on: what is computed, and where everything is.
            let weights = self.parameters.iter().map(|p| p.value.address());
            let mut key: Vec<u64> = [index.len() as u64, self.adapter_enabled.into(), logits.address()].into();
            key.extend(places.key().chain(buffers.addresses()).chain(weights));
            key.extend(cache.iter().flat_map(|(k, v)| [k.address(), v.address()]));
            let mut recorded = std::mem::take(&mut buffers.recorded);
            recorded.run(&self.device(), key, || {
                for (l, (all_k, all_v)) in cache.iter_mut().enumerate() {
                    self.keys_and_values(l, buffers);
                    let Buffers { q_th, k_tk, v_tk, o_th, .. } = &mut *buffers;
                    places.attend((&*q_th, &*k_tk, &*v_tk), (all_k, all_v), self.heads(), o_th);
                    self.finish_layer(l, buffers);
                }
                let Buffers { stream_td, normed_td, rstd_t, .. } = &mut *buffers;
                rmsnorm::forward(stream_td, self.tensor(self.norm), self.config.rms_norm_eps, normed_td, rstd_t);
                linear::logits(normed_td, self.head_weight(), logits);
            });
            // A record changes no shape, and another pass may have been in between.
            logits.resize_on(&self.device(), Dtype::F32, &[index.len(), self.config.vocab_size]);
            buffers.recorded = recorded;
        }
        buffers.places = places;
        taken
    }

    /// On the processor: one token of each sequence, all in one pass.
    fn feed_tokens(&self, parts: &[(usize, &[u32])], sequences: &mut Sequences, ws: &mut Workspace) {
        let (buffers, logits) = (&mut ws.generation, &mut ws.logits);
        self.embed_parts(parts, sequences, buffers);
        let Some(caches) = sequences.host_mut() else { panic!("the sequences are on a GPU") };
        let mut pass = || {
            let [mut q, mut k, mut v, mut o] = [(); 4].map(|()| Tensor::default());
            for l in 0..self.layers.len() {
                self.keys_and_values(l, buffers);
                let Buffers { q_th, k_tk, v_tk, o_th, attention, .. } = buffers;
                o_th.resize(q_th.shape());
                for (i, (place, _)) in parts.iter().enumerate() {
                    for (one, all) in [(&mut q, &*q_th), (&mut k, &*k_tk), (&mut v, &*v_tk)] {
                        one.resize(&[1, all.cols()]);
                        one.data_mut().copy_from_slice(all.row(i));
                    }
                    let cache = &mut caches[*place];
                    cache.write(l, &k, &v);
                    cache.attend(l, &q, cache.len() + 1, &mut o, attention);
                    o_th.row_mut(i).copy_from_slice(o.data());
                }
                self.finish_layer(l, buffers);
            }
            let Buffers { stream_td, normed_td, rstd_t, rounded, .. } = buffers;
            rmsnorm::forward(stream_td, self.tensor(self.norm), self.config.rms_norm_eps, normed_td, rstd_t);
            let product = Product { x: normed_td, weight: self.head_weight(), alpha: 1.0, y: logits, store: Overwrite };
            products::forward(&mut [product], rounded);
        };
        if products::are_few(parts.len()) {
            team::scope(&mut pass)
        } else {
            pool::enter(&mut pass)
        }
        parts.iter().for_each(|(place, _)| caches[*place].advance(1));
    }

    /// On the processor: each part on its own.
    fn feed_one_by_one(&self, parts: &[(usize, &[u32])], sequences: &mut Sequences, ws: &mut Workspace) {
        let Some(caches) = sequences.host_mut() else { panic!("the sequences are on a GPU") };
        let mut all = Tensor::zeros(&[parts.len(), self.config.vocab_size]);
        for (i, (place, ids)) in parts.iter().enumerate() {
            self.decode_logits(ids, &mut caches[*place], ws);
            all.row_mut(i).copy_from_slice(ws.logits.data());
        }
        ws.logits.assign(&all);
    }

    /// Embeds all new tokens and fills the angles of their positions.
    fn embed_parts(&self, parts: &[(usize, &[u32])], sequences: &Sequences, buffers: &mut Buffers) {
        let ids: Vec<u32> = parts.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        let positions = parts.iter().flat_map(|(place, ids)| {
            let first = sequences.len(*place) as u32;
            first..first + ids.len() as u32
        });
        self.embed_tokens(&ids, positions, buffers);
    }

    /// q, k and v of layer `l`, turned.
    fn keys_and_values(&self, l: usize, buffers: &mut Buffers) {
        let Buffers { stream_td, normed_td, rstd_t, q_th, k_tk, v_tk, xa_tr, rounded, angles, .. } = buffers;
        let layer = &self.layers[l];
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), self.config.rms_norm_eps, normed_td, rstd_t);
        self.products(layer, normed_td, &mut [(Q, q_th), (K, k_tk), (V, v_tk)], Overwrite, xa_tr, rounded);
        rope::forward(q_th, angles);
        rope::forward(k_tk, angles);
    }
}

/// `parts` in order, in groups of at most [`PIECE`] tokens.
fn groups<'p, 'i>(parts: &'p [(usize, &'i [u32])]) -> Vec<&'p [(usize, &'i [u32])]> {
    let (mut groups, mut start, mut filled) = (Vec::new(), 0, 0);
    for (i, (_, ids)) in parts.iter().enumerate() {
        if i > start && filled + ids.len() > PIECE {
            groups.push(&parts[start..i]);
            (start, filled) = (i, 0);
        }
        filled += ids.len();
    }
    groups.push(&parts[start..]);
    groups
}
