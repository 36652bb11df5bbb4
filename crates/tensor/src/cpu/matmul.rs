//! Matrix products on all threads, and the product with few rows that decoding needs.
//!
//! A task owns a block of columns of the result. It packs its columns of `b` into panels that fill half of the
//! second-level cache, and lets the rows of `a` go by, read where they lie; `tile.rs` does the arithmetic. Packing
//! transposes `b` when its columns are not side by side (a weight in the forward pass), and keeps strides of a power of
//! two, which fall on few cache sets, out of the inner loop. Against the `gemm` crate, which packs both operands, this
//! was measured at 0.95 to 1.12 times its speed on the forward products and the layers' input gradients of SmolLM2-135M
//! (1,024 tokens, Zen 4), and it takes a sum of products in one pass over the result, which an adapter needs. Weight
//! gradients, products of few columns and the head's input gradient were mostly slower (0.77 to 1.0): [`gemm`] leaves
//! them to that crate.

use crate::cpu::library;
use crate::cpu::simd::{Level, level, multiversion, reduce2};
use crate::cpu::tile::{Panels, panel_width, product, tile_rows};
use crate::cpu::transpose::transpose;
use crate::cpu::view::{Shared, View, threads};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// One summand of a product: `alpha · a[m, k] · b[k, n]`.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub a: View<'a>,
    pub b: View<'a>,
    pub k: usize,
    pub alpha: f32,
}

/// Elements of a packed block of `b`: about half of a 1 MiB L2 cache, where it stays while the rows of `a` go by.
const BLOCK: usize = 112 * 1024;

/// Inner dimensions up to this go in one pass over the destination; longer ones in passes of [`PASS`].
const ONE_PASS: usize = 1600;
const PASS: usize = 512;

/// Rows that lie a multiple of this many elements (4 KiB) apart share the sets of the first-level cache, which has
/// fewer ways than a tile has rows: the models' usual widths, 2,048 and 4,096, do. Such rows of `a` are copied closer
/// together.
const CONFLICT: usize = 1024;

/// Single products that the `gemm` crate is better at: results of few columns, which packing `b` does not pay for,
/// inner dimensions of several passes, and an `a` that is worth packing too since it has to be transposed along a long
/// inner dimension.
const FEW_COLUMNS: usize = 16;
const LONG: usize = 2048;
const LONG_TRANSPOSED: usize = 512;

/// Elements of an `a` that is read again and again from the last-level cache.
const CACHED: usize = 4 << 20;

/// Rows of `a` that meet a packed block at a time: a multiple of every tile's rows.
const ROWS: usize = 48;

/// With fewer rows than this, a `b` whose columns lie side by side is used where it lies.
const PACKING_PAYS: usize = 64;

/// Bytes that each thread keeps for products.
pub(crate) const THREAD_BYTES: usize = 4 * (BLOCK + ROWS * (ONE_PASS + 32));

thread_local! {
    /// The packed block of `b` and copied rows of `a` of each thread, kept between calls.
    static PACKED: RefCell<(Tensor, Tensor)> = RefCell::default();
}

/// `dst[m, n] = accumulate · dst + alpha · a[m, k] · b[k, n]`, where `dst` has rows `dst_stride` apart.
///
/// Cuts the work among the threads of the current rayon pool; one thread computes each element, in an order that does
/// not depend on their number.
pub(crate) fn gemm(
    mn_k: (usize, usize, usize),
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    alpha: f32,
    a: View<'_>,
    b: View<'_>,
) {
    let (m, n, k) = mn_k;
    if m * n * k > 0 && (n <= FEW_COLUMNS || k > LONG || a.is_transposed() && k >= LONG_TRANSPOSED) {
        return library::product(mn_k, dst, dst_stride, accumulate, alpha, a, b, threads());
    }
    gemm_sum((m, n), dst, dst_stride, accumulate, &[Term { a, b, k, alpha }]);
}

/// `dst[m, n] = accumulate · dst + Σ terms`: one pass over the destination for all of them, as if their inner
/// dimensions lay one after the other.
pub(crate) fn gemm_sum(
    (m, n): (usize, usize),
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    terms: &[Term<'_>],
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst_stride + n <= dst.len() && dst_stride >= n, "destination {m} x {n} exceeds its slice");
    for term in terms {
        term.a.check(m, term.k);
        term.b.check(term.k, n);
    }
    let total: usize = terms.iter().map(|t| t.k).sum();
    if total == 0 {
        if !accumulate {
            dst.chunks_mut(dst_stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    if level() == Level::Baseline {
        for (i, t) in terms.iter().enumerate() {
            library::product((m, n, t.k), dst, dst_stride, accumulate || i > 0, t.alpha, t.a, t.b, threads());
        }
        return;
    }
    let grid = Grid::new(m, n, total, terms.iter().any(|t| t.a.is_transposed()));
    let dst = Shared::new(dst);
    (0..grid.tasks()).into_par_iter().with_max_len(1).for_each(|task| {
        let (rows, cols) = grid.task(task);
        PACKED.with_borrow_mut(|(block, copied)| {
            product_block(&grid, rows, cols, dst, dst_stride, accumulate, terms, block, copied);
        });
    });
}

/// How a product is cut into tasks: blocks of rows by blocks of columns, as even as they go.
struct Grid {
    m: usize,
    n: usize,
    total: usize,
    row_tasks: usize,
    col_tasks: usize,
    /// Inner steps of one pass.
    pass: usize,
}

impl Grid {
    fn new(m: usize, n: usize, total: usize, transposed: bool) -> Self {
        let threads = threads();
        let panels = n.div_ceil(panel_width());
        let pass = if total <= ONE_PASS && !transposed { total } else { total.div_ceil(total.div_ceil(PASS)) };
        // Columns are cut first, so that each part of `b` is packed once; rows when that leaves a thread without its
        // even share.
        let even = panels.is_multiple_of(threads) || panels >= 16 * threads;
        let shares = if even { threads } else { 1 };
        let share = panels.div_ceil(shares);
        let widest = (BLOCK / pass / panel_width()).max(1);
        let narrow = shares * share.div_ceil(widest);
        // More tasks than their size asks for, so that a thread that is held up is waited for less. Narrower columns
        // have `a` read more often, which is cheap while it lies in a cache, and does not have to be transposed; fewer
        // rows have `b` packed more often.
        let (row_tasks, col_tasks) = if !even {
            (2 * threads, narrow)
        } else if transposed {
            ((4 * threads).div_ceil(narrow), narrow)
        } else if m * total <= CACHED {
            (1, shares * share.div_ceil(widest).max(share.min(4)))
        } else {
            (1, narrow)
        };
        let row_tasks = row_tasks.min(m.div_ceil(if even { 8 * ROWS } else { ROWS }));
        Self { m, n, total, row_tasks, col_tasks, pass }
    }

    fn tasks(&self) -> usize {
        self.row_tasks * self.col_tasks
    }

    /// Rows and columns of task `task`.
    fn task(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let part = |number: usize, parts: usize, units: usize, unit: usize, end: usize| {
            (number * units / parts * unit).min(end)..((number + 1) * units / parts * unit).min(end)
        };
        let (width, tile) = (panel_width(), tile_rows());
        let (row, col) = (task / self.col_tasks, task % self.col_tasks);
        (
            part(row, self.row_tasks, self.m.div_ceil(tile), tile, self.m),
            part(col, self.col_tasks, self.n.div_ceil(width), width, self.n),
        )
    }
}

/// The part of the product in `rows` and `cols`.
#[allow(unsafe_code)]
fn product_block(
    grid: &Grid,
    rows: Range<usize>,
    cols: Range<usize>,
    dst: Shared,
    dst_stride: usize,
    accumulate: bool,
    terms: &[Term<'_>],
    block: &mut Tensor,
    copied: &mut Tensor,
) {
    if rows.is_empty() || cols.is_empty() {
        return;
    }
    let n = cols.len();
    let padded = n.next_multiple_of(panel_width());
    block.resize(&[grid.pass, padded]);
    for pass_start in (0..grid.total).step_by(grid.pass) {
        let pass = pass_start..(pass_start + grid.pass).min(grid.total);
        // The part of each term that falls into this pass, and where its packed form begins.
        let pieces = |terms: &[Term<'_>], f: &mut dyn FnMut(&Term<'_>, Range<usize>, usize)| {
            let mut offset = 0;
            for term in terms {
                let k = pass.start.max(offset)..pass.end.min(offset + term.k);
                if !k.is_empty() {
                    f(term, k.start - offset..k.end - offset, (k.start - pass.start) * padded);
                }
                offset += term.k;
            }
        };
        let direct = |b: &View<'_>| b.col_stride == 1 && (rows.len() < PACKING_PAYS || b.row_stride <= panel_width());
        pieces(terms, &mut |term, k, at| {
            if !direct(&term.b) {
                pack(term.b.part(k.start, cols.start), (k.len(), n), &mut block.data_mut()[at..]);
            }
        });
        for first in rows.clone().step_by(ROWS) {
            let m = ROWS.min(rows.end - first);
            let at = first * dst_stride + cols.start;
            // SAFETY: tasks differ in their rows or columns, and each touches only the columns of its own in its rows:
            // `product` writes nothing else.
            let dst = unsafe { dst.slice(at, (m - 1) * dst_stride + n) };
            let mut add = accumulate || pass_start > 0;
            pieces(terms, &mut |term, k, at| {
                let mut a = term.a.part(first, k.start);
                if a.is_transposed() {
                    // Steps that lie a row apart would miss the first-level cache at each step, for each panel.
                    copied.resize(&[k.len(), ROWS]);
                    for (to, l) in copied.data_mut().chunks_exact_mut(ROWS).zip(0..) {
                        copy(&a.data[l * a.col_stride..][..m], to);
                    }
                    a = View { data: copied.data(), row_stride: 1, col_stride: ROWS };
                } else if a.row_stride.is_multiple_of(CONFLICT) && n > panel_width() {
                    let stride = k.len().next_multiple_of(16) + 16;
                    copied.resize(&[ROWS, stride]);
                    for (to, i) in copied.data_mut().chunks_exact_mut(stride).take(m).zip(0..) {
                        copy(&a.data[i * a.row_stride..][..k.len()], to);
                    }
                    a = View::rows(copied.data(), stride);
                }
                let b = if direct(&term.b) {
                    let b = term.b.part(k.start, cols.start);
                    Panels::rows(b.data, b.row_stride)
                } else {
                    Panels::packed(&block.data()[at..], k.len())
                };
                // Rows of a long `a` come from memory in pieces too short for the CPU to see a pattern in them.
                let next = first + ROWS;
                if !term.a.is_transposed() && next < rows.end {
                    term.a.part(next, k.start).prefetch(ROWS.min(rows.end - next), k.len());
                }
                product((m, n, k.len()), dst, dst_stride, add, term.alpha, a, b);
                add = true;
            });
        }
    }
}

/// Lays the panels of `b` [k, n] one after the other, each row by row, for [`Panels::packed`].
fn pack(b: View<'_>, (k, n): (usize, usize), to: &mut [f32]) {
    let width = panel_width();
    if b.col_stride == 1 {
        // Row by row, since that is how `b` comes from memory.
        for l in 0..k {
            let mut row = &b.data[l * b.row_stride..][..n];
            for (panel, to) in to.chunks_mut(k * width).enumerate().take(n.div_ceil(width)) {
                let (from, rest) = row.split_at(width.min(n - panel * width));
                copy(from, &mut to[l * width..]);
                row = rest;
            }
        }
        return;
    }
    for (panel, j) in to.chunks_mut(k * width).zip((0..n).step_by(width)) {
        let cols = width.min(n - j);
        let b = b.part(0, j);
        if b.row_stride == 1 {
            transpose((cols, k), b.data, b.col_stride, panel, width);
        } else {
            for (l, row) in panel.chunks_exact_mut(width).enumerate() {
                for (c, x) in row[..cols].iter_mut().enumerate() {
                    *x = b.data[l * b.row_stride + c * b.col_stride];
                }
            }
        }
    }
}

/// `to[..from.len()] = from` for rows too short for a call to the C library.
#[inline]
fn copy(from: &[f32], to: &mut [f32]) {
    let to = &mut to[..from.len()];
    let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<16>(), to.as_chunks_mut::<16>());
    from.iter().zip(to).for_each(|(from, to)| *to = *from);
    to_rest.copy_from_slice(from_rest);
}

/// Products with up to this many rows of activations read the weights once, row by row, instead of packing them.
pub(crate) const FEW_ROWS: usize = 4;

/// `y[m, n] = accumulate · y + alpha · x[m, k] · w[n, k]ᵀ`: the shape of every linear layer.
pub(crate) fn matmul_nt(
    (m, n, k): (usize, usize, usize),
    y: &mut [f32],
    accumulate: bool,
    alpha: f32,
    x: &[f32],
    w: &[f32],
) {
    if m > FEW_ROWS || n < 64 {
        return gemm((m, n, k), y, n, accumulate, alpha, View::rows(x, k), View::rows(w, k).t());
    }
    few_rows((m, n), y, accumulate, alpha, |columns, out| {
        for j in columns {
            dots(out, x, &w[j * k..(j + 1) * k]);
        }
    });
}

/// As [`matmul_nt`] for few rows of `x` and a weight whose row j `row(j, ..)` writes.
pub(crate) fn matmul_nt_by_row(
    (m, n, k): (usize, usize, usize),
    y: &mut [f32],
    accumulate: bool,
    alpha: f32,
    x: &[f32],
    row: impl Fn(usize, &mut [f32]) + Sync,
) {
    few_rows((m, n), y, accumulate, alpha, |columns, out| {
        let mut w = vec![0.0; k];
        for j in columns {
            row(j, &mut w);
            dots(out, x, &w);
        }
    });
}

/// One pass over the weights, cut into strips of output columns: `strip` appends the `m` products of each column of its
/// range, which are then copied out.
fn few_rows(
    (m, n): (usize, usize),
    y: &mut [f32],
    accumulate: bool,
    alpha: f32,
    strip: impl Fn(Range<usize>, &mut Vec<f32>) + Sync,
) {
    let width = n.div_ceil(threads() * 4).max(16);
    let strips: Vec<Vec<f32>> = (0..n.div_ceil(width))
        .into_par_iter()
        .map(|s| {
            let columns = s * width..((s + 1) * width).min(n);
            let mut out = Vec::with_capacity(columns.len() * m);
            strip(columns, &mut out);
            out
        })
        .collect();
    for (s, values) in strips.iter().enumerate() {
        for (j, column) in values.chunks_exact(m).enumerate() {
            for (i, value) in column.iter().enumerate() {
                let slot = &mut y[i * n + s * width + j];
                *slot = if accumulate { *slot } else { 0.0 } + alpha * value;
            }
        }
    }
}

multiversion! {
    /// Appends the product of `w` with each row of `x` (rows as long as `w`).
    fn dots(out: &mut Vec<f32>, x: &[f32], w: &[f32]) {
        for row in x.chunks_exact(w.len()) {
            out.push(reduce2(row, w, |a, b| a * b));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn naive(m: usize, n: usize, k: usize, x: &[f32], w: &[f32]) -> Vec<f64> {
        let mut y = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                y[i * n + j] = (0..k).map(|l| x[i * k + l] as f64 * w[j * k + l] as f64).sum();
            }
        }
        y
    }

    #[test]
    fn products_match_f64() {
        let mut rng = Rng::new(7, 0);
        for (m, n, k) in [(1, 64, 33), (4, 200, 64), (5, 100, 17), (33, 47, 61), (3, 5, 2), (2, 130, 1)] {
            let x = rng.normals(m * k, 1.0);
            let w = rng.normals(n * k, 1.0);
            let want = naive(m, n, k, &x, &w);
            let mut y = vec![f32::NAN; m * n];
            matmul_nt((m, n, k), &mut y, false, 1.0, &x, &w);
            for (a, b) in y.iter().zip(&want) {
                assert!((*a as f64 - b).abs() < 1e-4, "{m} {n} {k}: {a} {b}");
            }
            matmul_nt((m, n, k), &mut y, true, 2.0, &x, &w);
            for (a, b) in y.iter().zip(&want) {
                assert!((*a as f64 - 3.0 * b).abs() < 3e-4);
            }
        }
    }

    #[test]
    fn long_and_several_inner_dimensions_add_up() {
        let mut rng = Rng::new(8, 0);
        // (m, n, inner dimensions): one pass, several passes with a seam inside a term, rows cut among threads, rows a
        // multiple of 4 KiB apart in one pass and in several.
        for (m, n, ks) in [
            (70, 100, vec![33, 5]),
            (9, 40, vec![2000, 300, 16]),
            (130, 16, vec![70, 3]),
            (61, 130, vec![1024, 7]),
            (50, 70, vec![2048, 16]),
        ] {
            let xs: Vec<Vec<f32>> = ks.iter().map(|k| rng.normals(m * k, 1.0)).collect();
            let ws: Vec<Vec<f32>> = ks.iter().map(|k| rng.normals(n * k, 0.1)).collect();
            let mut want = vec![1.0f64; m * n];
            for ((x, w), k) in xs.iter().zip(&ws).zip(&ks) {
                want.iter_mut().zip(naive(m, n, *k, x, w)).for_each(|(sum, y)| *sum += 0.5 * y);
            }
            // Each operand as it is and as a transposed view of its transpose.
            let turn = |a: &[f32], rows: usize| {
                let cols = a.len() / rows;
                (0..a.len()).map(|at| a[at % rows * cols + at / rows]).collect::<Vec<f32>>()
            };
            let x_transposed: Vec<Vec<f32>> = xs.iter().map(|x| turn(x, m)).collect();
            let w_transposed: Vec<Vec<f32>> = ws.iter().map(|w| turn(w, n)).collect();
            for (turn_x, turn_w) in [(false, false), (true, false), (false, true), (true, true)] {
                let terms: Vec<Term<'_>> = (0..ks.len())
                    .map(|i| {
                        let a = if turn_x { View::rows(&x_transposed[i], m).t() } else { View::rows(&xs[i], ks[i]) };
                        let b = if turn_w { View::rows(&w_transposed[i], n) } else { View::rows(&ws[i], ks[i]).t() };
                        Term { a, b, k: ks[i], alpha: 0.5 }
                    })
                    .collect();
                let mut y = vec![1.0f32; m * (n + 1)];
                gemm_sum((m, n), &mut y, n + 1, true, &terms);
                for (i, row) in y.chunks(n + 1).enumerate() {
                    assert_eq!(row[n], 1.0, "padding is left alone");
                    for (a, b) in row[..n].iter().zip(&want[i * n..]) {
                        assert!((*a as f64 - b).abs() < 1e-4, "{m} {n} {ks:?}: {a} {b}");
                    }
                }
                let mut fresh = vec![f32::NAN; m * (n + 1)];
                gemm_sum((m, n), &mut fresh, n + 1, false, &terms);
                assert!((fresh[0] as f64 - (want[0] - 1.0)).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn empty_inner_dimension_clears() {
        let mut y = vec![f32::NAN; 6];
        gemm((2, 3, 0), &mut y, 3, false, 1.0, View::rows(&[], 0), View::rows(&[], 3));
        assert_eq!(y, [0.0; 6]);
    }
}
