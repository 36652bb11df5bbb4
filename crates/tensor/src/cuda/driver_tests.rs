//! The driver's back end against libraries that are made for the test: what is missing, too old or too small is an
//! error with the way out, and what works is asked for in the right order.
#![cfg(target_os = "linux")]

use super::gemm::{Gemm, Matrix};
use super::gpu::{Arg, Launch};
use super::kernels::{Module, Source};
use super::{Error, Gpu, Options, Search};
use crate::{Device, Dtype, Tensor};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Functions of the driver that need no more than to succeed.
const QUIET: [&str; 9] = [
    "cuInit",
    "cuCtxSetCurrent",
    "cuStreamDestroy_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuStreamSynchronize",
    "cuModuleUnload",
    "cuFuncSetAttribute",
    "cuDeviceGet",
    "cuEventDestroy_v2",
];

/// The rest of a driver: memory is the process's, the one kernel writes its second argument to where its first points.
const DRIVER: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long u64;
/* What was asked of the stream of copies (4) and of the other one (2) on its account. */
char journal[2000];
static void note(const char *what, u64 a, u64 b) { sprintf(journal + strlen(journal), "%s %llu %llu, ", what, a, b); }
int cuDriverGetVersion(int *v) { *v = VERSION; return 0; }
int cuGetErrorName(int e, const char **name) { *name = "CUDA_ERROR_OF_THE_TEST"; return e == 700 ? 0 : 1; }
int cuDeviceGetCount(int *n) { *n = DEVICES; return 0; }
int cuDeviceGetName(char *name, int len, int device) { strncpy(name, "Fake GPU", len); return 0; }
int cuDeviceGetAttribute(int *value, unsigned what, int device) { *value = what == 75 ? MAJOR : 6; return 0; }
static int streams;
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; streams = 0; return 0; }
int cuStreamCreate(void **stream, unsigned flags) {
    *stream = (void *)(streams++ ? 4ull : 2ull);
    return flags != 1;
}
int cuEventCreate(void **event, unsigned flags) {
    static u64 events = 10;
    *event = (void *)events++;
    return flags != 2;
}
int cuEventRecord(void *event, void *stream) { note("record", (u64)event, (u64)stream); return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { note("wait", (u64)stream, (u64)event); return flags; }
int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    if (bytes > (1ull << 40)) return 2;
    *address = malloc(bytes);
    return flags;
}
int cuMemFreeHost(void *address) { free(address); return 0; }
static int stream_of_copy(const char *way, size_t n, void *stream) {
    if (stream == (void *)4) note(way, n, 4);
    return stream != (void *)2 && stream != (void *)4;
}
int cuMemAlloc_v2(u64 *address, size_t bytes) {
    if (bytes > (1ull << 40)) return 2;
    *address = (u64)aligned_alloc(256, bytes);
    return 0;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 79ull << 30; *total = 80ull << 30; return 0; }
int cuMemFree_v2(u64 address) { free((void *)address); return 0; }
int cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t n, void *s) { memcpy((void *)to, from, n); return stream_of_copy("in", n, s); }
int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t n, void *s) { memcpy(to, (void *)from, n); return stream_of_copy("out", n, s); }
int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t n, void *s) { memmove((void *)to, (void *)from, n); return s != (void *)2; }
int cuMemsetD8Async(u64 to, unsigned char byte, size_t n, void *s) { memset((void *)to, byte, n); return s != (void *)2; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)3; return memcmp(image, "cubin for", 9); }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)name; return module != (void *)3; }
/* Launches that were captured, and whether the stream is being captured. */
static struct { float *out, value, sizes, shared; } recorded[4];
static int num_recorded, records;
static void write(int i) {
    recorded[i].out[0] = recorded[i].value;
    recorded[i].out[1] = recorded[i].sizes;
    recorded[i].out[2] = recorded[i].shared;
}
int cuStreamBeginCapture_v2(void *stream, unsigned mode) {
    note("begin", (u64)stream, mode);
    num_recorded = 0;
    return records++;
}
int cuStreamEndCapture(void *stream, void **graph) { note("end", (u64)stream, 0); *graph = (void *)20; return !records--; }
int cuGraphInstantiateWithFlags(void **run, void *graph, u64 flags) { *run = (void *)21; return graph != (void *)20 || flags; }
int cuGraphDestroy(void *graph) { note("destroy", (u64)graph, 0); return 0; }
int cuGraphExecDestroy(void *run) { note("destroy", (u64)run, 0); return 0; }
int cuGraphLaunch(void *run, void *stream) {
    note("run", (u64)run, (u64)stream);
    for (int i = 0; i < num_recorded; i++) write(i);
    return records;
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **args, void **extra) {
    if (gx == 13) return 700;
    int i = records ? num_recorded++ : 3;
    recorded[i].out = *(float **)args[0];
    recorded[i].value = *(float *)args[1];
    recorded[i].sizes = gx * 10000 + gy * 1000 + gz * 100 + bx;
    recorded[i].shared = shared;
    if (!records) write(i);
    return by != 1 || bz != 1 || stream != (void *)2;
}
"#;

const NVRTC: &str = r#"
#include <stdio.h>
#include <string.h>
static char text[99];
int nvrtcVersion(int *major, int *minor) { *major = NVRTC_MAJOR; *minor = 8; return 0; }
int nvrtcCreateProgram(void **p, const char *source, const char *name, int n, void *h, void *i) { *p = text; return 0; }
int nvrtcCompileProgram(void *p, int n, const char **options) {
    snprintf(text, sizeof(text), "cubin for %s", options[n - 1]);
    return NVRTC_STATUS;
}
int nvrtcGetProgramLogSize(void *p, size_t *n) { *n = 9; return 0; }
int nvrtcGetProgramLog(void *p, char *log) { memcpy(log, "bad code", 9); return 0; }
int nvrtcGetCUBINSize(void *p, size_t *n) { *n = strlen(text) + 1; return 0; }
int nvrtcGetCUBIN(void *p, char *out) { strcpy(out, text); return 0; }
int nvrtcDestroyProgram(void **p) { return 0; }
"#;

/// Products by plain loops over what was described: column-major matrices with leading dimensions.
const CUBLASLT: &str = r#"
#include <stdlib.h>
#include <string.h>
typedef struct { int transposed[2]; unsigned compute; } Desc;
typedef struct { unsigned type; unsigned long long rows, cols; long long ld; } Layout;
int cublasLtCreate(void **h) { *h = (void *)5; return 0; }
int cublasLtDestroy(void *h) { return 0; }
int cublasLtMatmulDescCreate(void **d, unsigned compute, unsigned scale) {
    *d = calloc(1, sizeof(Desc));
    ((Desc *)*d)->compute = compute;
    return (compute != 68 && compute != 77) || scale != 0;
}
int cublasLtMatmulDescSetAttribute(void *d, unsigned a, const int *v, size_t n) {
    if (n != 4) return 1;
    ((Desc *)d)->transposed[a - 3] = *v;
    return 0;
}
int cublasLtMatmulDescDestroy(void *d) { free(d); return 0; }
int cublasLtMatrixLayoutCreate(void **l, unsigned type, unsigned long long rows, unsigned long long cols, long long ld) {
    Layout *made = malloc(sizeof(Layout));
    Layout value = {type, rows, cols, ld};
    *made = value;
    *l = made;
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *l) { free(l); return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = (void *)6; return 0; }
int cublasLtMatmulPreferenceSetAttribute(void *p, unsigned a, const void *v, size_t n) { return n != (a == 1 ? 8 : 4); }
int cublasLtMatmulPreferenceDestroy(void *p) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, Layout *a, Layout *b, Layout *c, Layout *e, void *p, int n, char *found,
                                   int *count) {
    memset(found, 0, 96);
    *count = a->rows != 1;
    return n != 1 || c != e;
}
/* With CUBLAS_COMPUTE_32F_FAST_TF32 (77) factors lose their last 13 bits; bf16 (14) is never asked for that way. */
static unsigned kept;
static float at(const float *x, Layout *l, int i, int j) {
    union { float x; unsigned bits; } value = {x[i + j * l->ld]};
    value.bits &= kept;
    return value.x;
}
int cublasLtMatmul(void *h, Desc *d, const float *alpha, const float *a, Layout *la, const float *b, Layout *lb,
                   const float *beta, const float *c, Layout *lc, float *out, Layout *lo, const void *algo, void *workspace,
                   size_t bytes, void *stream) {
    int k = d->transposed[0] ? la->rows : la->cols;
    if (c != out || !workspace || bytes != 32 << 20 || stream != (void *)2) return 1;
    if (la->type == 14) return d->compute != 68;
    kept = d->compute == 77 ? ~0x1FFFu : ~0u;
    for (int i = 0; i < lc->rows; i++)
        for (int j = 0; j < lc->cols; j++) {
            float sum = 0;
            for (int x = 0; x < k; x++)
                sum += (d->transposed[0] ? at(a, la, x, i) : at(a, la, i, x)) * (d->transposed[1] ? at(b, lb, j, x) : at(b, lb, x, j));
            out[i + j * lc->ld] = *alpha * sum + (*beta ? *beta * out[i + j * lc->ld] : 0);
        }
    return 0;
}
"#;

/// A folder of libraries that goes away with the test.
struct Fakes(PathBuf);

impl Fakes {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("tunesmith-fakes-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn library(&self, file: &str, source: &str, definitions: &[&str]) -> &Self {
        let path = self.0.join(format!("{file}.c"));
        std::fs::write(&path, source).unwrap();
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-w", "-o"]).arg(self.0.join(file)).arg(&path);
        assert!(command.args(definitions).status().unwrap().success());
        self
    }

    fn driver(&self, version: u32, devices: u32, major: u32) -> &Self {
        let quiet: String = QUIET.iter().map(|name| format!("int {name}() {{ return 0; }}\n")).collect();
        let definitions = [format!("-DVERSION={version}"), format!("-DDEVICES={devices}"), format!("-DMAJOR={major}")];
        let definitions: Vec<&str> = definitions.iter().map(String::as_str).collect();
        self.library("libcuda.so.1", &format!("{quiet}{DRIVER}"), &definitions)
    }

    fn open(&self, ordinal: usize) -> Result<Device, Error> {
        let search = Search { folders: vec![self.0.clone()], ..Search::default() };
        let cache = Some(self.0.join("cache"));
        Gpu::open(ordinal, &Options { search, cache, ..Options::default() }).map(Device::Cuda)
    }

    fn error(&self, ordinal: usize) -> String {
        self.open(ordinal).unwrap_err().to_string()
    }
}

impl Drop for Fakes {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn assert_says(error: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| error.contains(part)), "{error:?} must say {parts:?}");
}

#[test]
fn what_is_not_enough_is_an_error_with_the_way_out() {
    let none = Fakes::new("none");
    assert_says(&none.error(0), &["libcuda was not found", "driver", "device = \"cpu\""]);
    let bare = Fakes::new("bare");
    bare.library("libcuda.so.1", "int cuInit() { return 0; }", &[]);
    assert_says(&bare.error(0), &["libcuda", "too old", "it has no cuDriverGetVersion"]);
    let old = Fakes::new("old");
    assert_says(&old.driver(11_080, 1, 9).error(0), &["CUDA 11.8", "12.0", "version 525"]);
    let empty = Fakes::new("empty");
    assert_says(&empty.driver(12_080, 1, 9).error(1), &["no GPU cuda:1", "shows 1"]);
    let small = Fakes::new("small");
    assert_says(&small.driver(12_080, 1, 7).error(0), &["Fake GPU", "7.6", "8.0"]);

    let alone = Fakes::new("alone");
    assert_says(
        &alone.driver(12_080, 1, 9).error(0),
        &["libnvrtc was not found", "pip install nvidia-cuda-nvrtc-cu12"],
    );
    // A compiler newer than the driver makes code that the driver cannot load, so it is not taken.
    alone.library("libnvrtc.so.13", NVRTC, &["-DNVRTC_MAJOR=13", "-DNVRTC_STATUS=0"]);
    assert_says(&alone.error(0), &["libnvrtc was not found"]);
    alone.library("libnvrtc.so.12", NVRTC, &["-DNVRTC_MAJOR=11", "-DNVRTC_STATUS=0"]);
    assert_says(&alone.error(0), &["libnvrtc", "version 11.8", "12.0"]);
    let unproductive = Fakes::new("unproductive");
    unproductive.driver(12_080, 1, 9).library("libnvrtc.so.12", NVRTC, &["-DNVRTC_MAJOR=12", "-DNVRTC_STATUS=0"]);
    assert_says(&unproductive.error(0), &["libcublasLt was not found", "pip install nvidia-cublas-cu12"]);
}

fn whole(name: &str, nvrtc_status: &str) -> (Fakes, Device) {
    let fakes = Fakes::new(name);
    let status = format!("-DNVRTC_STATUS={nvrtc_status}");
    fakes.driver(12_080, 2, 8).library("libnvrtc.so.12", NVRTC, &["-DNVRTC_MAJOR=12", &status]);
    fakes.library("libcublasLt.so.12", CUBLASLT, &[]);
    let device = fakes.open(1).unwrap();
    (fakes, device)
}

fn launch(gpu: &Gpu, out: &Tensor, grid: [u32; 3], shared: usize) {
    let args = [super::arguments::argument(out, Dtype::F32), Arg::F32(0.5)];
    let module = Module::new(Source::Rope, Dtype::F32);
    gpu.launch(&Launch { module, kernel: "rope_rotate", grid, block: 64, shared, args: &args });
}

#[test]
fn memory_copies_and_launches() {
    let (fakes, device) = whole("whole", "0");
    let gpu = device.gpu().unwrap();
    assert_eq!((gpu.name(), gpu.free_memory()), ("Fake GPU", Some(79 << 30)));
    let x = Tensor::from_slice(&[3], &[1.0, 2.0, 3.0]);
    let mut out = x.to_device(&device, Dtype::F32);
    assert_eq!(out.clone().to_host().data(), x.data());
    launch(gpu, &out, [2, 1, 3], 70_000);
    assert_eq!(out.to_host().data(), [0.5, 21_364.0, 70_000.0]);
    out.clear();
    assert_eq!(out.to_host().data(), [0.0; 3]);
    launch(gpu, &out, [0, 1, 1], 0);
    assert_eq!(out.to_host().data(), [0.0; 3], "an empty grid is nothing to do");
    // The module was compiled for this device and is in the cache.
    let cached: Vec<_> = std::fs::read_dir(fakes.0.join("cache")).unwrap().flatten().map(|f| f.path()).collect();
    assert_eq!(cached.len(), 1);
    let code = std::fs::read_to_string(&cached[0]).unwrap();
    assert_eq!(code, "cubin for --gpu-architecture=sm_86\0");
    assert!(name_of(&cached[0]).starts_with("rope-f32-sm_86-"), "{cached:?}");

    // Freed memory is used again; the peak stays known.
    let (held, peak) = gpu.memory();
    let large = Tensor::zeros_on(&device, Dtype::BF16, &[1 << 20]);
    assert_eq!(gpu.memory(), (held + (2 << 20), peak.max(held + (2 << 20))));
    drop(large);
    assert_eq!(gpu.memory().0, held);
    device.synchronize().unwrap();

    // A launch that fails is reported once work is waited for, and nothing is done after it.
    launch(gpu, &out, [13, 1, 1], 0);
    launch(gpu, &out, [1, 1, 1], 0);
    let error = device.synchronize().unwrap_err().to_string();
    assert_says(&error, &["rope_rotate failed", "CUDA_ERROR_OF_THE_TEST (700)"]);
    assert_says(&device.synchronize().unwrap_err().to_string(), &["700"]);
    assert_eq!(gpu.free_memory(), None, "after a failure nothing is asked any more");
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn a_kernel_that_does_not_compile_says_why() {
    let (_fakes, device) = whole("uncompiled", "6");
    let out = Tensor::zeros_on(&device, Dtype::F32, &[3]);
    launch(device.gpu().unwrap(), &out, [1; 3], 0);
    assert_says(&device.synchronize().unwrap_err().to_string(), &["rope-f32", "sm_86", "status 6", "bad code"]);
}

/// Told how often a compiler was needed.
static NOTICES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

#[test]
fn an_archive_makes_a_compiler_needless() {
    use super::archive::Archive;
    let fakes = Fakes::new("archive");
    fakes.driver(12_080, 1, 8).library("libcublasLt.so.12", CUBLASLT, &[]);
    let open = |archive: Archive| {
        let search = Search { folders: vec![fakes.0.clone()], ..Search::default() };
        let notice = Some(
            (|text: &str| {
                assert!(text.contains("NVRTC"), "{text}");
                NOTICES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }) as fn(&str),
        );
        Gpu::open(0, &Options { search, archive, notice, ..Options::default() }).map(Device::Cuda)
    };
    let notices = || NOTICES.load(std::sync::atomic::Ordering::Relaxed);
    let mut archive = Archive::default();
    let modules = Module::all();
    modules.iter().for_each(|module| archive.insert(module, "sm_86", b"cubin for the test".to_vec()));
    // There is no NVRTC, and none is missed.
    let device = open(archive.clone()).unwrap();
    let out = Tensor::zeros_on(&device, Dtype::F32, &[3]);
    launch(device.gpu().unwrap(), &out, [2, 1, 3], 0);
    assert_eq!(out.to_host().data(), [0.5, 21_364.0, 0.0]);
    device.synchronize().unwrap();
    assert_eq!(notices(), 0);
    // Code for other GPUs only does not help.
    let mut other = Archive::default();
    modules.iter().for_each(|module| other.insert(module, "sm_80", b"cubin for the test".to_vec()));
    assert_says(&open(other.clone()).unwrap_err().to_string(), &["libnvrtc was not found"]);
    fakes.library("libnvrtc.so.12", NVRTC, &["-DNVRTC_MAJOR=12", "-DNVRTC_STATUS=0"]);
    let device = open(other).unwrap();
    let out = Tensor::zeros_on(&device, Dtype::F32, &[3]);
    launch(device.gpu().unwrap(), &out, [2, 1, 3], 0);
    launch(device.gpu().unwrap(), &out, [2, 1, 3], 0);
    device.synchronize().unwrap();
    assert_eq!(notices(), 1, "said once");
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let (_fakes, device) = whole("full", "0");
    let too_large = Tensor::zeros_on(&device, Dtype::F32, &[1 << 39]);
    assert_eq!(too_large.shape(), [1 << 39]);
    assert_says(&device.synchronize().unwrap_err().to_string(), &["no room", "Lower the batch"]);
}

/// What the driver noted.
#[allow(unsafe_code)]
fn journal(fakes: &Fakes) -> String {
    // SAFETY: the library is the one that the driver was opened from, and has no initialisers; the text outlives this.
    unsafe {
        let library = libloading::Library::new(fakes.0.join("libcuda.so.1")).unwrap();
        let text = library.get::<*const std::ffi::c_char>(b"journal").unwrap();
        std::ffi::CStr::from_ptr(*text).to_string_lossy().into_owned()
    }
}

/// The first time work is launched kernel by kernel, the second time it is captured, and then replayed.
#[test]
fn work_is_captured_when_it_comes_again() {
    let (fakes, device) = whole("recorded", "0");
    let gpu = device.gpu().unwrap();
    let mut out = Tensor::zeros_on(&device, Dtype::F32, &[3]);
    let mut captured = crate::CapturedGraph::default();
    for round in 0..4 {
        out.clear();
        captured.run(&device, vec![1], || {
            // Memory that is given back meanwhile is not anybody else's while the graph is there.
            drop(gpu.allocate(3000));
            launch(gpu, &out, [2, 1, 3], 5);
        });
        assert_eq!((out.to_host().data(), captured.is_captured()), (&[0.5, 21_364.0, 5.0][..], round > 0));
    }
    let (used, _) = gpu.memory();
    drop(captured);
    assert_eq!(gpu.memory().0, used - 4096);
    device.synchronize().unwrap();
    let record = "begin 2 2, end 2 0, destroy 20 0, run 21 2, ";
    assert_eq!(journal(&fakes), format!("{record}run 21 2, run 21 2, destroy 21 0, "));
}

/// Copies beside the work wait for it, and it waits for them where it must.
#[test]
fn copies_beside_the_work() {
    let (fakes, device) = whole("copies", "0");
    let gpu = device.gpu().unwrap();
    let x = Tensor::from_slice(&[2], &[1.0, 2.0]).to_device(&device, Dtype::F32);
    let memory = gpu.allocate_host(8);
    assert_eq!((memory.bytes(), gpu.host_memory()), (8, 8));
    let event = gpu.event();
    memory.copy_out(0, x.device_buffer(), 0, 8);
    event.record();
    event.wait();
    let mut read = [0f32; 2];
    memory.read(0, bytemuck::cast_slice_mut(&mut read));
    assert_eq!(read, [1.0, 2.0]);
    memory.write(4, &3f32.to_ne_bytes());
    memory.copy_in(4, x.device_buffer(), 0, 4);
    event.record();
    assert_eq!(x.to_host().data(), [3.0, 2.0]);
    device.synchronize().unwrap();
    // 10 is the event of the test, 11 the one that copies wait for.
    let out = "record 11 2, wait 4 11, out 8 4, record 10 4, wait 2 10, ";
    assert_eq!(journal(&fakes), format!("{out}record 11 2, wait 4 11, in 4 4, record 10 4, "));
    let too_large = gpu.allocate_host(1 << 41);
    assert_says(&device.synchronize().unwrap_err().to_string(), &["page-locked", "training.offload"]);
    drop((too_large, memory));
    assert_eq!(gpu.host_memory(), 0);
}

/// Row-major products become the column-major ones that cuBLASLt knows, in every combination of transposed operands.
#[test]
fn products_in_every_order() {
    let (_fakes, device) = whole("products", "0");
    let gpu = device.gpu().unwrap();
    let mut rng = crate::rng::Rng::new(1, 0);
    let (m, n, k) = (3, 5, 4);
    for (a_t, b_t) in [(false, false), (false, true), (true, false), (true, true)] {
        let stored = |rows: usize, cols: usize, t: bool| if t { [cols, rows] } else { [rows, cols] };
        let mut random = |shape: [usize; 2]| Tensor::from_slice(&shape, &rng.normals(shape[0] * shape[1], 1.0));
        let (a, b, c) = (random(stored(m, k, a_t)), random(stored(k, n, b_t)), random([m, n]));
        let get = |x: &Tensor, i: usize, j: usize, t: bool| if t { x.row(j)[i] } else { x.row(i)[j] };
        let product = |i: usize, j: usize| (0..k).map(|x| get(&a, i, x, a_t) * get(&b, x, j, b_t)).sum::<f32>();
        for beta in [0.0, 1.0] {
            let [ga, gb, gc] = [&a, &b, &c].map(|t| t.to_device(&device, Dtype::F32));
            let matrix = |t, transposed| Matrix { transposed, ..super::linear::matrix(t) };
            let (a, b) = (matrix(&ga, a_t), matrix(&gb, b_t));
            gpu.gemm(&Gemm { m, n, k, alpha: 2.0, a, b, beta, c: matrix(&gc, false) });
            let got = gc.to_host();
            for i in 0..m {
                for j in 0..n {
                    let want = 2.0 * product(i, j) + beta * c.row(i)[j];
                    assert!((got.row(i)[j] - want).abs() < 1e-5, "{a_t} {b_t} {beta}: {} {want}", got.row(i)[j]);
                }
            }
        }
    }
    device.synchronize().unwrap();
    // No algorithm: said with the shape.
    let one = Tensor::zeros_on(&device, Dtype::F32, &[1, 1]);
    let matrix = super::linear::matrix(&one);
    gpu.gemm(&Gemm { m: 1, n: 1, k: 1, alpha: 1.0, a: matrix, b: matrix, beta: 0.0, c: matrix });
    assert_says(
        &device.synchronize().unwrap_err().to_string(),
        &["cublasLtMatmulAlgoGetHeuristic", "sizes: [1, 1, 1]"],
    );
}

/// TF32 is for f32 products, and only while it is asked for: shapes that were planned before are planned again.
#[test]
fn tf32_only_where_it_is_asked_for() {
    let (_fakes, device) = whole("tf32", "0");
    let gpu = device.gpu().unwrap();
    // Products with 1: exactly the first factor, or what TF32 keeps of it.
    let fine = 1.0 + f32::EPSILON;
    let [a, b] = [fine, 1.0].map(|x| Tensor::from_slice(&[2, 2], &[x, 0.0, x, 0.0]).to_device(&device, Dtype::F32));
    let product = || {
        let c = Tensor::zeros_on(&device, Dtype::F32, &[2, 2]);
        let (ma, mb) = (super::linear::matrix(&a), super::linear::matrix(&b).t());
        gpu.gemm(&Gemm { m: 2, n: 2, k: 2, alpha: 1.0, a: ma, b: mb, beta: 0.0, c: super::linear::matrix(&c) });
        c.to_host().data().to_vec()
    };
    assert_eq!(product(), [fine; 4]);
    gpu.set_tf32(true);
    assert_eq!(product(), [1.0; 4]);
    // The library of the test refuses bf16 products that ask for it.
    let [a16, c16] = [(); 2].map(|()| Tensor::zeros_on(&device, Dtype::BF16, &[2, 2]));
    let [ma, mc] = [&a16, &c16].map(super::linear::matrix);
    gpu.gemm(&Gemm { m: 2, n: 2, k: 2, alpha: 1.0, a: ma, b: ma, beta: 0.0, c: mc });
    gpu.set_tf32(false);
    assert_eq!(product(), [fine; 4]);
    device.synchronize().unwrap();
}
