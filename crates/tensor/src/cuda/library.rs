//! Finding NVIDIA's libraries. None is needed to build or to start this program: they are searched, and opened by their
//! path, when a GPU is asked for, and what is missing is an error that says what to do.
//!
//! cudarc's own look-up is not used: it panics when a library is missing, knows the file names of one CUDA release
//! only, and does not look into Python's wheels. Its types and constants are.

use super::error::Error;
use libloading::Library as Opened;
use std::path::{Path, PathBuf};

/// A library that the program may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Fused attention, where it is faster.
    Cudnn,
    /// Communication between GPUs.
    Nccl,
}

impl Library {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "libcuda",
            Self::Nvrtc => "libnvrtc",
            Self::CublasLt => "libcublasLt",
            Self::Cudnn => "libcudnn",
            Self::Nccl => "libnccl",
        }
    }

    /// File names on this system and the major version that each stands for (0: any), best first.
    fn file_names(self) -> &'static [(&'static str, u32)] {
        match (self, cfg!(windows)) {
            (Self::Driver, false) => &[("libcuda.so.1", 0)],
            (Self::Driver, true) => &[("nvcuda.dll", 0)],
            (Self::Nvrtc, false) => &[("libnvrtc.so.13", 13), ("libnvrtc.so.12", 12)],
            (Self::Nvrtc, true) => &[("nvrtc64_130_0.dll", 13), ("nvrtc64_120_0.dll", 12)],
            (Self::CublasLt, false) => &[("libcublasLt.so.13", 13), ("libcublasLt.so.12", 12)],
            (Self::CublasLt, true) => &[("cublasLt64_13.dll", 13), ("cublasLt64_12.dll", 12)],
            (Self::Cudnn, false) => &[("libcudnn.so.9", 0)],
            (Self::Cudnn, true) => &[("cudnn64_9.dll", 0)],
            (Self::Nccl, _) => &[("libnccl.so.2", 0)],
        }
    }

    pub(super) fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "Install NVIDIA's driver (version 525 or later), or use device = \"cpu\"",
            Self::Nvrtc => {
                "Install it with `pip install nvidia-cuda-nvrtc-cu12` (or a CUDA toolkit) and name its folder in \
                 TUNESMITH_CUDA_LIBRARIES, or use device = \"cpu\""
            }
            Self::CublasLt => {
                "Install it with `pip install nvidia-cublas-cu12` (or a CUDA toolkit) and name its folder in \
                 TUNESMITH_CUDA_LIBRARIES, or use device = \"cpu\""
            }
            Self::Cudnn => {
                "Install it with `pip install nvidia-cudnn-cu12` and name its folder in TUNESMITH_CUDA_LIBRARIES"
            }
            Self::Nccl => {
                "Install it with `pip install nvidia-nccl-cu12` and name its folder in TUNESMITH_CUDA_LIBRARIES"
            }
        }
    }
}

/// Where to look, in this order: the folders that the user names, the system's loader, the CUDA toolkit, Python
/// environments.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Folders that hold libraries.
    pub folders: Vec<PathBuf>,
    /// Whether the system's loader is asked for the bare file name.
    pub system: bool,
    /// Root of a CUDA toolkit (`CUDA_HOME`).
    pub toolkit: Option<PathBuf>,
    /// Roots of Python environments, whose wheels have `nvidia/*/lib`.
    pub python: Vec<PathBuf>,
}

impl Search {
    /// Opens `library`, of major version `newest` or older where that matters.
    ///
    /// # Errors
    /// [`Error::Missing`] with every path that was tried.
    #[allow(unsafe_code)]
    pub(super) fn open(&self, library: Library, newest: u32) -> Result<(Opened, PathBuf), Error> {
        let mut tried = Vec::new();
        for candidate in self.candidates(library, newest) {
            // SAFETY: the file has the name of one of NVIDIA's libraries and is where the user, the system's loader,
            // the toolkit or a wheel put it; running its initialisers is what loading it means.
            match unsafe { Opened::new(&candidate) } {
                Ok(opened) => return Ok((opened, candidate)),
                // A file that is there and cannot be loaded is worth its reason.
                Err(e) if candidate.is_absolute() && candidate.exists() => {
                    let reason = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
                    tried.push(format!("{} ({reason})", candidate.display()));
                }
                Err(_) => tried.push(candidate.display().to_string()),
            }
        }
        if tried.is_empty() {
            tried.push("no folder".into());
        }
        Err(Error::Missing { library: library.name(), tried, remedy: library.remedy() })
    }

    /// Paths and bare names in the order in which they are tried.
    pub fn candidates(&self, library: Library, newest: u32) -> Vec<PathBuf> {
        let names: Vec<&str> =
            library.file_names().iter().filter(|(_, major)| *major <= newest).map(|(name, _)| *name).collect();
        let within = |folder: &Path| names.iter().map(|n| folder.join(n)).filter(|p| p.exists()).collect::<Vec<_>>();
        let mut candidates: Vec<PathBuf> = self.folders.iter().flat_map(|f| within(f)).collect();
        if self.system {
            candidates.extend(names.iter().map(PathBuf::from));
        }
        if let Some(toolkit) = &self.toolkit {
            candidates.extend(["lib64", "lib", "bin"].iter().flat_map(|f| within(&toolkit.join(f))));
        }
        candidates.extend(self.python.iter().flat_map(|root| wheel_folders(root)).flat_map(|f| within(&f)));
        candidates
    }
}

/// `nvidia/*/lib` below the site-packages of the Python environment at `root`, sorted, so that the choice among several
/// is the same every time.
fn wheel_folders(root: &Path) -> Vec<PathBuf> {
    let entries = |folder: PathBuf| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
        paths.sort();
        paths
    };
    let mut packages: Vec<PathBuf> =
        ["lib", "lib64"].iter().flat_map(|lib| entries(root.join(lib))).map(|p| p.join("site-packages")).collect();
    packages.push(root.join("Lib").join("site-packages"));
    // A folder of site-packages itself is as good as the environment's root.
    packages.push(root.to_path_buf());
    packages.into_iter().flat_map(|p| entries(p.join("nvidia"))).map(|p| p.join("lib")).filter(|p| p.is_dir()).collect()
}

/// Declares a table of functions and how it is filled from an opened library.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident, $library:expr; $( $field:ident = $symbol:literal ( $($arg:ty),* $(,)? ); )*) => {
        $(#[$doc])*
        pub(super) struct $name {
            $( pub(super) $field: unsafe extern "C" fn($($arg),*) -> i32, )*
            // Functions are valid as long as their library is open.
            _library: libloading::Library,
        }

        impl $name {
            /// Looks every function up.
            ///
            /// # Errors
            /// `TooOld` when the library does not have one of them.
            #[allow(unsafe_code)]
            pub(super) fn load(library: libloading::Library, path: &std::path::Path) -> Result<Self, crate::cuda::error::Error> {
                Ok(Self {
                    $( $field: {
                        // SAFETY: the signature is that of NVIDIA's documentation; status codes are taken as plain
                        // integers, so that one this program does not know is no undefined behaviour.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> i32>($symbol.as_bytes()) };
                        *found.map_err(|_| crate::cuda::error::Error::TooOld {
                            library: $library.name(),
                            path: path.to_path_buf(),
                            found: format!("it has no {}", $symbol),
                            needed: "CUDA 12.0".into(),
                            remedy: $library.remedy(),
                        })?
                    }, )*
                    _library: library,
                })
            }
        }
    };
}
pub(super) use functions;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("tunesmith-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn wheels_toolkit_and_named_folders_in_order() {
        let root = folder("search");
        let wheel = root.join("env/lib/python3.11/site-packages/nvidia/cu13/lib");
        let toolkit = root.join("cuda/lib64");
        let named = root.join("named");
        for path in [&wheel, &toolkit, &named] {
            fs::create_dir_all(path).unwrap();
            fs::write(path.join("libnvrtc.so.12"), "").unwrap();
        }
        fs::write(wheel.join("libnvrtc.so.13"), "").unwrap();
        let search = Search {
            folders: vec![named.clone()],
            system: true,
            toolkit: Some(root.join("cuda")),
            python: vec![root.join("env")],
        };
        let found = search.candidates(Library::Nvrtc, 13);
        let want = [
            named.join("libnvrtc.so.12"),
            "libnvrtc.so.13".into(),
            "libnvrtc.so.12".into(),
            toolkit.join("libnvrtc.so.12"),
            wheel.join("libnvrtc.so.13"),
            wheel.join("libnvrtc.so.12"),
        ];
        assert_eq!(found, want);
        // A driver of CUDA 12 cannot load what the compiler of CUDA 13 makes.
        let old = search.candidates(Library::Nvrtc, 12);
        assert!(old.iter().all(|p| p.ends_with("libnvrtc.so.12")) && old.len() == 4, "{old:?}");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_is_missing_is_an_error_with_a_remedy() {
        for library in [Library::Driver, Library::Nvrtc, Library::CublasLt, Library::Cudnn, Library::Nccl] {
            let error = Search::default().open(library, 13).unwrap_err().to_string();
            assert!(error.contains(library.name()) && error.contains("Install"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_no_library_is_named_with_the_reason() {
        let root = folder("broken");
        fs::write(root.join("libcublasLt.so.12"), "not a library").unwrap();
        let search = Search { folders: vec![root.clone()], ..Search::default() };
        let error = search.open(Library::CublasLt, 13).unwrap_err().to_string();
        assert!(error.contains("libcublasLt.so.12") && error.contains("pip install"), "{error}");
        fs::remove_dir_all(root).unwrap();
    }
}
