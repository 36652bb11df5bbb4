//! The driver's interface, as far as it is used: one device, its primary context, one stream.

use super::archive::{self, Archive};
use super::compiler::Compiler;
use super::cublaslt::CublasLt;
use super::error::Error;
use super::kernels::Module;
use super::library::{Library, Search, functions};
use super::work::{KernelCall, Product, allocated, locked};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, OnceLock};

/// How a GPU is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the libraries are looked for.
    pub search: Search,
    /// Folder of compiled kernels; `None` compiles them in every process.
    pub cache: Option<PathBuf>,
    /// Kernels that need not be compiled.
    pub archive: Archive,
    /// Is told, once, when kernels are compiled since the archive does not have them.
    pub notice: Option<fn(&str)>,
}

functions! {
    /// The functions of the driver that are used.
    Api, Library::Driver;
    init = "cuInit"(c_uint);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    error_name = "cuGetErrorName"(c_int, *mut *const c_char);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_uint, c_int);
    context_retain = "cuDevicePrimaryCtxRetain"(*mut *mut c_void, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
    context_set = "cuCtxSetCurrent"(*mut c_void);
    stream_create = "cuStreamCreate"(*mut *mut c_void, c_uint);
    stream_destroy = "cuStreamDestroy_v2"(*mut c_void);
    stream_synchronize = "cuStreamSynchronize"(*mut c_void);
    memory_allocate = "cuMemAlloc_v2"(*mut u64, usize);
    memory_free = "cuMemFree_v2"(u64);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    copy_to_device = "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, *mut c_void);
    copy_to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, u64, usize, *mut c_void);
    copy_on_device = "cuMemcpyDtoDAsync_v2"(u64, u64, usize, *mut c_void);
    host_allocate = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost"(*mut c_void);
    event_create = "cuEventCreate"(*mut *mut c_void, c_uint);
    event_destroy = "cuEventDestroy_v2"(*mut c_void);
    event_record = "cuEventRecord"(*mut c_void, *mut c_void);
    stream_wait = "cuStreamWaitEvent"(*mut c_void, *mut c_void, c_uint);
    capture_begin = "cuStreamBeginCapture_v2"(*mut c_void, c_uint);
    capture_end = "cuStreamEndCapture"(*mut c_void, *mut *mut c_void);
    graph_instantiate = "cuGraphInstantiateWithFlags"(*mut *mut c_void, *mut c_void, u64);
    graph_launch = "cuGraphLaunch"(*mut c_void, *mut c_void);
    graph_destroy = "cuGraphDestroy"(*mut c_void);
    graph_run_destroy = "cuGraphExecDestroy"(*mut c_void);
    fill = "cuMemsetD8Async"(u64, u8, usize, *mut c_void);
    module_load = "cuModuleLoadData"(*mut *mut c_void, *const c_void);
    module_unload = "cuModuleUnload"(*mut c_void);
    module_function = "cuModuleGetFunction"(*mut *mut c_void, *mut c_void, *const c_char);
    function_attribute = "cuFuncSetAttribute"(*mut c_void, c_uint, c_int);
    launch = "cuLaunchKernel"(
        *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void, *mut *mut c_void
    );
}

/// Shared memory that a kernel may use without asking.
const SHARED_BY_DEFAULT: usize = 48 * 1024;

/// The first release whose driver is enough: CUDA 12.0.
const OLDEST_DRIVER: c_int = 12_000;

const OUT_OF_MEMORY: i32 = 2;

/// Of a stream: it does not wait for the default stream.
const NON_BLOCKING: c_uint = 1;

/// Of a capture: calls that are no work of a stream, such as allocations, are allowed meanwhile.
const RELAXED: c_uint = 2;

/// Of an event: it has no time.
const NO_TIMING: c_uint = 2;

/// A handle of the driver, which may be used from any thread once its context is current there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Handle(*mut c_void);
// SAFETY: the driver's functions are thread-safe, and every use makes the context current on the calling thread first.
#[allow(unsafe_code)]
unsafe impl Send for Handle {}

pub(super) struct Driver {
    // Libraries that use the driver are closed before it.
    cublas: CublasLt,
    /// Opened when something has to be compiled.
    compiler: OnceLock<Compiler>,
    search: Search,
    newest: u32,
    archive: Archive,
    notice: Option<fn(&str)>,
    told: OnceLock<()>,
    /// Whose code of the archive this device runs.
    archived: Option<&'static str>,
    cache: Option<PathBuf>,
    architecture: String,
    name: String,
    device: c_int,
    context: Mutex<Handle>,
    stream: Mutex<Handle>,
    /// Made when something is copied beside the work.
    copies: Mutex<Option<Copies>>,
    modules: Mutex<HashMap<Module, Handle>>,
    functions: Mutex<HashMap<(Module, &'static str), Function>>,
    memory: Mutex<Memory>,
    api: Api,
}

/// A loaded kernel and the shared memory that it may use.
type Function = (Handle, usize);

/// The stream of copies between the device and host memory, and the event that makes it wait for the work.
#[derive(Clone, Copy)]
struct Copies {
    stream: Handle,
    before: Handle,
}

/// What is held on the device. Freed memory is kept for the next buffer of that size: work is in one stream, so
/// whatever still uses it is done before the next use begins.
#[derive(Default)]
struct Memory {
    sizes: HashMap<u64, usize>,
    free: BTreeMap<usize, Vec<u64>>,
    held: usize,
    used: usize,
    peak: usize,
    /// During capture: what was freed since, for the graph alone.
    recording: Option<BTreeMap<usize, Vec<u64>>>,
}

impl Driver {
    #[allow(unsafe_code)]
    pub(super) fn open(ordinal: usize, options: &Options) -> Result<Self, Error> {
        let (library, path) = options.search.open(Library::Driver, 0)?;
        let api = Api::load(library, &path)?;
        let mut version = 0;
        // SAFETY: the pointer is to an integer that outlives the call; this needs no initialisation.
        check(&api, "cuDriverGetVersion", unsafe { (api.driver_version)(&mut version) })?;
        if version < OLDEST_DRIVER {
            return Err(Error::TooOld {
                library: Library::Driver.name(),
                path,
                found: format!("it is a driver for CUDA {}.{}", version / 1000, version % 1000 / 10),
                needed: "one for CUDA 12.0 or later (version 525)".into(),
                remedy: Library::Driver.remedy(),
            });
        }
        // SAFETY: initialisation takes no pointers and may be repeated.
        check(&api, "cuInit", unsafe { (api.init)(0) })?;
        let mut count = 0;
        // SAFETY: the driver is initialised; the pointer is to an integer.
        check(&api, "cuDeviceGetCount", unsafe { (api.device_count)(&mut count) })?;
        if ordinal >= count as usize {
            return Err(Error::NoDevice { ordinal, count: count as usize });
        }
        let mut device = 0;
        // SAFETY: as above; the ordinal is below the count.
        check(&api, "cuDeviceGet", unsafe { (api.device_get)(&mut device, ordinal as c_int) })?;
        let name = device_name(&api, device)?;
        let attribute = |attribute: CUdevice_attribute| {
            let mut value = 0;
            // SAFETY: the device exists; the pointer is to an integer.
            let status = unsafe { (api.device_attribute)(&mut value, attribute as c_uint, device) };
            check(&api, "cuDeviceGetAttribute", status).map(|()| value)
        };
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(Error::TooSmall { name, major, minor });
        }
        let newest = (version / 1000) as u32;
        let archived = archive::runs(major, minor);
        let compiler = OnceLock::new();
        // What is missing is said at once, not in the middle of the work.
        if !archived.is_some_and(|architecture| options.archive.is_complete(architecture)) {
            let _ = compiler.set(Compiler::open(&options.search, newest)?);
        }
        let cublas = CublasLt::open(&options.search, newest)?;
        let (mut context, mut stream) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the device exists; the context is released when this value is dropped.
        check(&api, "cuDevicePrimaryCtxRetain", unsafe { (api.context_retain)(&mut context, device) })?;
        // SAFETY: the context was retained.
        check(&api, "cuCtxSetCurrent", unsafe { (api.context_set)(context) })?;
        // SAFETY: a context is current; the stream is destroyed when this value is dropped.
        check(&api, "cuStreamCreate", unsafe { (api.stream_create)(&mut stream, NON_BLOCKING) })?;
        Ok(Self {
            cublas,
            compiler,
            search: options.search.clone(),
            newest,
            archive: options.archive.clone(),
            notice: options.notice,
            told: OnceLock::new(),
            archived,
            cache: options.cache.clone(),
            architecture: archive::native(major, minor),
            name,
            device,
            context: Mutex::new(Handle(context)),
            stream: Mutex::new(Handle(stream)),
            copies: Mutex::default(),
            modules: Mutex::default(),
            functions: Mutex::default(),
            memory: Mutex::default(),
            api,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn memory(&self) -> (usize, usize) {
        let memory = locked(&self.memory);
        (memory.used, memory.peak)
    }

    #[allow(unsafe_code)]
    pub(super) fn free_memory(&self) -> Result<Option<usize>, Error> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a context is current; the pointers are to integers that outlive the call.
        self.check("cuMemGetInfo", unsafe { (self.api.memory_info)(&mut free, &mut total) })?;
        Ok(Some(free))
    }

    pub(super) fn reset_peak(&self) {
        let mut memory = locked(&self.memory);
        memory.peak = memory.used;
    }

    /// Makes the context current on this thread and returns the stream.
    #[allow(unsafe_code)]
    fn enter(&self) -> Result<*mut c_void, Error> {
        let context = locked(&self.context).0;
        // SAFETY: the context is retained for as long as this value lives.
        self.check("cuCtxSetCurrent", unsafe { (self.api.context_set)(context) })?;
        Ok(locked(&self.stream).0)
    }

    fn check(&self, call: &str, status: i32) -> Result<(), Error> {
        check(&self.api, call, status)
    }

    #[allow(unsafe_code)]
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: the stream is alive.
        self.check("cuStreamSynchronize", unsafe { (self.api.stream_synchronize)(stream) })
    }

    #[allow(unsafe_code)]
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        self.enter()?;
        let size = allocated(bytes);
        let mut memory = locked(&self.memory);
        if let Some(address) = memory.recording.as_mut().and_then(|own| own.get_mut(&size)).and_then(Vec::pop) {
            return Ok(address);
        }
        let reused = memory.free.get_mut(&size).and_then(Vec::pop);
        let address = match reused {
            Some(address) => address,
            None => {
                let mut address = 0;
                // SAFETY: a context is current; the pointer is to an integer that outlives the call.
                let mut status = unsafe { (self.api.memory_allocate)(&mut address, size) };
                if status == OUT_OF_MEMORY {
                    self.release_free(&mut memory)?;
                    // SAFETY: as above.
                    status = unsafe { (self.api.memory_allocate)(&mut address, size) };
                }
                if status == OUT_OF_MEMORY {
                    return Err(Error::OutOfMemory { bytes: size, held: memory.held });
                }
                self.check("cuMemAlloc", status)?;
                memory.held += size;
                address
            }
        };
        memory.sizes.insert(address, size);
        memory.used += size;
        memory.peak = memory.peak.max(memory.used);
        Ok(address)
    }

    /// Gives kept memory back to the device.
    #[allow(unsafe_code)]
    fn release_free(&self, memory: &mut Memory) -> Result<(), Error> {
        for (size, addresses) in std::mem::take(&mut memory.free) {
            for address in addresses {
                // SAFETY: the address came from the allocator and belongs to no buffer; freeing waits for work that
                // uses it.
                self.check("cuMemFree", unsafe { (self.api.memory_free)(address) })?;
                memory.held -= size;
            }
        }
        Ok(())
    }

    pub(super) fn free(&self, address: u64) {
        let mut memory = locked(&self.memory);
        if let Memory { recording: Some(own), sizes, .. } = &mut *memory
            && let Some(size) = sizes.get(&address)
        {
            return own.entry(*size).or_default().push(address);
        }
        if let Some(size) = memory.sizes.remove(&address) {
            memory.used -= size;
            memory.free.entry(size).or_default().push(address);
        }
    }

    #[allow(unsafe_code)]
    pub(super) fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: the caller has checked that the range lies in a buffer. Pageable memory is staged before the call
        // returns.
        let status = unsafe { (self.api.copy_to_device)(to, from.as_ptr().cast(), from.len(), stream) };
        self.check("cuMemcpyHtoDAsync", status)
    }

    #[allow(unsafe_code)]
    pub(super) fn download(&self, from: u64, to: &mut [u8]) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: the caller has checked that the range lies in a buffer; the copy is waited for below.
        let status = unsafe { (self.api.copy_to_host)(to.as_mut_ptr().cast(), from, to.len(), stream) };
        self.check("cuMemcpyDtoHAsync", status)?;
        self.synchronize()
    }

    #[allow(unsafe_code)]
    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: the caller has checked that both ranges lie in buffers.
        self.check("cuMemcpyDtoDAsync", unsafe { (self.api.copy_on_device)(to, from, bytes, stream) })
    }

    #[allow(unsafe_code)]
    pub(super) fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: the caller has checked that the range lies in a buffer.
        self.check("cuMemsetD8Async", unsafe { (self.api.fill)(to, byte, bytes, stream) })
    }

    #[allow(unsafe_code)]
    pub(super) fn allocate_host(&self, bytes: usize) -> Result<u64, Error> {
        self.enter()?;
        let mut address = ptr::null_mut();
        // SAFETY: a context is current; the pointer is to a pointer that outlives the call.
        let status = unsafe { (self.api.host_allocate)(&mut address, bytes, 0) };
        if status == OUT_OF_MEMORY {
            return Err(Error::OutOfHostMemory { bytes });
        }
        self.check("cuMemHostAlloc", status)?;
        Ok(address as u64)
    }

    /// Gives host memory back. Nothing useful can be done about failures.
    #[allow(unsafe_code)]
    pub(super) fn free_host(&self, address: u64) {
        if self.finish_copies().is_ok() {
            // SAFETY: the address came from `cuMemHostAlloc`, and no copy uses it any more.
            unsafe { (self.api.host_free)(address as *mut c_void) };
        }
    }

    #[allow(unsafe_code)]
    pub(super) fn event(&self) -> Result<u64, Error> {
        self.enter()?;
        let mut event = ptr::null_mut();
        // SAFETY: a context is current; the pointer is to a pointer that outlives the call.
        self.check("cuEventCreate", unsafe { (self.api.event_create)(&mut event, NO_TIMING) })?;
        Ok(event as u64)
    }

    #[allow(unsafe_code)]
    pub(super) fn destroy_event(&self, event: u64) {
        if self.enter().is_ok() {
            // SAFETY: the event was created and is not used again; the driver keeps what work still needs of it.
            unsafe { (self.api.event_destroy)(event as *mut c_void) };
        }
    }

    /// The stream of copies; makes it at the first call.
    #[allow(unsafe_code)]
    fn copies(&self) -> Result<Copies, Error> {
        let mut copies = locked(&self.copies);
        if let Some(copies) = *copies {
            return Ok(copies);
        }
        let before = Handle(self.event()? as *mut c_void);
        let mut stream = ptr::null_mut();
        // SAFETY: a context is current; the stream is destroyed when this value is dropped.
        self.check("cuStreamCreate", unsafe { (self.api.stream_create)(&mut stream, NON_BLOCKING) })?;
        Ok(*copies.insert(Copies { stream: Handle(stream), before }))
    }

    /// The stream of copies, which waits for the work that was asked for up to now.
    #[allow(unsafe_code)]
    fn copies_after_work(&self) -> Result<*mut c_void, Error> {
        let stream = self.enter()?;
        let Copies { stream: copies, before } = self.copies()?;
        // SAFETY: both streams and the event are alive; a wait is for the event as it was recorded last, so that it may
        // be recorded again.
        self.check("cuEventRecord", unsafe { (self.api.event_record)(before.0, stream) })?;
        // SAFETY: as above.
        self.check("cuStreamWaitEvent", unsafe { (self.api.stream_wait)(copies.0, before.0, 0) })?;
        Ok(copies.0)
    }

    #[allow(unsafe_code)]
    pub(super) fn copy_out(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        let copies = self.copies_after_work()?;
        // SAFETY: the caller has checked that both ranges lie in their buffers, and the host memory is pinned; whoever
        // uses either of them waits for an event.
        self.check("cuMemcpyDtoHAsync", unsafe { (self.api.copy_to_host)(to as *mut c_void, from, bytes, copies) })
    }

    #[allow(unsafe_code)]
    pub(super) fn copy_in(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        let copies = self.copies_after_work()?;
        // SAFETY: as for copies to host memory.
        self.check("cuMemcpyHtoDAsync", unsafe { (self.api.copy_to_device)(to, from as *const c_void, bytes, copies) })
    }

    #[allow(unsafe_code)]
    pub(super) fn record(&self, event: u64) -> Result<(), Error> {
        self.enter()?;
        let copies = self.copies()?.stream;
        // SAFETY: event and stream are alive.
        self.check("cuEventRecord", unsafe { (self.api.event_record)(event as *mut c_void, copies.0) })
    }

    #[allow(unsafe_code)]
    pub(super) fn wait(&self, event: u64) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: event and stream are alive; an event that was never recorded is not waited for.
        self.check("cuStreamWaitEvent", unsafe { (self.api.stream_wait)(stream, event as *mut c_void, 0) })
    }

    #[allow(unsafe_code)]
    pub(super) fn finish_copies(&self) -> Result<(), Error> {
        let Some(Copies { stream, .. }) = *locked(&self.copies) else { return Ok(()) };
        self.enter()?;
        // SAFETY: the stream is alive.
        self.check("cuStreamSynchronize", unsafe { (self.api.stream_synchronize)(stream.0) })
    }

    /// From now on work is captured.
    #[allow(unsafe_code)]
    pub(super) fn begin_capture(&self) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: the stream is alive.
        self.check("cuStreamBeginCapture", unsafe { (self.api.capture_begin)(stream, RELAXED) })?;
        locked(&self.memory).recording = Some(BTreeMap::new());
        Ok(())
    }

    /// Ends the capture and makes the graph ready to run; also the memory that is its own.
    #[allow(unsafe_code)]
    pub(super) fn end_capture(&self) -> (Result<u64, Error>, Vec<u64>) {
        let memory = locked(&self.memory).recording.take().unwrap_or_default().into_values().flatten().collect();
        let end = || {
            let stream = self.enter()?;
            let (mut graph, mut run) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the stream is alive and being captured; the pointer is to a pointer that outlives the call.
            self.check("cuStreamEndCapture", unsafe { (self.api.capture_end)(stream, &mut graph) })?;
            // SAFETY: as above; the graph was just made.
            let status = unsafe { (self.api.graph_instantiate)(&mut run, graph, 0) };
            // SAFETY: what was instantiated does not need the graph.
            unsafe { (self.api.graph_destroy)(graph) };
            self.check("cuGraphInstantiate", status)?;
            Ok(run as u64)
        };
        (end(), memory)
    }

    #[allow(unsafe_code)]
    pub(super) fn run_graph(&self, graph: u64) -> Result<(), Error> {
        let stream = self.enter()?;
        // SAFETY: graph and stream are alive, and so is the memory that the graph uses: its own, and what its key
        // names.
        self.check("cuGraphLaunch", unsafe { (self.api.graph_launch)(graph as *mut c_void, stream) })
    }

    /// Nothing useful can be done about failures.
    #[allow(unsafe_code)]
    pub(super) fn destroy_graph(&self, graph: u64) {
        // It may be running.
        if self.synchronize().is_ok() {
            // SAFETY: the graph is not used any more.
            unsafe { (self.api.graph_run_destroy)(graph as *mut c_void) };
        }
    }

    /// Tells the user.
    pub(super) fn note(&self, text: &str) {
        if let Some(notice) = self.notice {
            notice(text);
        }
    }

    #[allow(unsafe_code)]
    pub(super) fn launch(&self, mut call: KernelCall) -> Result<(), Error> {
        let function = self.function(call.module, call.kernel, call.shared)?;
        let stream = self.enter()?;
        let mut pointers: Vec<*mut c_void> = call.values.iter_mut().map(|v| ptr::from_mut(v).cast()).collect();
        let [x, y, z] = call.grid;
        // SAFETY: the function is loaded in the current context; each pointer is to a value of at least the size of its
        // parameter (little-endian, so that smaller ones are its first bytes), copied before the call returns. That
        // number, order and types of arguments are those of the kernel is tested by running every launcher on the
        // emulator, which compares their number, and its results.
        let status = unsafe {
            (self.api.launch)(
                function.0,
                x,
                y,
                z,
                call.block,
                1,
                1,
                call.shared as c_uint,
                stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.check(call.kernel, status)
    }

    /// The loaded kernel, allowed to use `shared` bytes of shared memory.
    #[allow(unsafe_code)]
    fn function(&self, module: Module, kernel: &'static str, shared: usize) -> Result<Handle, Error> {
        let mut functions = locked(&self.functions);
        let (function, allowed) = match functions.get(&(module, kernel)) {
            Some(found) => *found,
            None => {
                let loaded = self.module(module)?;
                let name = CString::new(kernel).unwrap_or_default();
                let mut function = ptr::null_mut();
                // SAFETY: the module is loaded, and the name is a C string.
                let status = unsafe { (self.api.module_function)(&mut function, loaded.0, name.as_ptr()) };
                self.check(kernel, status)?;
                (Handle(function), SHARED_BY_DEFAULT)
            }
        };
        let allowed = if shared > allowed {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
            // SAFETY: the function is loaded in the current context.
            let status = unsafe { (self.api.function_attribute)(function.0, attribute, shared as c_int) };
            self.check(&format!("{kernel} with {shared} bytes of shared memory"), status)?;
            shared
        } else {
            allowed
        };
        functions.insert((module, kernel), (function, allowed));
        Ok(function)
    }

    fn compiler(&self) -> Result<&Compiler, Error> {
        if let Some(compiler) = self.compiler.get() {
            return Ok(compiler);
        }
        let compiler = Compiler::open(&self.search, self.newest)?;
        Ok(self.compiler.get_or_init(|| compiler))
    }

    #[allow(unsafe_code)]
    fn module(&self, module: Module) -> Result<Handle, Error> {
        let mut modules = locked(&self.modules);
        if let Some(loaded) = modules.get(&module) {
            return Ok(*loaded);
        }
        let code = match self.archived.and_then(|architecture| self.archive.find(&module, architecture)) {
            // In memory of its own: code must be aligned, and inside an archive it is not.
            Some(code) => code.to_vec(),
            None => {
                if let Some(notice) = self.notice.filter(|_| self.told.set(()).is_ok()) {
                    notice(&format!("kernels for {} are compiled by NVRTC at first use", self.architecture));
                }
                let compiler = self.compiler()?;
                match &self.cache {
                    Some(folder) => compiler.compile_cached(&module, &self.architecture, folder)?,
                    None => compiler.compile(&module, &self.architecture)?,
                }
            }
        };
        self.enter()?;
        let mut loaded = ptr::null_mut();
        // SAFETY: a context is current; the image is a whole cubin, whose header says how long it is.
        let status = unsafe { (self.api.module_load)(&mut loaded, code.as_ptr().cast()) };
        self.check(&module.name(), status)?;
        modules.insert(module, Handle(loaded));
        Ok(Handle(loaded))
    }

    pub(super) fn gemm(&self, product: Product) -> Result<(), Error> {
        let stream = self.enter()?;
        self.cublas.gemm(&product, stream, |bytes| self.allocate(bytes))
    }
}

impl Drop for Driver {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // Nothing useful can be done about failures here: the process gives everything back when it ends.
        if self.synchronize().is_err() || self.finish_copies().is_err() {
            return;
        }
        self.cublas.close();
        // Buffers keep the device alive, so that what is left belongs to the device itself: the workspace of products.
        let left: Vec<u64> = locked(&self.memory).sizes.keys().copied().collect();
        left.into_iter().for_each(|address| self.free(address));
        let _ = self.release_free(&mut locked(&self.memory));
        for (_, module) in locked(&self.modules).drain() {
            // SAFETY: the module is loaded and nothing runs any more.
            unsafe { (self.api.module_unload)(module.0) };
        }
        if let Some(Copies { stream, before }) = locked(&self.copies).take() {
            // SAFETY: both are alive and not used after this.
            unsafe {
                (self.api.event_destroy)(before.0);
                (self.api.stream_destroy)(stream.0);
            }
        }
        let stream = locked(&self.stream).0;
        // SAFETY: stream and context are alive and not used after this.
        unsafe {
            (self.api.stream_destroy)(stream);
            (self.api.context_release)(self.device);
        }
    }
}

fn check(api: &Api, call: &str, status: i32) -> Result<(), Error> {
    if status == 0 { Ok(()) } else { Err(Error::Call { call: call.into(), what: error_name(api, status) }) }
}

#[allow(unsafe_code)]
fn error_name(api: &Api, status: i32) -> String {
    let mut name = ptr::null();
    // SAFETY: the pointer outlives the call.
    let known = unsafe { (api.error_name)(status, &mut name) } == 0 && !name.is_null();
    if !known {
        return format!("status {status}");
    }
    // SAFETY: the driver returned a C string that lives as long as the library.
    let name = unsafe { CStr::from_ptr(name) };
    format!("{} ({status})", name.to_string_lossy())
}

#[allow(unsafe_code)]
fn device_name(api: &Api, device: c_int) -> Result<String, Error> {
    let mut name = [0u8; 256];
    // SAFETY: the device exists; the buffer is as long as is said.
    let status = unsafe { (api.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
    check(api, "cuDeviceGetName", status)?;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}
