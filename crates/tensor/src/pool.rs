//! Running a series of operations on the threads that share them.

/// Runs `f` on one of the threads that operations are dealt to.
///
/// An operation called from any other thread hands its work over, sleeps, and is woken when it is done. That costs tens
/// of microseconds, thousands of times per training step; inside `f` the calling thread does its share of the work
/// itself.
pub fn enter<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

#[cfg(test)]
mod tests {
    #[test]
    fn runs_inside_the_pool_and_nests() {
        let index = super::enter(|| super::enter(rayon::current_thread_index));
        assert!(index.is_some());
    }
}
