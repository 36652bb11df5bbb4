//! Every operation, forward and backward, at the shapes of SmolLM2-135M on 512 tokens (attention also on one document
//! of 2,048), and what generation adds: `cargo bench -p tunesmith-tensor [-- FILTER]`, less than a minute for all.
//!
//! Throughput of products and attention is counted in floating-point operations ("item/s"), that of everything else in
//! bytes read and written. Timings of single operations say where to look; what counts is `tunesmith bench train`.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use half::f16;
use tunesmith_tensor::ops::attention::{Heads, Segment};
use tunesmith_tensor::ops::attention_decode::{Element, KeyValues};
use tunesmith_tensor::ops::linear::{Adapter, Store};
use tunesmith_tensor::ops::{
    adamw, adamw_8bit, attention, attention_decode, dropout, embedding, grad_norm, linear, linear_cross_entropy,
    products, rmsnorm, rope, rows, sample, swiglu,
};
use tunesmith_tensor::packed_int::Int8Rows;
use tunesmith_tensor::quant::{BlockType, dequantize};
use tunesmith_tensor::rng::Rng;
use tunesmith_tensor::{Bytes, Int8Weight, Packed, Tensor, Weight};

/// Tokens.
const T: usize = 512;
/// Hidden size.
const D: usize = 576;
/// Intermediate size.
const F: usize = 1536;
/// Vocabulary.
const V: usize = 49_152;
const HEADS: Heads = Heads { num_heads: 9, num_kv_heads: 3, head_dim: 64 };
/// Rank of an adapter.
const R: usize = 16;

fn main() {
    divan::Divan::default().sample_count(20).max_time(std::time::Duration::from_millis(700)).config_with_args().main();
}

fn random(shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_slice(shape, &Rng::new(n as u64, 0).normals(n, 0.1))
}

/// Ids spread over the vocabulary.
fn ids(n: usize) -> Vec<u32> {
    let mut rng = Rng::new(1, 1);
    (0..n).map(|_| rng.below(V as u32)).collect()
}

/// Bytes of `tensors` tensors of T rows and `cols` columns.
fn bytes(tensors: usize, cols: usize) -> BytesCount {
    BytesCount::new(tensors * T * cols * size_of::<f32>())
}

/// [out, in] of the weights: q and o; k and v; gate and up; down; A and B of an adapter on the MLP.
const LINEAR: [(usize, usize); 6] = [(D, D), (192, D), (F, D), (D, F), (R, D), (F, R)];

#[divan::bench(args = LINEAR)]
fn linear_forward(bencher: Bencher<'_, '_>, (n_out, n_in): (usize, usize)) {
    let (x, w, mut y) = (random(&[T, n_in]), random(&[n_out, n_in]), Tensor::default());
    let flops = ItemsCount::new(2 * T * n_out * n_in);
    bencher.counter(flops).bench_local(|| linear::matmul(black_box(&x), &w, 1.0, &mut y, Store::Overwrite));
}

#[divan::bench(args = LINEAR)]
fn linear_input_gradient(bencher: Bencher<'_, '_>, (n_out, n_in): (usize, usize)) {
    let (d_y, w, mut d_x) = (random(&[T, n_out]), random(&[n_out, n_in]), Tensor::default());
    let flops = ItemsCount::new(2 * T * n_out * n_in);
    let run = || linear::matmul_input_gradient(black_box(&d_y), &w, 1.0, &mut d_x, Store::Overwrite);
    bencher.counter(flops).bench_local(run);
}

#[divan::bench(args = LINEAR)]
fn linear_weight_gradient(bencher: Bencher<'_, '_>, (n_out, n_in): (usize, usize)) {
    let (d_y, x, mut d_w) = (random(&[T, n_out]), random(&[T, n_in]), Tensor::zeros(&[n_out, n_in]));
    let flops = ItemsCount::new(2 * T * n_out * n_in);
    bencher.counter(flops).bench_local(|| linear::matmul_weight_gradient(black_box(&d_y), &x, 1.0, &mut d_w));
}

/// A layer with its adapter's second product: gate or up, and down.
#[divan::bench(args = [(F, D), (D, F)])]
fn linear_forward_adapted(bencher: Bencher<'_, '_>, (n_out, n_in): (usize, usize)) {
    let (x, w, mut y) = (random(&[T, n_in]), Weight::from(random(&[n_out, n_in])), Tensor::default());
    let (inner, outer) = (random(&[T, R]), random(&[n_out, R]));
    let adapter = Adapter { inner: &inner, outer: &outer, scale: 2.0 };
    let flops = ItemsCount::new(2 * T * n_out * (n_in + R));
    bencher
        .counter(flops)
        .bench_local(|| linear::forward_adapted(black_box(&x), &w, adapter, &mut y, Store::Overwrite));
}

#[divan::bench(args = [(F, D), (D, F)])]
fn linear_input_gradient_adapted(bencher: Bencher<'_, '_>, (n_out, n_in): (usize, usize)) {
    let (d_y, w, mut d_x) = (random(&[T, n_out]), Weight::from(random(&[n_out, n_in])), Tensor::default());
    let (inner, outer) = (random(&[T, R]), random(&[R, n_in]));
    let adapter = Adapter { inner: &inner, outer: &outer, scale: 2.0 };
    let flops = ItemsCount::new(2 * T * n_in * (n_out + R));
    let run = || linear::input_gradient_adapted(black_box(&d_y), &w, adapter, &mut d_x, Store::Overwrite);
    bencher.counter(flops).bench_local(run);
}

/// One row of activations: reads the whole weight, as generation does for every token.
#[divan::bench(args = [(D, D), (F, D), (V, D)])]
fn linear_one_row(bencher: Bencher<'_, '_>, (n_out, n_in): (usize, usize)) {
    let (x, w, mut y) = (random(&[1, n_in]), random(&[n_out, n_in]), Tensor::default());
    let read = BytesCount::new(n_out * n_in * size_of::<f32>());
    bencher.counter(read).bench_local(|| linear::matmul(black_box(&x), &w, 1.0, &mut y, Store::Overwrite));
}

#[divan::bench]
fn linear_add_bias(bencher: Bencher<'_, '_>) {
    let (bias, mut y) = (random(&[D]), random(&[T, D]));
    bencher.counter(bytes(2, D)).bench_local(|| linear::add_bias(black_box(&bias), &mut y));
}

#[divan::bench]
fn linear_bias_gradient(bencher: Bencher<'_, '_>) {
    let (d_y, mut d_bias) = (random(&[T, D]), random(&[D]));
    bencher.counter(bytes(1, D)).bench_local(|| linear::bias_gradient(black_box(&d_y), &mut d_bias));
}

/// Lengths of the documents: one of 512 tokens, one of 2,048, sixteen of 32.
const DOCUMENTS: [(usize, usize); 3] = [(1, 512), (1, 2048), (16, 32)];

/// q, k, v and the segments of `num` documents of `length` tokens, and the operations of the forward pass: two products
/// over the visible half of the scores.
fn attention_case(num: usize, length: usize) -> ([Tensor; 3], Vec<Segment>, usize) {
    let rows = num * length;
    let tensors = [HEADS.q_cols(), HEADS.kv_cols(), HEADS.kv_cols()].map(|cols| random(&[rows, cols]));
    let flops = 2 * 2 * HEADS.q_cols() * num * length * (length + 1) / 2;
    (tensors, Segment::documents(&vec![length; num]), flops)
}

#[divan::bench(args = DOCUMENTS)]
fn attention_forward(bencher: Bencher<'_, '_>, (num, length): (usize, usize)) {
    let ([q, k, v], segments, flops) = attention_case(num, length);
    let (mut o, mut lse) = (Tensor::default(), Tensor::default());
    let run = || {
        attention::forward(
            attention::Qkv { q: black_box(&q), k: &k, v: &v, segments: &segments, heads: HEADS },
            &mut o,
            &mut lse,
        )
    };
    bencher.counter(ItemsCount::new(flops)).bench_local(run);
}

/// Five products: the scores again, and the gradients of v, of the probabilities, of q and of k.
#[divan::bench(args = DOCUMENTS)]
fn attention_backward(bencher: Bencher<'_, '_>, (num, length): (usize, usize)) {
    let ([q, k, v], segments, flops) = attention_case(num, length);
    let (mut o, mut lse) = (Tensor::default(), Tensor::default());
    attention::forward(attention::Qkv { q: &q, k: &k, v: &v, segments: &segments, heads: HEADS }, &mut o, &mut lse);
    let d_o = random(q.shape());
    let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Tensor::default());
    bencher.counter(ItemsCount::new(flops / 2 * 5)).bench_local(|| {
        attention::backward(
            attention::Qkv { q: black_box(&q), k: &k, v: &v, segments: &segments, heads: HEADS },
            &o,
            &lse,
            &d_o,
            [&mut d_q, &mut d_k, &mut d_v],
        );
    });
}

/// New tokens of four sequences, each after 512 that are cached.
#[divan::bench(args = [1, 32])]
fn attention_forward_cached(bencher: Bencher<'_, '_>, new: usize) {
    const CACHED: usize = 512;
    let keys = CACHED + new;
    let q = random(&[4 * new, HEADS.q_cols()]);
    let [k, v] = [(); 2].map(|()| random(&[4 * keys, HEADS.kv_cols()]));
    let segments: Vec<Segment> =
        (0..4).map(|i| Segment { queries: i * new..(i + 1) * new, keys: i * keys..(i + 1) * keys }).collect();
    let mut o = Tensor::default();
    let flops = ItemsCount::new(2 * 2 * HEADS.q_cols() * 4 * new * (CACHED + new.div_ceil(2)));
    let run = || {
        attention::forward_cached(
            attention::Qkv { q: black_box(&q), k: &k, v: &v, segments: &segments, heads: HEADS },
            &mut o,
        )
    };
    bencher.counter(flops).bench_local(run);
}

/// Tokens in the cache of one sequence.
const CONTEXT: usize = 4096;

/// One token after [`CONTEXT`] others: reads the cache.
#[divan::bench(types = [f32, f16])]
fn attention_decode_forward<E: Element>(bencher: Bencher<'_, '_>) {
    let [k, v] = [(); 2].map(|()| random(&[CONTEXT, HEADS.kv_cols()]));
    let mut cache = KeyValues::<E>::new(HEADS);
    cache.write(0, &k, &v);
    let (q, mut o, mut scratch) =
        (random(&[1, HEADS.q_cols()]), Tensor::default(), attention_decode::Scratch::default());
    let read = BytesCount::new(2 * CONTEXT * HEADS.kv_cols() * size_of::<E>());
    let run = || attention_decode::forward(black_box(&q), &cache, CONTEXT, &mut o, &mut scratch);
    bencher.counter(read).bench_local(run);
}

#[divan::bench(types = [f32, f16])]
fn attention_decode_write<E: Element>(bencher: Bencher<'_, '_>) {
    let [k, v] = [(); 2].map(|()| random(&[T, HEADS.kv_cols()]));
    let mut cache = KeyValues::<E>::new(HEADS);
    let moved = BytesCount::new(2 * T * HEADS.kv_cols() * (size_of::<f32>() + size_of::<E>()));
    bencher.counter(moved).bench_local(|| cache.write(0, black_box(&k), &v));
}

#[divan::bench(types = [f32, f16])]
fn attention_decode_read<E: Element>(bencher: Bencher<'_, '_>) {
    let [mut k, mut v] = [(); 2].map(|()| random(&[T, HEADS.kv_cols()]));
    let mut cache = KeyValues::<E>::new(HEADS);
    cache.write(0, &k, &v);
    let moved = BytesCount::new(2 * T * HEADS.kv_cols() * (size_of::<f32>() + size_of::<E>()));
    bencher.counter(moved).bench_local(|| black_box(&cache).read(T, &mut k, &mut v));
}

#[divan::bench]
fn rmsnorm_forward(bencher: Bencher<'_, '_>) {
    let (x, weight) = (random(&[T, D]), random(&[D]));
    let (mut y, mut rstd) = (Tensor::default(), Tensor::default());
    bencher.counter(bytes(2, D)).bench_local(|| rmsnorm::forward(black_box(&x), &weight, 1e-5, &mut y, &mut rstd));
}

#[divan::bench]
fn rmsnorm_apply(bencher: Bencher<'_, '_>) {
    let (x, weight) = (random(&[T, D]), random(&[D]));
    let (mut y, mut rstd) = (Tensor::default(), Tensor::default());
    rmsnorm::forward(&x, &weight, 1e-5, &mut y, &mut rstd);
    bencher.counter(bytes(2, D)).bench_local(|| rmsnorm::apply(black_box(&x), &weight, &rstd, &mut y));
}

/// Of the input alone, as with a frozen weight, and of the weight too.
#[divan::bench(args = [false, true])]
fn rmsnorm_backward(bencher: Bencher<'_, '_>, with_weight: bool) {
    let (x, weight, d_y, mut d_x) = (random(&[T, D]), random(&[D]), random(&[T, D]), random(&[T, D]));
    let (mut y, mut rstd, mut d_weight) = (Tensor::default(), Tensor::default(), Tensor::zeros(&[D]));
    rmsnorm::forward(&x, &weight, 1e-5, &mut y, &mut rstd);
    bencher.counter(bytes(4, D)).bench_local(|| {
        let d_weight = with_weight.then_some(&mut d_weight);
        rmsnorm::backward(black_box(&x), &weight, &rstd, &d_y, &mut d_x, d_weight);
    });
}

fn angles() -> rope::Angles {
    let frequencies: Vec<f32> = (0..32).map(|i| 100_000f32.powf(-i as f32 / 32.0)).collect();
    let positions: Vec<u32> = (0..T as u32).collect();
    let mut angles = rope::Angles::default();
    angles.fill(&positions, &frequencies);
    angles
}

#[divan::bench]
fn rope_angles(bencher: Bencher<'_, '_>) {
    bencher.counter(bytes(2, 32)).bench_local(angles);
}

#[divan::bench]
fn rope_forward(bencher: Bencher<'_, '_>) {
    let (mut x, angles) = (random(&[T, HEADS.q_cols()]), angles());
    bencher.counter(bytes(2, HEADS.q_cols())).bench_local(|| rope::forward(black_box(&mut x), &angles));
}

#[divan::bench]
fn rope_backward(bencher: Bencher<'_, '_>) {
    let (mut d_x, angles) = (random(&[T, HEADS.q_cols()]), angles());
    bencher.counter(bytes(2, HEADS.q_cols())).bench_local(|| rope::backward(black_box(&mut d_x), &angles));
}

#[divan::bench]
fn swiglu_forward(bencher: Bencher<'_, '_>) {
    let (gate, up, mut y) = (random(&[T, F]), random(&[T, F]), Tensor::default());
    bencher.counter(bytes(3, F)).bench_local(|| swiglu::forward(black_box(&gate), &up, &mut y));
}

#[divan::bench]
fn swiglu_backward(bencher: Bencher<'_, '_>) {
    let (gate, up, d_y) = (random(&[T, F]), random(&[T, F]), random(&[T, F]));
    let inputs = bencher.counter(bytes(5, F)).with_inputs(|| (gate.clone(), up.clone()));
    inputs.bench_local_refs(|(gate, up)| swiglu::backward(black_box(gate), up, &d_y));
}

const MASK: dropout::Mask = dropout::Mask { p: 0.05, seed: 1, stream: 1, first_row: 0 };

#[divan::bench]
fn dropout_forward(bencher: Bencher<'_, '_>) {
    let (x, mut y) = (random(&[T, D]), Tensor::default());
    bencher.counter(bytes(2, D)).bench_local(|| dropout::forward(black_box(&x), MASK, &mut y));
}

#[divan::bench]
fn dropout_backward(bencher: Bencher<'_, '_>) {
    let (d_y, mut d_x) = (random(&[T, D]), random(&[T, D]));
    bencher.counter(bytes(3, D)).bench_local(|| dropout::backward(black_box(&d_y), MASK, &mut d_x));
}

#[divan::bench]
fn embedding_forward(bencher: Bencher<'_, '_>) {
    let (table, ids, mut x) = (Weight::from(random(&[V, D])), ids(T), Tensor::default());
    bencher.counter(bytes(2, D)).bench_local(|| embedding::forward(black_box(&table), &ids, &mut x));
}

#[divan::bench]
fn embedding_backward(bencher: Bencher<'_, '_>) {
    let (d_x, ids, mut d_table) = (random(&[T, D]), ids(T), random(&[V, D]));
    bencher.counter(bytes(3, D)).bench_local(|| embedding::backward(black_box(&d_x), &ids, &mut d_table));
}

/// Four rows of the table train, and one of eight tokens is among them.
#[divan::bench]
fn embedding_backward_rows(bencher: Bencher<'_, '_>) {
    let (d_x, mut d_rows) = (random(&[T, D]), random(&[4, D]));
    let trained = [V as u32 - 4, V as u32 - 3, V as u32 - 2, V as u32 - 1];
    let ids: Vec<u32> = (0..T).map(|t| if t % 8 == 0 { trained[t / 8 % 4] } else { t as u32 }).collect();
    bencher.counter(bytes(1, D)).bench_local(|| embedding::backward_rows(black_box(&d_x), &ids, &trained, &mut d_rows));
}

/// Every second row, as where half of the tokens carry loss.
fn every_second() -> Vec<u32> {
    (0..T as u32).step_by(2).collect()
}

#[divan::bench]
fn rows_gather(bencher: Bencher<'_, '_>) {
    let (x, index, mut y) = (random(&[T, D]), every_second(), Tensor::default());
    bencher.counter(bytes(1, D)).bench_local(|| rows::gather(black_box(&x), &index, &mut y));
}

/// The backward of [`rows_gather`].
#[divan::bench]
fn rows_scatter(bencher: Bencher<'_, '_>) {
    let (x, index, mut y) = (random(&[T / 2, D]), every_second(), random(&[T, D]));
    bencher.counter(bytes(1, D)).bench_local(|| rows::scatter(black_box(&x), &index, &mut y));
}

#[divan::bench]
fn cross_entropy_forward(bencher: Bencher<'_, '_>) {
    let (h, w, targets) = (random(&[T, D]), Weight::from(random(&[V, D])), ids(T));
    let (mut scratch, mut loss) = (linear_cross_entropy::Scratch::default(), Vec::new());
    let run = || linear_cross_entropy::forward(black_box(&h), &w, &targets, 0.0, &mut scratch, &mut loss);
    bencher.counter(ItemsCount::new(2 * T * D * V)).bench_local(run);
}

/// With a frozen head, and with the gradient of the head.
#[divan::bench(args = [false, true])]
fn cross_entropy_forward_backward(bencher: Bencher<'_, '_>, head_trains: bool) {
    let (h, w, targets) = (random(&[T, D]), Weight::from(random(&[V, D])), ids(T));
    let (mut scratch, mut loss) = (linear_cross_entropy::Scratch::default(), Vec::new());
    let (mut d_h, mut d_w) = (Tensor::default(), Tensor::zeros(&[V, D]));
    let products = if head_trains { 3 } else { 2 };
    bencher.counter(ItemsCount::new(products * 2 * T * D * V)).bench_local(|| {
        let gradients = linear_cross_entropy::Gradients {
            scale: 1e-3,
            weights: None,
            d_h: &mut d_h,
            d_w: head_trains.then_some(&mut d_w),
            d_rows: None,
        };
        linear_cross_entropy::forward_backward(black_box(&h), &w, &targets, 0.0, &mut scratch, &mut loss, gradients);
    });
}

/// Elements of the optimizer's benches: larger than the caches, as the weights of a model are.
const WEIGHTS: usize = 8 << 20;

const STEP: adamw::Step = adamw::Step {
    number: 10,
    learning_rate: 1e-5,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
    grad_scale: 1.0,
};

#[divan::bench]
fn adamw_update(bencher: Bencher<'_, '_>) {
    let (mut value, grad) = (random(&[WEIGHTS]), random(&[WEIGHTS]));
    let (mut m, mut v) = (Tensor::zeros(&[WEIGHTS]), Tensor::zeros(&[WEIGHTS]));
    let moved = BytesCount::new(7 * WEIGHTS * size_of::<f32>());
    bencher.counter(moved).bench_local(|| adamw::update(black_box(&mut value), &grad, &mut m, &mut v, &STEP));
}

#[divan::bench]
fn adamw_8bit_update(bencher: Bencher<'_, '_>) {
    use adamw_8bit::{Moment, Sign};
    let (mut value, grad) = (random(&[WEIGHTS]), random(&[WEIGHTS]));
    let [mut m, mut r] = [Sign::Signed, Sign::Unsigned].map(|sign| Moment::zeros(WEIGHTS, sign));
    let moved = BytesCount::new(3 * WEIGHTS * size_of::<f32>() + 4 * Moment::bytes(WEIGHTS));
    bencher.counter(moved).bench_local(|| adamw_8bit::update(black_box(&mut value), &grad, &mut m, &mut r, &STEP));
}

#[divan::bench]
fn gradient_norm(bencher: Bencher<'_, '_>) {
    let grad = random(&[WEIGHTS]);
    let read = BytesCount::new(WEIGHTS * size_of::<f32>());
    bencher.counter(read).bench_local(|| grad_norm::sum_of_squares(black_box(&grad)));
}

/// Random blocks of `kind`: bits that mean no number cost no more time than others.
fn blocks(kind: BlockType, elements: usize) -> Vec<u8> {
    let mut rng = Rng::new(5, 5);
    (0..elements / kind.block_len() * kind.block_bytes()).map(|_| rng.next_u32() as u8).collect()
}

/// A million elements of each storage format; bytes are those of the decoded tensor.
#[divan::bench(args = BlockType::ALL)]
fn dequantize_blocks(bencher: Bencher<'_, '_>, kind: BlockType) {
    const ELEMENTS: usize = 1 << 20;
    let (stored, mut out) = (blocks(kind, ELEMENTS), vec![0.0f32; ELEMENTS]);
    let written = BytesCount::new(ELEMENTS * size_of::<f32>());
    bencher.counter(written).bench_local(|| dequantize(kind, black_box(&stored), &mut out));
}

/// A form of a weight that is not dense f32.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// Decoded panel by panel.
    Blocks(BlockType),
    /// NF4 with double quantisation, decoded likewise.
    Nf4,
    /// `compute = "int8"` in training.
    Int8,
    /// Integers of a file in generation.
    Integers(BlockType),
}

/// Rows and columns of such a matrix: whole blocks of every kind.
const PACKED_SHAPE: [usize; 2] = [F, 768];

fn weight(form: Form) -> Weight {
    let stored = |kind| {
        let bytes = Bytes::Owned(blocks(kind, PACKED_SHAPE[0] * PACKED_SHAPE[1]));
        Weight::Packed(Packed::from_blocks(PACKED_SHAPE, kind, bytes, None))
    };
    match form {
        Form::Blocks(kind) => stored(kind),
        Form::Nf4 => Weight::Packed(Packed::nf4(&random(&PACKED_SHAPE), true)),
        Form::Int8 => Weight::Int8(Int8Weight::new(&random(&PACKED_SHAPE), true)),
        Form::Integers(kind) => stored(kind).to_integers(),
    }
}

/// The forms that train.
const TRAIN: [Form; 6] = [
    Form::Blocks(BlockType::BF16),
    Form::Blocks(BlockType::Q8_0),
    Form::Blocks(BlockType::Q4_1),
    Form::Blocks(BlockType::Q6_K),
    Form::Nf4,
    Form::Int8,
];

#[divan::bench(args = TRAIN)]
fn packed_forward(bencher: Bencher<'_, '_>, form: Form) {
    let (x, w, mut y) = (random(&[T, PACKED_SHAPE[1]]), weight(form), Tensor::default());
    let flops = ItemsCount::new(2 * T * PACKED_SHAPE[0] * PACKED_SHAPE[1]);
    bencher.counter(flops).bench_local(|| linear::forward(black_box(&x), &w, 1.0, &mut y, Store::Overwrite));
}

#[divan::bench(args = TRAIN)]
fn packed_input_gradient(bencher: Bencher<'_, '_>, form: Form) {
    let (d_y, w, mut d_x) = (random(&[T, PACKED_SHAPE[0]]), weight(form), Tensor::default());
    let flops = ItemsCount::new(2 * T * PACKED_SHAPE[0] * PACKED_SHAPE[1]);
    bencher.counter(flops).bench_local(|| linear::input_gradient(black_box(&d_y), &w, 1.0, &mut d_x, Store::Overwrite));
}

/// The forms of generation.
const GENERATE: [Form; 6] = [
    Form::Blocks(BlockType::BF16),
    Form::Blocks(BlockType::Q6_K),
    Form::Nf4,
    Form::Integers(BlockType::Q8_0),
    Form::Integers(BlockType::Q4_1),
    Form::Integers(BlockType::Q4_0),
];

/// Two products of one row that go together, as gate and up do for every token; bytes are those of both matrices.
#[divan::bench(args = GENERATE)]
fn products_one_row(bencher: Bencher<'_, '_>, form: Form) {
    let (x, weights) = (random(&[1, PACKED_SHAPE[1]]), [(); 2].map(|()| weight(form)));
    let (mut y, mut rounded) = ([(); 2].map(|()| Tensor::default()), Int8Rows::default());
    let read = BytesCount::new(weights.iter().map(Weight::num_bytes).sum::<usize>());
    bencher.counter(read).bench_local(|| {
        let together = weights.iter().zip(&mut y);
        let mut together: Vec<products::Product<'_>> = together
            .map(|(weight, y)| products::Product { x: black_box(&x), weight, alpha: 1.0, y, store: Store::Overwrite })
            .collect();
        products::forward(&mut together, &mut rounded);
    });
}

/// The most likely token, and a draw with the usual cuts; bytes are those of the logits.
#[divan::bench(args = [false, true])]
fn sample_row(bencher: Bencher<'_, '_>, drawn: bool) {
    let (logits, mut scratch) = (random(&[1, V]), sample::Scratch::default());
    let draw = sample::Draw { temperature: 0.7, top_k: 40, top_p: 0.9, min_p: 0.05, uniform: 0.5 };
    let choice = sample::Choice { repetition_penalty: 1.0, history: &[], draw: drawn.then_some(draw) };
    let read = BytesCount::new(V * size_of::<f32>());
    bencher.counter(read).bench_local(|| sample::row(black_box(logits.row(0)), &choice, &mut scratch));
}
