//! The oracle of every backward pass: central differences in f64 of a naive f64 forward pass.

/// Checks `analytic` = ∂loss/∂x at `x` against (loss(x + h) − loss(x − h)) / 2h, elementwise relative to the largest
/// component. The kernels compute in f32, so agreement to `tolerance` ≈ 1e-5 is as good as it gets.
pub(crate) fn check(name: &str, x: &[f32], analytic: &[f32], tolerance: f64, loss: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), analytic.len(), "{name}: one gradient an element");
    let mut point: Vec<f64> = x.iter().map(|x| *x as f64).collect();
    let h = 1e-5;
    let numeric: Vec<f64> = (0..x.len())
        .map(|i| {
            let at = point[i];
            point[i] = at + h;
            let up = loss(&point);
            point[i] = at - h;
            let down = loss(&point);
            point[i] = at;
            (up - down) / (2.0 * h)
        })
        .collect();
    let largest = numeric.iter().fold(1e-6f64, |m, g| m.max(g.abs()));
    for (i, (n, a)) in numeric.iter().zip(analytic).enumerate() {
        let error = (n - *a as f64).abs() / largest;
        assert!(error < tolerance, "{name}[{i}]: analytic {a}, numeric {n}, relative error {error}");
    }
}

/// Checks a forward result against the naive one, relative to the largest value.
pub(crate) fn check_close(name: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: number of values");
    let largest = want.iter().fold(1e-9f64, |m, g| m.max(g.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((*g as f64 - w).abs() / largest < tolerance, "{name}[{i}]: {g} instead of {w}");
    }
}

pub(crate) fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| *x as f64).collect()
}

/// Σ weights · values: makes a scalar of an output, with `weights` as its gradient.
pub(crate) fn weighted(values: &[f64], weights: &[f32]) -> f64 {
    values.iter().zip(weights).map(|(v, w)| v * *w as f64).sum()
}
