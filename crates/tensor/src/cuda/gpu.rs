//! One GPU, its memory, and launches of kernels.

use super::driver::{self, Options};
#[cfg(any(test, feature = "emulator"))]
use super::emulator;
use super::error::Error;
use super::kernels::Module;
use super::work::{KernelCall, locked};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// One GPU and everything that this program has on it. All work goes into one stream, in order.
pub struct Gpu {
    pub(super) backend: Backend,
    pub(super) failure: OnceLock<Error>,
    /// Small tables that launches have uploaded, so that what all layers need is sent once.
    tables: Mutex<Vec<(Vec<u32>, Arc<Buffer>)>>,
    poisons: AtomicBool,
    pub(super) tf32: AtomicBool,
    /// Bytes of pinned host memory.
    pub(super) host_bytes: AtomicUsize,
    /// Whether a graph is being captured, what went wrong with it, and whether that happened before.
    pub(super) capturing: AtomicBool,
    pub(super) capture_error: Mutex<Option<Error>>,
    pub(super) capture_failed: AtomicBool,
}

/// Tables that are kept for further launches.
pub(super) const TABLES_KEPT: usize = 16;

/// What carries out the work.
pub(super) enum Backend {
    Driver(Box<driver::Driver>),
    #[cfg(any(test, feature = "emulator"))]
    Emulator(Box<emulator::Emulator>),
}

/// Calls the same method of whichever back end there is.
macro_rules! backend {
    ($gpu:expr, $method:ident ( $($arg:expr),* )) => {
        match &$gpu.backend {
            crate::cuda::gpu::Backend::Driver(driver) => driver.$method($($arg),*),
            #[cfg(any(test, feature = "emulator"))]
            crate::cuda::gpu::Backend::Emulator(emulator) => emulator.$method($($arg),*),
        }
    };
}

pub(super) use backend;

/// One launch of a kernel.
pub(crate) struct Launch<'a> {
    /// The module that the kernel is in, with its definitions.
    pub(crate) module: Module,
    /// Its name.
    pub(crate) kernel: &'static str,
    /// Blocks in each direction.
    pub(crate) grid: [u32; 3],
    /// Threads of a block: a multiple of 32.
    pub(crate) block: u32,
    /// Bytes of shared memory.
    pub(crate) shared: usize,
    /// In the order of the kernel's parameters.
    pub(crate) args: &'a [Arg<'a>],
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(crate) enum Arg<'a> {
    /// The address of a buffer's byte.
    Buffer(&'a Buffer, usize),
    /// A null pointer: an optional buffer that is not there.
    Null,
    U32(u32),
    U64(u64),
    F32(f32),
}

impl Arg<'_> {
    /// The bytes that a kernel's parameter is read from.
    fn bits(self) -> u64 {
        match self {
            Self::Buffer(buffer, offset) => buffer.address + offset as u64,
            Self::Null => 0,
            Self::U32(x) => u64::from(x),
            Self::U64(x) => x,
            Self::F32(x) => u64::from(x.to_bits()),
        }
    }
}

impl Gpu {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// When a library is missing or too old, or there is no such device.
    pub fn open(ordinal: usize, options: &Options) -> Result<Arc<Self>, Error> {
        Ok(Self::new(Backend::Driver(Box::new(driver::Driver::open(ordinal, options)?))))
    }

    /// A device that runs the kernels on the CPU, for tests; `folder` keeps what the C++ compiler made of them.
    ///
    /// # Errors
    /// When `folder` cannot be written.
    #[cfg(any(test, feature = "emulator"))]
    pub fn emulated(folder: &std::path::Path) -> Result<Arc<Self>, Error> {
        Ok(Self::new(Backend::Emulator(Box::new(emulator::Emulator::new(folder)?))))
    }

    fn new(backend: Backend) -> Arc<Self> {
        let [poisons, tf32, capturing, capture_failed] = [(); 4].map(|()| AtomicBool::new(false));
        Arc::new(Self {
            backend,
            failure: OnceLock::new(),
            tables: Mutex::default(),
            poisons,
            tf32,
            host_bytes: AtomicUsize::new(0),
            capturing,
            capture_error: Mutex::default(),
            capture_failed,
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        backend!(self, name())
    }

    /// Bytes held now, and the most that were held at once.
    pub fn memory(&self) -> (usize, usize) {
        backend!(self, memory())
    }

    /// Bytes of the device that nobody holds, other programs included; `None` after a failure, and where there is no
    /// driver to ask.
    pub fn free_memory(&self) -> Option<usize> {
        self.attempt(|| backend!(self, free_memory())).flatten()
    }

    /// Makes the most that were held at once what is held now.
    pub fn reset_peak(&self) {
        backend!(self, reset_peak());
    }

    /// Whether new memory holds NaN from now on, so that an operation that does not write all of its output is seen.
    pub fn poison(&self, poisons: bool) {
        self.poisons.store(poisons, Ordering::Relaxed);
    }

    /// Whether products of f32 matrices may round their factors to TF32 (10 bits after the leading one instead of 23)
    /// from now on; sums stay f32. Off at first. What is no product of matrices, attention among it, stays exact.
    pub fn set_tf32(&self, tf32: bool) {
        self.tf32.store(tf32, Ordering::Relaxed);
    }

    /// Waits for the device.
    ///
    /// # Errors
    /// The first failure since the device was opened.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.attempt(|| backend!(self, synchronize()));
        self.failure.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// Does `f` unless something failed before, and keeps its failure.
    pub(super) fn attempt<T>(&self, f: impl FnOnce() -> Result<T, Error>) -> Option<T> {
        if self.failure.get().is_some() {
            return None;
        }
        if self.capturing.load(Ordering::Relaxed) {
            // What cannot be captured is done as it is.
            let mut failure = locked(&self.capture_error);
            return if failure.is_some() { None } else { f().map_err(|e| *failure = Some(e)).ok() };
        }
        f().map_err(|e| self.failure.set(e)).ok()
    }

    /// New memory of `bytes` bytes whose content is not defined; none for 0. After a failure, a buffer that nothing
    /// will use.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Buffer {
        let address = if bytes == 0 { None } else { self.attempt(|| backend!(self, allocate(bytes))) };
        let address = address.unwrap_or(0);
        let buffer = Buffer { gpu: self.clone(), address, bytes };
        if self.poisons.load(Ordering::Relaxed) {
            buffer.fill(0xFF, bytes);
        }
        buffer
    }

    /// Memory that holds `values`.
    pub(crate) fn upload<T: bytemuck::Pod>(self: &Arc<Self>, values: &[T]) -> Buffer {
        let buffer = self.allocate(size_of_val(values));
        buffer.write(0, bytemuck::cast_slice(values));
        buffer
    }

    /// Memory that holds `table`: the one of an earlier call with the same values, if it is among the last few.
    pub(crate) fn table(self: &Arc<Self>, table: &[u32]) -> Arc<Buffer> {
        let mut tables = locked(&self.tables);
        if let Some(i) = tables.iter().position(|(values, _)| values == table) {
            let found = tables.remove(i);
            let buffer = found.1.clone();
            tables.push(found);
            return buffer;
        }
        let buffer = Arc::new(self.upload(table));
        if tables.len() == TABLES_KEPT {
            tables.remove(0);
        }
        tables.push((table.to_vec(), buffer.clone()));
        buffer
    }

    /// [`Gpu::launch`] of blocks and threads in one direction.
    pub(super) fn launch_row(
        &self,
        module: Module,
        kernel: &'static str,
        (blocks, block, shared): (u32, u32, usize),
        args: &[Arg<'_>],
    ) {
        self.launch(&Launch { module, kernel, grid: [blocks, 1, 1], block, shared, args });
    }

    /// [`Gpu::launch`] of at least `threads` threads.
    pub(super) fn launch_threads(&self, module: Module, kernel: &'static str, threads: usize, args: &[Arg<'_>]) {
        const BLOCK: u32 = 256;
        self.launch_row(module, kernel, (blocks(threads, BLOCK), BLOCK, 0), args);
    }

    /// Asks for a kernel to be run; an empty grid is nothing to do.
    pub(crate) fn launch(&self, launch: &Launch<'_>) {
        if !launch.grid.contains(&0) {
            let Launch { module, kernel, grid, block, shared, args } = *launch;
            let values = args.iter().map(|a| a.bits()).collect();
            self.attempt(|| backend!(self, launch(KernelCall { module, kernel, grid, block, shared, values })));
        }
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.name())
    }
}

/// Memory of a GPU, given back when it is dropped.
pub(crate) struct Buffer {
    pub(super) gpu: Arc<Gpu>,
    pub(super) address: u64,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Copies `from` to the bytes from `at` on.
    pub(crate) fn write(&self, at: usize, from: &[u8]) {
        self.check(at, from.len());
        if !from.is_empty() {
            self.gpu.attempt(|| backend!(self.gpu, upload(self.address + at as u64, from)));
        }
    }

    /// Waits for the work so far and copies the bytes from `at` on. After a failure `to` is left as it is.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) {
        self.check(at, to.len());
        if !to.is_empty() {
            self.gpu.attempt(|| backend!(self.gpu, download(self.address + at as u64, to)));
        }
    }

    /// Copies `bytes` bytes from another buffer of the same device.
    pub(crate) fn copy(&self, at: usize, from: &Self, from_at: usize, bytes: usize) {
        self.check(at, bytes);
        from.check(from_at, bytes);
        if bytes > 0 {
            let addresses = (self.address + at as u64, from.address + from_at as u64);
            self.gpu.attempt(|| backend!(self.gpu, copy(addresses.0, addresses.1, bytes)));
        }
    }

    /// Sets the first `bytes` bytes to `byte`.
    pub(crate) fn fill(&self, byte: u8, bytes: usize) {
        self.check(0, bytes);
        if bytes > 0 {
            self.gpu.attempt(|| backend!(self.gpu, fill(self.address, byte, bytes)));
        }
    }

    pub(super) fn check(&self, at: usize, bytes: usize) {
        assert!(at <= self.bytes && bytes <= self.bytes - at, "bytes {at} + {bytes} of a buffer of {}", self.bytes);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.address != 0 {
            backend!(self.gpu, free(self.address));
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

/// Blocks of `block` threads that have a thread for each of `n` things.
pub(super) fn blocks(n: usize, block: u32) -> u32 {
    n.div_ceil(block as usize) as u32
}
