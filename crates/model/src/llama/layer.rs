//! One block of the model, forward and backward, and the linear layers inside it.

use super::{
    BackwardBuffers, DOWN, GATE, Gradients, K, LayerActivations, Linear, Llama, Lora, MadeActivations, O, Q, UP, V,
};
use crate::batch::Batch;
use tunesmith_tensor::Tensor;
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
    pub(super) made: &'a mut MadeActivations,
    pub(super) dropped: &'a mut Tensor,
}

/// What the backward pass of a layer starts from.
pub(super) struct KeptActivations<'a> {
    pub(super) x_td: &'a Tensor,
    /// Its gate and up become their gradients.
    pub(super) act: &'a mut LayerActivations,
    pub(super) made: &'a MadeActivations,
}

/// Whether a pass keeps its activations for a backward pass, and which dropout it draws.
#[derive(Clone, Copy)]
pub(super) enum Pass {
    Keep(Option<Masks>),
    /// As `Keep`, made a second time just before the backward pass: the output is known already.
    Again(Option<Masks>),
    Discard,
}

/// The dropout masks of a batch.
#[derive(Clone, Copy)]
pub(super) struct Masks {
    pub(super) seed: u64,
    pub(super) step: u64,
    pub(super) first_token: u64,
}

/// The dropout mask of one linear layer in one pass, whatever its rate.
#[derive(Clone, Copy)]
struct MaskSource {
    seed: u64,
    stream: u64,
    first_row: u64,
}

impl Masks {
    fn of(masks: Option<Self>, layer: usize, linear: usize) -> Option<MaskSource> {
        let stream = |m: Self| m.step << 16 | (layer * 8 + linear) as u64;
        masks.map(|m| MaskSource { seed: m.seed, stream: stream(m), first_row: m.first_token })
    }
}

impl MaskSource {
    fn for_rate(self, p: f32) -> Option<dropout::Mask> {
        (p > 0.0).then_some(dropout::Mask { p, seed: self.seed, stream: self.stream, first_row: self.first_row })
    }
}

impl Llama {
    pub(super) fn layer_forward(
        &self,
        l: usize,
        stream_td: &mut Tensor,
        buffers: ForwardBuffers<'_>,
        angles: &rope::Angles,
        batch: &Batch,
        pass: Pass,
    ) {
        let ForwardBuffers { act, made, dropped } = buffers;
        let MadeActivations { normed_td, normed2_td, act_tf } = made;
        let (layer, eps) = (&self.layers[l], self.config.rms_norm_eps);
        let masks = if let Pass::Keep(masks) | Pass::Again(masks) = pass { masks } else { None };
        rmsnorm::forward(stream_td, self.tensor(layer.input_norm), eps, normed_td, &mut act.rstd1_t);
        let mut apply = |i: usize, x: &Tensor, y: &mut Tensor, into, xa: &mut Tensor| {
            self.linear_forward(&layer.linears[i], x, y, into, xa, Masks::of(masks, l, i), dropped);
        };
        use linear::Store::{Accumulate, Overwrite};
        apply(Q, normed_td, &mut act.q_th, Overwrite, &mut act.xa_tr[Q]);
        apply(K, normed_td, &mut act.k_tk, Overwrite, &mut act.xa_tr[K]);
        apply(V, normed_td, &mut act.v_tk, Overwrite, &mut act.xa_tr[V]);
        rope::forward(&mut act.q_th, angles);
        rope::forward(&mut act.k_tk, angles);
        attention::forward(
            attention::Qkv { q: &act.q_th, k: &act.k_tk, v: &act.v_tk, segments: &batch.segments, heads: self.heads() },
            &mut act.o_th,
            &mut act.lse,
        );
        apply(O, &act.o_th, stream_td, Accumulate, &mut act.xa_tr[O]);
        if !matches!(pass, Pass::Discard) {
            act.x2_td.assign(stream_td);
        }
        rmsnorm::forward(stream_td, self.tensor(layer.post_norm), eps, normed2_td, &mut act.rstd2_t);
        apply(GATE, normed2_td, &mut act.gate_tf, Overwrite, &mut act.xa_tr[GATE]);
        apply(UP, normed2_td, &mut act.up_tf, Overwrite, &mut act.xa_tr[UP]);
        swiglu::forward(&act.gate_tf, &act.up_tf, act_tf);
        if !matches!(pass, Pass::Again(_)) {
            return apply(DOWN, act_tf, stream_td, Accumulate, &mut act.xa_tr[DOWN]);
        }
        self.adapter_forward(&layer.linears[DOWN], act_tf, &mut act.xa_tr[DOWN], Masks::of(masks, l, DOWN), dropped);
    }

    /// Outputs of norms and SwiGLU, from what layer `l` has kept.
    pub(super) fn make_again(&self, l: usize, x_td: &Tensor, act: &LayerActivations, made: &mut MadeActivations) {
        let layer = &self.layers[l];
        rmsnorm::apply(x_td, self.tensor(layer.input_norm), &act.rstd1_t, &mut made.normed_td);
        rmsnorm::apply(&act.x2_td, self.tensor(layer.post_norm), &act.rstd2_t, &mut made.normed2_td);
        swiglu::forward(&act.gate_tf, &act.up_tf, &mut made.act_tf);
    }

    /// Takes the gradient of the layer's output in `back.d_stream_td` to that of its input, in place.
    pub(super) fn layer_backward(
        &self,
        l: usize,
        kept: KeptActivations<'_>,
        batch: &Batch,
        angles: &rope::Angles,
        masks: Option<Masks>,
        back: &mut BackwardBuffers,
        dropped: &mut Tensor,
        gradients: &mut Gradients,
    ) {
        let KeptActivations { x_td, act, made } = kept;
        let LayerActivations { rstd1_t, q_th, k_tk, v_tk, o_th, lse, x2_td, rstd2_t, gate_tf, up_tf, xa_tr } = act;
        let layer = &self.layers[l];
        let (input_norm, post_norm) = (self.tensor(layer.input_norm), self.tensor(layer.post_norm));
        let BackwardBuffers {
            d_stream_td, d_n_td, d_act_tf, d_o_th, d_q_th, d_k_tk, d_v_tk, d_xa_tr, d_dropped, ..
        } = back;
        let mut apply = |i: usize, x: &Tensor, d_y: &Tensor, d_x: &mut Tensor, into, gradients: &mut Gradients| {
            let buffers = LinearBuffers { xa: &xa_tr[i], d_xa: d_xa_tr, dropped, d_dropped };
            self.linear_backward(&layer.linears[i], x, d_y, d_x, into, buffers, Masks::of(masks, l, i), gradients);
        };
        use linear::Store::{Accumulate, Overwrite};
        apply(DOWN, &made.act_tf, d_stream_td, d_act_tf, Overwrite, gradients);
        swiglu::backward(gate_tf, up_tf, d_act_tf);
        apply(GATE, &made.normed2_td, gate_tf, d_n_td, Overwrite, gradients);
        apply(UP, &made.normed2_td, up_tf, d_n_td, Accumulate, gradients);
        let d_norm = gradients.tensors[layer.post_norm].as_mut();
        rmsnorm::backward(x2_td, post_norm, rstd2_t, d_n_td, d_stream_td, d_norm);
        apply(O, o_th, d_stream_td, d_o_th, Overwrite, gradients);
        attention::backward(
            attention::Qkv { q: q_th, k: k_tk, v: v_tk, segments: &batch.segments, heads: self.heads() },
            o_th,
            lse,
            d_o_th,
            [d_q_th, d_k_tk, d_v_tk],
        );
        rope::backward(d_q_th, angles);
        rope::backward(d_k_tk, angles);
        apply(Q, &made.normed_td, d_q_th, d_n_td, Overwrite, gradients);
        apply(K, &made.normed_td, d_k_tk, d_n_td, Accumulate, gradients);
        apply(V, &made.normed_td, d_v_tk, d_n_td, Accumulate, gradients);
        let d_norm = gradients.tensors[layer.input_norm].as_mut();
        rmsnorm::backward(x_td, input_norm, rstd1_t, d_n_td, d_stream_td, d_norm);
    }

    /// y = or += x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ; keeps dropout(x) Aᵀ in `xa_tr`.
    fn linear_forward(
        &self,
        layer: &Linear,
        x: &Tensor,
        y: &mut Tensor,
        into: linear::Store,
        xa_tr: &mut Tensor,
        mask: Option<MaskSource>,
        dropped: &mut Tensor,
    ) {
        let weight = self.value(layer.weight);
        match self.adapter_forward(layer, x, xa_tr, mask, dropped) {
            Some(lora) => {
                let adapter = linear::Adapter { inner: xa_tr, outer: self.tensor(lora.b), scale: lora.scale };
                linear::forward_adapted(x, weight, adapter, y, into);
            }
            None => linear::forward(x, weight, 1.0, y, into),
        }
        if let Some(bias) = layer.bias {
            linear::add_bias(self.tensor(bias), y);
        }
    }

    /// `xa_tr` = dropout(x) Aᵀ of the layer's adapter, which is returned; nothing where there is none.
    fn adapter_forward<'l>(
        &self,
        layer: &'l Linear,
        x: &Tensor,
        xa_tr: &mut Tensor,
        mask: Option<MaskSource>,
        dropped: &mut Tensor,
    ) -> Option<&'l Lora> {
        let lora = layer.lora.as_ref().filter(|_| self.adapter_enabled)?;
        let x = match mask.and_then(|m| m.for_rate(lora.dropout)) {
            Some(mask) => {
                dropout::forward(x, mask, dropped);
                &*dropped
            }
            None => x,
        };
        linear::matmul(x, self.tensor(lora.a), 1.0, xa_tr, linear::Store::Overwrite);
        Some(lora)
    }

    fn linear_backward(
        &self,
        layer: &Linear,
        x: &Tensor,
        d_y: &Tensor,
        d_x: &mut Tensor,
        into: linear::Store,
        buffers: LinearBuffers<'_>,
        mask: Option<MaskSource>,
        gradients: &mut Gradients,
    ) {
        let weight = self.value(layer.weight);
        if let Some(d_w) = gradients.tensors[layer.weight].as_mut() {
            linear::matmul_weight_gradient(d_y, x, 1.0, d_w);
        }
        if let Some(d_bias) = layer.bias.and_then(|b| gradients.tensors[b].as_mut()) {
            linear::bias_gradient(d_y, d_bias);
        }
        let Some(lora) = layer.lora.as_ref().filter(|_| self.adapter_enabled) else {
            return linear::input_gradient(d_y, weight, 1.0, d_x, into);
        };
        let LinearBuffers { xa, d_xa, dropped, d_dropped } = buffers;
        let (a, b) = (self.tensor(lora.a), self.tensor(lora.b));
        linear::matmul_input_gradient(d_y, b, lora.scale, d_xa, linear::Store::Overwrite);
        if let Some(d_b) = gradients.tensors[lora.b].as_mut() {
            linear::matmul_weight_gradient(d_y, xa, lora.scale, d_b);
        }
        let mask = mask.and_then(|m| m.for_rate(lora.dropout));
        if let Some(d_a) = gradients.tensors[lora.a].as_mut() {
            let x = match mask {
                Some(mask) => {
                    dropout::forward(x, mask, dropped);
                    &*dropped
                }
                None => x,
            };
            linear::matmul_weight_gradient(d_xa, x, 1.0, d_a);
        }
        match mask {
            Some(mask) => {
                linear::input_gradient(d_y, weight, 1.0, d_x, into);
                linear::matmul_input_gradient(d_xa, a, 1.0, d_dropped, linear::Store::Overwrite);
                dropout::backward(d_dropped, mask, d_x);
            }
            None => {
                let adapter = linear::Adapter { inner: d_xa, outer: a, scale: 1.0 };
                linear::input_gradient_adapted(d_y, weight, adapter, d_x, into);
            }
        }
    }
}
