//! How far numbers that should be alike are apart.

/// Euclidean distance of `a` from `b`, relative to the norm of `b`.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let norm: f64 = b.iter().map(|x| square(f64::from(*x))).sum();
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (apart / norm).sqrt()
}
