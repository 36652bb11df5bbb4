//! One block of the model, forward and backward, and the linear layers inside it.

use super::{
    BackwardBuffers, CheapActivations, DOWN, GATE, Gradients, K, LayerActivations, Linear, Llama, Masks, O, Q, UP, V,
};
use crate::adapter::{Adapter, Lora};
use crate::batch::Batch;
use tunesmith_tensor::Tensor;
use tunesmith_tensor::ops::linear::Into::{Accumulate, Overwrite};
use tunesmith_tensor::ops::{attention, dropout, linear, rmsnorm, rope, swiglu};

/// Buffers that the adapter half of a linear layer's backward pass borrows.
struct LinearBuffers<'a> {
    xa: &'a Tensor,
    d_xa: &'a mut Tensor,
    dropped: &'a mut Tensor,
    d_dropped: &'a mut Tensor,
}

/// Buffers that the forward pass of a layer fills.
pub(super) struct ForwardBuffers<'a> {
    pub(super) act: &'a mut LayerActivations,
    pub(super) cheap: &'a mut CheapActivations,
    pub(super) dropped: &'a mut Tensor,
}

/// What the backward pass of a layer starts from.
pub(super) struct KeptActivations<'a> {
    pub(super) x_td: &'a Tensor,
    /// Its gate and up become their gradients.
    pub(super) act: &'a mut LayerActivations,
    pub(super) cheap: &'a CheapActivations,
}

/// A block in one pass: its number, what goes through it and with which adapter.
#[derive(Clone, Copy)]
pub(super) struct LayerPass<'a> {
    pub(super) l: usize,
    pub(super) adapter: Option<&'a Adapter>,
    pub(super) batch: &'a Batch,
    pub(super) angles: &'a rope::Angles,
    pub(super) masks: Option<Masks>,
}

/// What a forward pass through a block is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Its output, and its activations for a backward pass.
    Train,
    /// Its activations a second time, just before the backward pass: the output is known already.
    Recompute,
    /// Its output.
    Infer,
}

/// The dropout mask of one linear layer in one pass, whatever its rate.
#[derive(Clone, Copy)]
struct MaskSource {
    seed: u64,
    stream: u64,
    first_row: u64,
}

/// A linear layer: its number among those of the block, its weights, and what an adapter adds to it in this pass.
struct Adapted<'a> {
    linear: &'a Linear,
    lora: Option<Lora<'a>>,
    mask: Option<MaskSource>,
}

impl MaskSource {
    fn for_rate(self, p: f32) -> Option<dropout::Mask> {
        (p > 0.0).then_some(dropout::Mask { p, seed: self.seed, stream: self.stream, first_row: self.first_row })
    }
}

impl Llama {
    /// Linear layer `i` of a block, with what the adapter adds to it.
    fn adapted<'a>(&'a self, at: LayerPass<'a>, i: usize) -> Adapted<'a> {
        let stream = |m: Masks| m.step << 16 | (at.l * 8 + i) as u64;
        let mask = at.masks.map(|m| MaskSource { seed: m.seed, stream: stream(m), first_row: m.first_token });
        Adapted { linear: &self.layers[at.l].linears[i], lora: at.adapter.and_then(|a| a.pair(at.l, i)), mask }
    }

    /// Takes `stream_td` [T, d] through a block.
    pub(super) fn layer_forward(
        &self,
        at: LayerPass<'_>,
        stream_td: &mut Tensor,
        buffers: ForwardBuffers<'_>,
        purpose: Purpose,
    ) {
        let ForwardBuffers { act, cheap, dropped } = buffers;
        let CheapActivations { normed_td, normed2_td, act_tf } = cheap;
        let (layer, eps) = (&self.layers[at.l], self.config.rms_norm_eps);
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), eps, normed_td, &mut act.rstd1_t);
        let mut apply = |i: usize, x: &Tensor, y: &mut Tensor, into, xa: &mut Tensor| {
            self.linear_forward(self.adapted(at, i), x, y, into, xa, dropped);
        };
        apply(Q, normed_td, &mut act.q_th, Overwrite, &mut act.xa_tr[Q]);
        apply(K, normed_td, &mut act.k_tk, Overwrite, &mut act.xa_tr[K]);
        apply(V, normed_td, &mut act.v_tk, Overwrite, &mut act.xa_tr[V]);
        rope::forward(&mut act.q_th, at.angles);
        rope::forward(&mut act.k_tk, at.angles);
        let segments = &at.batch.segments;
        attention::forward(&act.q_th, &act.k_tk, &act.v_tk, segments, self.heads(), &mut act.o_th, &mut act.lse);
        apply(O, &act.o_th, stream_td, Accumulate, &mut act.xa_tr[O]);
        if purpose != Purpose::Infer {
            act.x2_td.assign(stream_td);
        }
        rmsnorm::forward(stream_td, self.tensor(layer.post_norm), eps, normed2_td, &mut act.rstd2_t);
        apply(GATE, normed2_td, &mut act.gate_tf, Overwrite, &mut act.xa_tr[GATE]);
        apply(UP, normed2_td, &mut act.up_tf, Overwrite, &mut act.xa_tr[UP]);
        swiglu::forward(&act.gate_tf, &act.up_tf, act_tf);
        if purpose != Purpose::Recompute {
            return apply(DOWN, act_tf, stream_td, Accumulate, &mut act.xa_tr[DOWN]);
        }
        adapter_forward(&self.adapted(at, DOWN), act_tf, &mut act.xa_tr[DOWN], dropped);
    }

    /// Outputs of norms and SwiGLU, from what layer `l` has kept.
    pub(super) fn recompute_cheap(
        &self,
        l: usize,
        x_td: &Tensor,
        act: &LayerActivations,
        cheap: &mut CheapActivations,
    ) {
        let layer = &self.layers[l];
        rmsnorm::apply(x_td, self.tensor(layer.input_norm), &act.rstd1_t, &mut cheap.normed_td);
        rmsnorm::apply(&act.x2_td, self.tensor(layer.post_norm), &act.rstd2_t, &mut cheap.normed2_td);
        swiglu::forward(&act.gate_tf, &act.up_tf, &mut cheap.act_tf);
    }

    /// Takes the gradient of the layer's output in `back.d_stream_td` to that of its input, in place.
    pub(super) fn layer_backward(
        &self,
        at: LayerPass<'_>,
        kept: KeptActivations<'_>,
        back: &mut BackwardBuffers,
        dropped: &mut Tensor,
        gradients: &mut Gradients,
    ) {
        let KeptActivations { x_td, act, cheap } = kept;
        let LayerActivations { rstd1_t, q_th, k_tk, v_tk, o_th, lse, x2_td, rstd2_t, gate_tf, up_tf, xa_tr } = act;
        let layer = &self.layers[at.l];
        let (input_norm, post_norm) = (self.tensor(layer.input_norm), self.tensor(layer.post_norm));
        let BackwardBuffers {
            d_stream_td, d_n_td, d_act_tf, d_o_th, d_q_th, d_k_tk, d_v_tk, d_xa_tr, d_dropped, ..
        } = back;
        let mut apply = |i: usize, x: &Tensor, d_y: &Tensor, d_x: &mut Tensor, into, gradients: &mut Gradients| {
            let buffers = LinearBuffers { xa: &xa_tr[i], d_xa: d_xa_tr, dropped, d_dropped };
            self.linear_backward(self.adapted(at, i), x, d_y, d_x, into, buffers, gradients);
        };
        apply(DOWN, &cheap.act_tf, d_stream_td, d_act_tf, Overwrite, gradients);
        swiglu::backward(gate_tf, up_tf, d_act_tf);
        apply(GATE, &cheap.normed2_td, gate_tf, d_n_td, Overwrite, gradients);
        apply(UP, &cheap.normed2_td, up_tf, d_n_td, Accumulate, gradients);
        let d_norm = gradients.model[layer.post_norm].as_mut();
        rmsnorm::backward(x2_td, post_norm, rstd2_t, d_n_td, d_stream_td, d_norm);
        apply(O, o_th, d_stream_td, d_o_th, Overwrite, gradients);
        let segments = &at.batch.segments;
        attention::backward(q_th, k_tk, v_tk, o_th, lse, d_o_th, segments, self.heads(), d_q_th, d_k_tk, d_v_tk);
        rope::backward(d_q_th, at.angles);
        rope::backward(d_k_tk, at.angles);
        apply(Q, &cheap.normed_td, d_q_th, d_n_td, Overwrite, gradients);
        apply(K, &cheap.normed_td, d_k_tk, d_n_td, Accumulate, gradients);
        apply(V, &cheap.normed_td, d_v_tk, d_n_td, Accumulate, gradients);
        let d_norm = gradients.model[layer.input_norm].as_mut();
        rmsnorm::backward(x_td, input_norm, rstd1_t, d_n_td, d_stream_td, d_norm);
    }

    /// y = or += x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ; keeps dropout(x) Aᵀ in `xa_tr`.
    fn linear_forward(
        &self,
        adapted: Adapted<'_>,
        x: &Tensor,
        y: &mut Tensor,
        into: linear::Into,
        xa_tr: &mut Tensor,
        dropped: &mut Tensor,
    ) {
        let weight = self.value(adapted.linear.weight);
        adapter_forward(&adapted, x, xa_tr, dropped);
        match adapted.lora {
            Some(lora) => {
                let adapter = linear::Adapter { inner: xa_tr, outer: lora.b.tensor(), scale: lora.scale };
                linear::forward_adapted(x, weight, adapter, y, into);
            }
            None => linear::forward(x, weight, 1.0, y, into),
        }
        if let Some(bias) = adapted.linear.bias {
            linear::add_bias(self.tensor(bias), y);
        }
    }

    fn linear_backward(
        &self,
        adapted: Adapted<'_>,
        x: &Tensor,
        d_y: &Tensor,
        d_x: &mut Tensor,
        into: linear::Into,
        buffers: LinearBuffers<'_>,
        gradients: &mut Gradients,
    ) {
        let Adapted { linear: layer, lora, mask } = adapted;
        let weight = self.value(layer.weight);
        if let Some(d_w) = gradients.model[layer.weight].as_mut() {
            linear::matmul_weight_gradient(d_y, x, 1.0, d_w);
        }
        if let Some(d_bias) = layer.bias.and_then(|b| gradients.model[b].as_mut()) {
            linear::bias_gradient(d_y, d_bias);
        }
        let Some(lora) = lora else { return linear::input_gradient(d_y, weight, 1.0, d_x, into) };
        let LinearBuffers { xa, d_xa, dropped, d_dropped } = buffers;
        let (a, b) = (lora.a.tensor(), lora.b.tensor());
        linear::matmul_input_gradient(d_y, b, lora.scale, d_xa, Overwrite);
        if let Some(d_b) = gradients.adapter[lora.index + 1].as_mut() {
            linear::matmul_weight_gradient(d_y, xa, lora.scale, d_b);
        }
        let mask = mask.and_then(|m| m.for_rate(lora.dropout));
        if let Some(d_a) = gradients.adapter[lora.index].as_mut() {
            linear::matmul_weight_gradient(d_xa, after_dropout(x, mask, dropped), 1.0, d_a);
        }
        match mask {
            Some(mask) => {
                linear::input_gradient(d_y, weight, 1.0, d_x, into);
                linear::matmul_input_gradient(d_xa, a, 1.0, d_dropped, Overwrite);
                dropout::backward(d_dropped, mask, d_x);
            }
            None => {
                let adapter = linear::Adapter { inner: d_xa, outer: a, scale: 1.0 };
                linear::input_gradient_adapted(d_y, weight, adapter, d_x, into);
            }
        }
    }
}

/// `xa_tr` = dropout(x) Aᵀ of the layer's adapter; nothing where there is none.
fn adapter_forward(adapted: &Adapted<'_>, x: &Tensor, xa_tr: &mut Tensor, dropped: &mut Tensor) {
    let Some(lora) = adapted.lora else { return };
    let mask = adapted.mask.and_then(|m| m.for_rate(lora.dropout));
    linear::matmul(after_dropout(x, mask, dropped), lora.a.tensor(), 1.0, xa_tr, Overwrite);
}

/// `x` after dropout, in `dropped`, where there is a mask.
fn after_dropout<'a>(x: &'a Tensor, mask: Option<dropout::Mask>, dropped: &'a mut Tensor) -> &'a Tensor {
    let Some(mask) = mask else { return x };
    dropout::forward(x, mask, dropped);
    dropped
}
