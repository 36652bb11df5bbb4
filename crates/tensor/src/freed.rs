//! Giving freed memory back to the operating system.

/// Gives back what was freed but is kept by the allocator for later, where the C library can (glibc). Called between
/// phases: after many small allocations, such as those of reading text, this may be tens of megabytes that nothing uses
/// again.
#[allow(unsafe_code)]
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: malloc_trim takes a number, may be called at any time from any thread, and touches no live
        // allocation.
        unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn live_memory_stays() {
        let numbers: Vec<usize> = (0..100_000).collect();
        drop((0..1000).map(|i| vec![i; 100]).collect::<Vec<_>>());
        super::release_freed_memory();
        assert!(numbers.iter().enumerate().all(|(i, n)| i == *n));
    }
}
