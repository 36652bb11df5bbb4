//! What can go wrong with a GPU.

use std::path::PathBuf;

/// An error of the libraries, the compiler or the device.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// A library was found nowhere.
    #[error("{library} was not found; tried {}. {remedy}", tried.join(", "))]
    Missing {
        /// Its name, such as `libnvrtc`.
        library: &'static str,
        /// Every path that was tried.
        tried: Vec<String>,
        /// What a user can do.
        remedy: &'static str,
    },
    /// A library is there, but does not have what is needed.
    #[error("{library} ({path}) is too old: {found}; {needed} is needed. {remedy}", path = path.display())]
    TooOld {
        /// Its name.
        library: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What it says of itself, or what it lacks.
        found: String,
        /// What is needed.
        needed: String,
        /// What a user can do.
        remedy: &'static str,
    },
    /// There is no such device.
    #[error("there is no GPU cuda:{ordinal}; the driver shows {count}")]
    NoDevice {
        /// The number that was asked for.
        ordinal: usize,
        /// Devices that the driver shows.
        count: usize,
    },
    /// The device cannot run the kernels.
    #[error(
        "{name} has compute capability {major}.{minor}; 8.0 (Ampere) is the least that is supported. Use device = \"cpu\""
    )]
    TooSmall {
        /// Name of the device.
        name: String,
        /// Its compute capability.
        major: i32,
        /// Its minor number.
        minor: i32,
    },
    /// The device is out of memory.
    #[error(
        "the GPU has no room for another {bytes} bytes ({held} are held). Lower the batch, the sequence length or the \
         recompute level"
    )]
    OutOfMemory {
        /// Bytes that were asked for.
        bytes: usize,
        /// Bytes that this program holds.
        held: usize,
    },
    /// Host memory has no room that can be pinned.
    #[error("host memory has no room for another {bytes} page-locked bytes. Leave something out of training.offload")]
    OutOfHostMemory {
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// A call failed.
    #[error("{call} failed: {what}")]
    Call {
        /// Name of the function or kernel.
        call: String,
        /// What it said.
        what: String,
    },
    /// A kernel does not compile.
    #[error("{module} does not compile for {architecture}:\n{log}")]
    Compile {
        /// The module.
        module: String,
        /// What it was compiled for.
        architecture: String,
        /// The compiler's words.
        log: String,
    },
    /// The cache of compiled kernels cannot be read or written.
    #[error("{}: {what}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        what: String,
    },
}
