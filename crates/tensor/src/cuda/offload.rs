//! Host memory that a GPU copies to and from beside its work: what does not fit on the GPU waits there.
//!
//! Copies go through a stream of their own. Each begins when all work that was asked for before it is done, and the
//! copies are done in their order; work that needs what was copied, or writes where a copy reads, has to wait for an
//! [`Event`].

use super::gpu::{Buffer, Gpu, backend};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Pinned host memory, given back when it is dropped. Its content is not defined at first.
pub(crate) struct HostBuffer {
    gpu: Arc<Gpu>,
    /// 0 after a failure.
    address: u64,
    bytes: usize,
}

/// A moment in the order of copies.
pub(crate) struct Event {
    gpu: Arc<Gpu>,
    /// 0 after a failure.
    handle: u64,
}

impl Gpu {
    /// Pinned memory of `bytes` bytes.
    pub(crate) fn allocate_host(self: &Arc<Self>, bytes: usize) -> HostBuffer {
        let address = if bytes == 0 { None } else { self.attempt(|| backend!(self, allocate_host(bytes))) };
        if address.is_some() {
            self.host_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        HostBuffer { gpu: self.clone(), address: address.unwrap_or(0), bytes }
    }

    /// Bytes of pinned memory that are held for this device.
    pub fn host_memory(&self) -> usize {
        self.host_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn event(self: &Arc<Self>) -> Event {
        let handle = self.attempt(|| backend!(self, event())).unwrap_or(0);
        Event { gpu: self.clone(), handle }
    }
}

impl HostBuffer {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Asks for `bytes` bytes of `from` to be copied to here.
    pub(crate) fn copy_out(&self, at: usize, from: &Buffer, from_at: usize, bytes: usize) {
        self.check(at, bytes);
        from.check(from_at, bytes);
        if bytes > 0 {
            let (to, from) = (self.address + at as u64, from.address + from_at as u64);
            self.gpu.attempt(|| backend!(self.gpu, copy_out(to, from, bytes)));
        }
    }

    /// Asks for `bytes` bytes from here to be copied to `to`.
    pub(crate) fn copy_in(&self, at: usize, to: &Buffer, to_at: usize, bytes: usize) {
        self.check(at, bytes);
        to.check(to_at, bytes);
        if bytes > 0 {
            let (to, from) = (to.address + to_at as u64, self.address + at as u64);
            self.gpu.attempt(|| backend!(self.gpu, copy_in(to, from, bytes)));
        }
    }

    /// Waits for all copies and reads the bytes from `at` on. After a failure `to` is left as it is.
    #[allow(unsafe_code)]
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) {
        self.check(at, to.len());
        self.gpu.attempt(|| {
            backend!(self.gpu, finish_copies())?;
            if self.address != 0 {
                // SAFETY: the range lies in memory of this process that the device allocated and does not use now.
                unsafe {
                    std::ptr::copy_nonoverlapping((self.address + at as u64) as *const u8, to.as_mut_ptr(), to.len())
                };
            }
            Ok(())
        });
    }

    /// Waits for all copies and writes `from` to the bytes from `at` on.
    #[allow(unsafe_code)]
    pub(crate) fn write(&self, at: usize, from: &[u8]) {
        self.check(at, from.len());
        self.gpu.attempt(|| {
            backend!(self.gpu, finish_copies())?;
            if self.address != 0 {
                // SAFETY: the range lies in memory of this process that nothing else uses now.
                unsafe {
                    std::ptr::copy_nonoverlapping(from.as_ptr(), (self.address + at as u64) as *mut u8, from.len())
                };
            }
            Ok(())
        });
    }

    fn check(&self, at: usize, bytes: usize) {
        assert!(at <= self.bytes && bytes <= self.bytes - at, "bytes {at} + {bytes} of {} on the host", self.bytes);
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if self.address != 0 {
            backend!(self.gpu, free_host(self.address));
            self.gpu.host_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

impl std::fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostBuffer({} bytes)", self.bytes)
    }
}

impl Event {
    /// Is reached when all copies that were asked for up to now are done.
    pub(crate) fn record(&self) {
        self.gpu.attempt(|| backend!(self.gpu, record(self.handle)));
    }

    /// What the device is asked for from now on begins when the event is reached, as it was recorded last.
    pub(crate) fn wait(&self) {
        self.gpu.attempt(|| backend!(self.gpu, wait(self.handle)));
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.handle != 0 {
            backend!(self.gpu, destroy_event(self.handle));
        }
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Event({})", self.handle)
    }
}
