//! The back end of tests: kernels are compiled as C++ after `emulator.h` and run on the CPU.
//!
//! Memory is counted as a GPU's allocator counts it. New memory holds NaN, every buffer lies between guard zones that
//! each launch checks, and shared memory has exactly the size that the launcher asks for.

use super::error::Error;
use super::kernels::Module;
use super::work::{KernelCall, Operand, Product, allocated, locked};
use crate::dtype::Dtype;
use half::bf16;
use sha2::{Digest, Sha256};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};

const HEADER: &str = include_str!("emulator.h");
/// Bytes of a guard zone, before and after a buffer.
const ZONE: usize = 256;
/// What memory and guard zones hold at first: NaN as f32 and as bf16.
const POISON: u8 = 0xFF;

type Run =
    unsafe extern "C" fn(*const c_char, *const u32, *const u32, usize, *mut *mut c_void, u32, *mut c_char, usize);

/// Modules of all emulated devices of this process: their state is static, so that one launch of each runs at a time.
static MODULES: LazyLock<Mutex<HashMap<Module, Arc<Mutex<Loaded>>>>> = LazyLock::new(Mutex::default);

/// A module that was compiled and opened.
struct Loaded {
    run: Run,
    _library: libloading::Library,
}

pub(super) struct Emulator {
    folder: PathBuf,
    memory: Mutex<Memory>,
    copies: Mutex<Copies>,
    records: Mutex<Records>,
}

/// Captured work.
#[derive(Default)]
struct Records {
    /// What is being captured.
    now: Option<Vec<Work>>,
    made: HashMap<u64, Vec<Work>>,
    last: u64,
}

/// A piece of work with the addresses of its operands.
#[derive(Clone)]
enum Work {
    Launch(KernelCall),
    Product(Product),
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, byte: u8, bytes: usize },
}

/// Copies that were asked for and not done yet: they are done when they are waited for and not before, so that work
/// which does not wait uses what is not there yet, and what is overwritten too early arrives wrong.
#[derive(Default)]
struct Copies {
    waiting: VecDeque<Copy>,
    /// The last event that was made.
    events: u64,
    /// What was done wrong in between.
    wrong: Option<Error>,
}

enum Copy {
    Bytes { to: u64, from: u64, bytes: usize },
    Event(u64),
}

impl Copies {
    /// Does what waits, up to the last point at which `event` was recorded.
    fn up_to(&mut self, event: u64) {
        let last = self.waiting.iter().rposition(|c| matches!(c, Copy::Event(e) if *e == event));
        self.first(last.map_or(0, |last| last + 1));
    }

    /// Does the first `count` of what waits.
    #[allow(unsafe_code)]
    fn first(&mut self, count: usize) {
        for copy in self.waiting.drain(..count) {
            if let Copy::Bytes { to, from, bytes } = copy {
                // SAFETY: the caller has checked that the ranges lie in their buffers, and `forget` has taken out those
                // whose buffers are gone.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            }
        }
    }

    /// Takes out copies that use `bytes` bytes from `address` on, which are given back: they should have been waited
    /// for.
    fn forget(&mut self, address: u64, bytes: usize) {
        let range = address..address + bytes as u64;
        let uses = |c: &Copy| matches!(c, Copy::Bytes { to, from, .. } if range.contains(to) || range.contains(from));
        if self.waiting.iter().any(uses) {
            self.wrong = Some(failed("free", format!("{bytes} bytes were given back while they were copied")));
            self.waiting.retain(|c| !uses(c));
        }
    }
}

#[derive(Default)]
struct Memory {
    /// Sizes of buffers by their address.
    buffers: BTreeMap<u64, usize>,
    /// Those in host memory.
    host: BTreeMap<u64, usize>,
    /// During capture: what was freed since, for the graph alone.
    recording: Option<Vec<u64>>,
    used: usize,
    peak: usize,
}

fn failed(call: &str, what: impl ToString) -> Error {
    Error::Call { call: call.into(), what: what.to_string() }
}

impl Emulator {
    pub(super) fn new(folder: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::Cache { path: folder.to_path_buf(), what: e.to_string() })?;
        Ok(Self {
            folder: folder.to_path_buf(),
            memory: Mutex::default(),
            copies: Mutex::default(),
            records: Mutex::default(),
        })
    }

    pub(super) fn name(&self) -> &str {
        "emulated GPU"
    }

    pub(super) fn memory(&self) -> (usize, usize) {
        let memory = locked(&self.memory);
        (memory.used, memory.peak)
    }

    pub(super) fn free_memory(&self) -> Result<Option<usize>, Error> {
        Ok(None)
    }

    pub(super) fn reset_peak(&self) {
        let mut memory = locked(&self.memory);
        memory.peak = memory.used;
    }

    pub(super) fn synchronize(&self) -> Result<(), Error> {
        if let Some(wrong) = locked(&self.copies).wrong.take() {
            return Err(wrong);
        }
        self.check_guards("synchronize")
    }

    #[allow(unsafe_code)]
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        if let Memory { recording: Some(own), buffers, .. } = &mut *locked(&self.memory)
            && let Some(i) = own.iter().position(|address| buffers.get(address) == Some(&bytes))
        {
            return Ok(own.swap_remove(i));
        }
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc(layout(bytes)) };
        if start.is_null() {
            return Err(Error::OutOfMemory { bytes, held: self.memory().0 });
        }
        let address = start as u64 + ZONE as u64;
        // SAFETY: the block is new and has a zone on either side of `bytes` bytes.
        unsafe { start.write_bytes(POISON, bytes + 2 * ZONE) };
        let mut memory = locked(&self.memory);
        memory.buffers.insert(address, bytes);
        memory.used += allocated(bytes);
        memory.peak = memory.peak.max(memory.used);
        Ok(address)
    }

    #[allow(unsafe_code)]
    pub(super) fn free(&self, address: u64) {
        let mut memory = locked(&self.memory);
        if let Some(own) = &mut memory.recording {
            return own.push(address);
        }
        if let Some(bytes) = memory.buffers.remove(&address) {
            locked(&self.copies).forget(address, bytes);
            memory.used -= allocated(bytes);
            // SAFETY: the block was allocated with this layout and nothing refers to it any more.
            unsafe { dealloc((address - ZONE as u64) as *mut u8, layout(bytes)) };
        }
    }

    #[allow(unsafe_code)]
    fn check_guards(&self, call: &str) -> Result<(), Error> {
        for (address, bytes) in &locked(&self.memory).buffers {
            for (side, start) in [("before", address - ZONE as u64), ("after", address + *bytes as u64)] {
                // SAFETY: buffers in the table are alive, and zones lie on either side of them.
                let zone = unsafe { std::slice::from_raw_parts(start as *const u8, ZONE) };
                if zone.iter().any(|b| *b != POISON) {
                    return Err(failed(call, format!("memory {side} a buffer of {bytes} bytes was written")));
                }
            }
        }
        Ok(())
    }

    #[allow(unsafe_code)]
    pub(super) fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        self.check_not_capturing("upload")?;
        // SAFETY: the caller has checked that the range lies in a buffer, which `from` cannot be part of.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    #[allow(unsafe_code)]
    pub(super) fn download(&self, from: u64, to: &mut [u8]) -> Result<(), Error> {
        self.check_not_capturing("download")?;
        // SAFETY: as for uploads.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        self.ask(Work::Copy { to, from, bytes })
    }

    #[allow(unsafe_code)]
    fn copy_now(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller has checked that both ranges lie in buffers.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    pub(super) fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        self.ask(Work::Fill { to, byte, bytes })
    }

    #[allow(unsafe_code)]
    fn fill_now(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller has checked that the range lies in a buffer.
        unsafe { (to as *mut u8).write_bytes(byte, bytes) };
        Ok(())
    }

    #[allow(unsafe_code)]
    pub(super) fn allocate_host(&self, bytes: usize) -> Result<u64, Error> {
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc(layout(bytes)) };
        if start.is_null() {
            return Err(Error::OutOfHostMemory { bytes });
        }
        // SAFETY: the block is new and has these bytes.
        unsafe { start.write_bytes(POISON, bytes + 2 * ZONE) };
        locked(&self.memory).host.insert(start as u64, bytes);
        Ok(start as u64)
    }

    #[allow(unsafe_code)]
    pub(super) fn free_host(&self, address: u64) {
        if let Some(bytes) = locked(&self.memory).host.remove(&address) {
            // As the driver does: copies are waited for.
            let mut copies = locked(&self.copies);
            let all = copies.waiting.len();
            copies.first(all);
            // SAFETY: the block was allocated with this layout and nothing refers to it any more.
            unsafe { dealloc(address as *mut u8, layout(bytes)) };
        }
    }

    pub(super) fn event(&self) -> Result<u64, Error> {
        let mut copies = locked(&self.copies);
        copies.events += 1;
        Ok(copies.events)
    }

    pub(super) fn destroy_event(&self, _event: u64) {}

    pub(super) fn copy_out(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        locked(&self.copies).waiting.push_back(Copy::Bytes { to, from, bytes });
        Ok(())
    }

    pub(super) fn copy_in(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        self.copy_out(to, from, bytes)
    }

    pub(super) fn record(&self, event: u64) -> Result<(), Error> {
        locked(&self.copies).waiting.push_back(Copy::Event(event));
        Ok(())
    }

    pub(super) fn wait(&self, event: u64) -> Result<(), Error> {
        locked(&self.copies).up_to(event);
        Ok(())
    }

    pub(super) fn finish_copies(&self) -> Result<(), Error> {
        let mut copies = locked(&self.copies);
        let all = copies.waiting.len();
        copies.first(all);
        Ok(())
    }

    /// Does `work`, or captures it.
    fn ask(&self, work: Work) -> Result<(), Error> {
        match &mut locked(&self.records).now {
            Some(record) => record.push(work),
            None => return self.work_now(work),
        }
        Ok(())
    }

    fn work_now(&self, work: Work) -> Result<(), Error> {
        match work {
            Work::Launch(call) => self.launch_now(call),
            Work::Product(product) => self.product_now(product),
            Work::Copy { to, from, bytes } => self.copy_now(to, from, bytes),
            Work::Fill { to, byte, bytes } => self.fill_now(to, byte, bytes),
        }
    }

    /// What goes between host and device would be captured with the host addresses of now.
    fn check_not_capturing(&self, call: &str) -> Result<(), Error> {
        let records = locked(&self.records).now.is_some();
        if records { Err(failed(call, "it cannot be captured")) } else { Ok(()) }
    }

    pub(super) fn begin_capture(&self) -> Result<(), Error> {
        locked(&self.records).now = Some(Vec::new());
        locked(&self.memory).recording = Some(Vec::new());
        Ok(())
    }

    pub(super) fn end_capture(&self) -> (Result<u64, Error>, Vec<u64>) {
        let memory = locked(&self.memory).recording.take().unwrap_or_default();
        let mut records = locked(&self.records);
        records.last += 1;
        let (number, work) = (records.last, records.now.take().unwrap_or_default());
        records.made.insert(number, work);
        (Ok(number), memory)
    }

    pub(super) fn run_graph(&self, graph: u64) -> Result<(), Error> {
        let work = locked(&self.records).made.get(&graph).cloned();
        let work = work.ok_or_else(|| failed("run_graph", "there is no such graph"))?;
        work.into_iter().try_for_each(|work| self.work_now(work))
    }

    pub(super) fn destroy_graph(&self, graph: u64) {
        locked(&self.records).made.remove(&graph);
    }

    pub(super) fn note(&self, text: &str) {
        locked(&self.copies).wrong = Some(failed("capture", text));
    }

    pub(super) fn launch(&self, call: KernelCall) -> Result<(), Error> {
        self.ask(Work::Launch(call))
    }

    #[allow(unsafe_code)]
    fn launch_now(&self, call: KernelCall) -> Result<(), Error> {
        let KernelCall { module, kernel, grid, block, shared, mut values } = call;
        let loaded = self.module(module)?;
        let mut name = kernel.as_bytes().to_vec();
        name.push(0);
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
        let mut message = [0u8; 512];
        let block = [block, 1, 1];
        let loaded = locked(&loaded);
        // SAFETY: all pointers outlive the call, and there are as many arguments as is said; the kernel itself is
        // trusted as far as guard zones do not show that it should not be.
        unsafe {
            (loaded.run)(
                name.as_ptr().cast(),
                grid.as_ptr(),
                block.as_ptr(),
                shared,
                pointers.as_mut_ptr(),
                pointers.len() as u32,
                message.as_mut_ptr().cast(),
                message.len(),
            );
        }
        let end = message.iter().position(|b| *b == 0).unwrap_or(message.len());
        if end > 0 {
            return Err(failed(kernel, String::from_utf8_lossy(&message[..end])));
        }
        self.check_guards(kernel)
    }

    fn module(&self, module: Module) -> Result<Arc<Mutex<Loaded>>, Error> {
        let mut modules = locked(&MODULES);
        if let Some(loaded) = modules.get(&module) {
            return Ok(loaded.clone());
        }
        let loaded = Arc::new(Mutex::new(load(&self.build(module)?)?));
        modules.insert(module, loaded.clone());
        Ok(loaded)
    }

    /// Compiles `module` unless that was done before.
    fn build(&self, module: Module) -> Result<PathBuf, Error> {
        let kernels = module.source.kernels();
        let entries: Vec<String> =
            kernels.iter().map(|k| format!("{{\"{k}\", emu::Invoke<{k}>::call, emu::Invoke<{k}>::count}}")).collect();
        let text = format!(
            "{HEADER}\n{}\nstatic const emu::Entry entries[] = {{{}}};\n\
             extern \"C\" void run(const char *name, const unsigned *grid, const unsigned *block, size_t shared, void **args,\n\
             unsigned num_args, char *message, size_t size) {{\n\
             emu_run(entries, {}, name, grid, block, shared, args, num_args, message, size); }}\n",
            module.text(),
            entries.join(", "),
            kernels.len()
        );
        const FLAGS: [&str; 8] = [
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-fno-strict-aliasing",
            "-w",
            "-fno-exceptions",
            "-U_FORTIFY_SOURCE",
        ];
        let hash: String =
            Sha256::digest(format!("{FLAGS:?}{text}")).iter().take(12).map(|b| format!("{b:02x}")).collect();
        let path = self.folder.join(format!("{}-{hash}.so", module.name()));
        if path.exists() {
            return Ok(path);
        }
        // Tests run in several processes and threads: each builds under a name of its own, and the last one wins.
        let thread = format!("{:?}", std::thread::current().id()).replace(['(', ')'], "");
        let stem = format!("{}-{}-{thread}", module.name(), std::process::id());
        let (source, built) = (self.folder.join(format!("{stem}.cpp")), self.folder.join(format!("{stem}.so")));
        let io = |e: std::io::Error| Error::Cache { path: source.clone(), what: e.to_string() };
        std::fs::write(&source, text).map_err(io)?;
        let output = Command::new("c++").args(FLAGS).arg("-o").arg(&built).arg(&source).output().map_err(io)?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Error::Compile { module: module.name(), architecture: "C++".into(), log });
        }
        std::fs::rename(&built, &path).map_err(io)?;
        std::fs::remove_file(&source).map_err(io)?;
        Ok(path)
    }

    pub(super) fn gemm(&self, product: Product) -> Result<(), Error> {
        self.ask(Work::Product(product))
    }

    fn product_now(&self, product: Product) -> Result<(), Error> {
        let Product { m, n, k, alpha, a, b, beta, c, tf32 } = product;
        let (mut a, mut b) = (values(a, m, k), values(b, k, n));
        if tf32 {
            // Cut off, which is the worst that rounding to TF32 can be.
            a.iter_mut().chain(&mut b).for_each(|x| *x = f32::from_bits(x.to_bits() & !0x1FFF));
        }
        for i in 0..m {
            for j in 0..n {
                let sum: f32 = (0..k).map(|x| a[i * k + x] * b[x * n + j]).sum();
                // With a factor of 0 what is there is not read: it may be NaN.
                let before = if beta == 0.0 { 0.0 } else { beta * get(c, i, j) };
                set(c, i, j, alpha * sum + before);
            }
        }
        self.check_guards("gemm")
    }
}

/// The operand as the product sees it, [rows, cols].
fn values(matrix: Operand, rows: usize, cols: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| if matrix.transposed { get(matrix, j, i) } else { get(matrix, i, j) };
    (0..rows).flat_map(|i| (0..cols).map(move |j| at(i, j))).collect()
}

/// Element (i, j) of `matrix` as it is stored.
#[allow(unsafe_code)]
fn get(matrix: Operand, i: usize, j: usize) -> f32 {
    let at = (i * matrix.stride + j) * matrix.dtype.bytes();
    let address = matrix.address + at as u64;
    // SAFETY: `Gemm::check` has shown that every element lies in its buffer, which is memory of this process.
    unsafe {
        match matrix.dtype {
            Dtype::F32 => (address as *const f32).read_unaligned(),
            Dtype::BF16 => (address as *const bf16).read_unaligned().to_f32(),
        }
    }
}

#[allow(unsafe_code)]
fn set(matrix: Operand, i: usize, j: usize, value: f32) {
    let at = (i * matrix.stride + j) * matrix.dtype.bytes();
    let address = matrix.address + at as u64;
    // SAFETY: as for reading.
    unsafe {
        match matrix.dtype {
            Dtype::F32 => (address as *mut f32).write_unaligned(value),
            Dtype::BF16 => (address as *mut bf16).write_unaligned(bf16::from_f32(value)),
        }
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * ZONE, 256)
        .unwrap_or_else(|_| std::alloc::handle_alloc_error(Layout::new::<u8>()))
}

#[allow(unsafe_code)]
fn load(path: &Path) -> Result<Loaded, Error> {
    let error = |e: libloading::Error| failed("loading a module", e);
    // SAFETY: the library was built from this crate's sources and has no initialisers.
    let library = unsafe { libloading::Library::new(path) }.map_err(error)?;
    // SAFETY: the function is generated with this signature.
    let run = *unsafe { library.get::<Run>(b"run") }.map_err(error)?;
    Ok(Loaded { run, _library: library })
}
