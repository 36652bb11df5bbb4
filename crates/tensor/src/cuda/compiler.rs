//! NVRTC: CUDA C++ to machine code, at run time, without a GPU or a toolkit.

use super::error::Error;
use super::kernels::Module;
use super::library::{Library, Search, functions};
use sha2::{Digest, Sha256};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

functions! {
    /// The functions of NVRTC that are used.
    Nvrtc, Library::Nvrtc;
    version = "nvrtcVersion"(*mut c_int, *mut c_int);
    create = "nvrtcCreateProgram"(
        *mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    );
    compile = "nvrtcCompileProgram"(*mut c_void, c_int, *const *const c_char);
    log_size = "nvrtcGetProgramLogSize"(*mut c_void, *mut usize);
    log = "nvrtcGetProgramLog"(*mut c_void, *mut c_char);
    cubin_size = "nvrtcGetCUBINSize"(*mut c_void, *mut usize);
    cubin = "nvrtcGetCUBIN"(*mut c_void, *mut c_char);
    destroy = "nvrtcDestroyProgram"(*mut *mut c_void);
}

/// The compiler.
pub struct Compiler {
    nvrtc: Nvrtc,
    version: (i32, i32),
}

/// Options of every module. Divisions and roots are those of IEEE; subnormals are kept, as on the CPU.
const OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

impl Compiler {
    /// Opens NVRTC of major version `newest` or older.
    ///
    /// # Errors
    /// When it is missing or older than CUDA 12.
    #[allow(unsafe_code)]
    pub fn open(search: &Search, newest: u32) -> Result<Self, Error> {
        let (library, path) = search.open(Library::Nvrtc, newest)?;
        let nvrtc = Nvrtc::load(library, &path)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to integers that outlive the call.
        let status = unsafe { (nvrtc.version)(&mut major, &mut minor) };
        if status != 0 || major < 12 {
            return Err(Error::TooOld {
                library: Library::Nvrtc.name(),
                path,
                found: format!("version {major}.{minor}"),
                needed: "12.0".into(),
                remedy: Library::Nvrtc.remedy(),
            });
        }
        Ok(Self { nvrtc, version: (major, minor) })
    }

    /// Version of CUDA that the compiler is of.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Machine code of `module` for `architecture`, such as `sm_90a`.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compile(&self, module: &Module, architecture: &str) -> Result<Vec<u8>, Error> {
        let failed = |log: String| Error::Compile { module: module.name(), architecture: architecture.into(), log };
        let text = CString::new(module.text()).map_err(|e| failed(e.to_string()))?;
        let name = CString::new(format!("{}.cu", module.name())).map_err(|e| failed(e.to_string()))?;
        let arch = format!("--gpu-architecture={architecture}");
        let options = OPTIONS.iter().copied().chain([arch.as_str()]).map(CString::new);
        let options = options.collect::<Result<Vec<_>, _>>().map_err(|e| failed(e.to_string()))?;
        self.program(&text, &name, &options).map_err(failed)
    }

    #[allow(unsafe_code)]
    fn program(&self, text: &CStr, name: &CStr, options: &[CString]) -> Result<Vec<u8>, String> {
        let nvrtc = &self.nvrtc;
        let ok = |status: i32, what: &str| if status == 0 { Ok(()) } else { Err(format!("{what}: status {status}")) };
        let mut program = ptr::null_mut();
        // SAFETY: text and name are C strings, there are no headers, and the program is destroyed below.
        let created =
            unsafe { (nvrtc.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()) };
        ok(created, "nvrtcCreateProgram")?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        // SAFETY: the program was created, and the options are as many C strings as is said.
        let compiled = unsafe { (nvrtc.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        let result = if compiled == 0 {
            self.output(program, nvrtc.cubin_size, nvrtc.cubin)
        } else {
            let log = self.output(program, nvrtc.log_size, nvrtc.log).unwrap_or_default();
            Err(format!("status {compiled}\n{}", String::from_utf8_lossy(&log).trim_end_matches('\0')))
        };
        // SAFETY: the program was created and is not used again.
        unsafe { (nvrtc.destroy)(&mut program) };
        result
    }

    #[allow(unsafe_code)]
    fn output(
        &self,
        program: *mut c_void,
        size: unsafe extern "C" fn(*mut c_void, *mut usize) -> i32,
        get: unsafe extern "C" fn(*mut c_void, *mut c_char) -> i32,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program is alive and `len` outlives the call.
        let status = unsafe { size(program, &mut len) };
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer has the size that the program has just named.
        let status = if status == 0 { unsafe { get(program, bytes.as_mut_ptr().cast()) } } else { status };
        if status == 0 && len > 0 { Ok(bytes) } else { Err(format!("no output: status {status}, {len} bytes")) }
    }

    /// As [`Compiler::compile`], from `cache` when this source was compiled before.
    ///
    /// # Errors
    /// As [`Compiler::compile`], and when the cache cannot be written.
    pub fn compile_cached(&self, module: &Module, architecture: &str, cache: &Path) -> Result<Vec<u8>, Error> {
        let path = cache.join(format!("{}.cubin", self.key(module, architecture)));
        if let Ok(bytes) = std::fs::read(&path) {
            return Ok(bytes);
        }
        let bytes = self.compile(module, architecture)?;
        write_renamed(&path, &bytes)?;
        Ok(bytes)
    }

    /// Name of a module in the cache: whatever could change the code is in it.
    fn key(&self, module: &Module, architecture: &str) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{architecture} {:?} {OPTIONS:?}\n{}", self.version, module.text()));
        let hash: String = hash.finalize().iter().take(12).map(|b| format!("{b:02x}")).collect();
        format!("{}-{architecture}-{hash}", module.name())
    }
}

/// Hash of a module's source with the options that it is compiled with.
pub(super) fn source_hash(module: &Module) -> String {
    let hash = Sha256::digest(format!("{OPTIONS:?}\n{}", module.text()));
    hash.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Writes a file under a temporary name and renames it.
pub(super) fn write_renamed(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |e: std::io::Error| Error::Cache { path: path.to_path_buf(), what: e.to_string() };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::File::create(&temporary).map_err(failed)?;
    std::io::Write::write_all(&mut file, bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}
