//! The one error type of this crate.

use std::{io, path::Path};

/// What can go wrong, by whose doing: the program's exit code follows from it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user's input is wrong. The message names the file, line or field, the value, and the way out (exit code 2).
    #[error("{0}")]
    Input(String),
    /// The machine failed while reading or writing (exit code 1).
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to which file.
        what: String,
        /// The operating system's word.
        source: io::Error,
    },
    /// Something failed that is neither the user's mistake nor plain input and output (exit code 1).
    #[error("{0}")]
    Failure(String),
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an I/O error of doing `verb` ("cannot read", "cannot write") to `path`. A file that is not there is the
    /// user's mistake, everything else the machine's.
    pub fn io(verb: &str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::Input(format!("{verb} {}: no such file or folder", path.display())),
            _ => Self::Io { what: format!("{verb} {}", path.display()), source },
        }
    }
}

impl From<tunesmith_model::Error> for Error {
    fn from(error: tunesmith_model::Error) -> Self {
        use tunesmith_model::Error as Model;
        match error {
            Model::Input(message) => Self::Input(message),
            Model::Io { what, source } => Self::Io { what, source },
            Model::Failure(message) => Self::Failure(message),
        }
    }
}

impl From<tunesmith_tensor::cuda::Error> for Error {
    fn from(error: tunesmith_tensor::cuda::Error) -> Self {
        use tunesmith_tensor::cuda::Error as Cuda;
        let message = error.to_string();
        match error {
            // What a user can put right: a missing library, a device that is not there, a batch that does not fit.
            Cuda::Missing { .. }
            | Cuda::TooOld { .. }
            | Cuda::NoDevice { .. }
            | Cuda::TooSmall { .. }
            | Cuda::OutOfMemory { .. }
            | Cuda::OutOfHostMemory { .. } => Self::Input(message),
            Cuda::Call { .. } | Cuda::Compile { .. } | Cuda::Cache { .. } => Self::Failure(message),
        }
    }
}

impl From<tunesmith_text::Error> for Error {
    fn from(error: tunesmith_text::Error) -> Self {
        use tunesmith_text::Error as Text;
        match error {
            Text::Input(message) => Self::Input(message),
            Text::Io { what, source } => Self::Io { what, source },
            Text::Failure(message) => Self::Failure(message),
        }
    }
}
