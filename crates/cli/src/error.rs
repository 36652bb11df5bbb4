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
    /// The user stopped the program; what was in hand has been saved (exit code 130).
    #[error("interrupted")]
    Interrupted,
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

    /// The exit code of the process: 2 for the user's mistake, 130 when the user stopped it (what a shell reports for
    /// Ctrl-C), 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) => 2,
            Self::Interrupted => 130,
            Self::Io { .. } | Self::Failure(_) => 1,
        }
    }
}

/// The crates below have the same variants, so that the exit code survives the way up.
macro_rules! from_crate {
    ($($krate:ident),*) => {$(
        impl From<$krate::Error> for Error {
            fn from(error: $krate::Error) -> Self {
                match error {
                    $krate::Error::Input(message) => Self::Input(message),
                    $krate::Error::Io { what, source } => Self::Io { what, source },
                    $krate::Error::Failure(message) => Self::Failure(message),
                }
            }
        }
    )*};
}

from_crate!(tunesmith_model, tunesmith_text, tunesmith_train);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_from_whose_doing_it_was() {
        assert_eq!(Error::Input("x".into()).exit_code(), 2);
        assert_eq!(Error::Interrupted.exit_code(), 130);
        assert_eq!(Error::Failure("x".into()).exit_code(), 1);
        let missing = Error::io("cannot read", Path::new("a"), io::ErrorKind::NotFound.into());
        assert_eq!((missing.exit_code(), missing.to_string().as_str()), (2, "cannot read a: no such file or folder"));
        assert_eq!(Error::io("cannot write", Path::new("a"), io::ErrorKind::StorageFull.into()).exit_code(), 1);
    }

    #[test]
    fn errors_of_the_crates_below_keep_their_kind() {
        assert_eq!(Error::from(tunesmith_model::Error::Input("m".into())).exit_code(), 2);
        assert_eq!(Error::from(tunesmith_train::Error::Failure("m".into())).to_string(), "m");
        let io = tunesmith_text::Error::io("cannot read", Path::new("b"), io::ErrorKind::PermissionDenied.into());
        assert!(matches!(Error::from(io), Error::Io { .. }));
    }
}
