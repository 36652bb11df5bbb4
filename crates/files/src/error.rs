//! The one error type of the project.

use std::{io, path::Path};

/// What can go wrong. The variant is the kind that a caller matches (a server, for its status); [`Error::blame`] says
/// by whose doing it was, and the program's exit code follows from that.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user's input is wrong. The message names the file, line or field, the value, and the way out.
    #[error("{0}")]
    Input(String),
    /// What the user named does not exist: a file, a model, a GPU.
    #[error("{0}")]
    NotFound(String),
    /// What the user asks for is well formed, but this program or this machine does not do it.
    #[error("{0}")]
    Unsupported(String),
    /// Memory or disk is too small for what the user asks for.
    #[error("{0}")]
    DoesNotFit(String),
    /// The network would be needed and is turned off.
    #[error("{0}")]
    Offline(String),
    /// A server could not be reached, or answered with something wrong.
    #[error("{0}")]
    Network(String),
    /// A GPU, its driver or its libraries failed.
    #[error("{0}")]
    Device(String),
    /// The machine failed while reading or writing.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to which file.
        what: String,
        /// The operating system's word.
        source: io::Error,
    },
    /// Something failed that is none of the above and not the user's mistake.
    #[error("{0}")]
    Failure(String),
    /// The user stopped the program; what was in hand has been saved.
    #[error("interrupted")]
    Stopped,
}

/// By whose doing something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The user can put it right: exit code 2, or 4xx of a server.
    User,
    /// The user cannot: exit code 1, or 5xx of a server.
    Machine,
}

/// Shorthand for results with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an I/O error of doing `verb` ("cannot read", "cannot write") to `path`. A file that is not there is the
    /// user's mistake, everything else the machine's.
    pub fn io(verb: &str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound(format!("{verb} {}: no such file or folder", path.display())),
            _ => Self::own_io(verb, path, source),
        }
    }

    /// As [`Self::io`], of a file that the program made itself: that it is missing is not the user's mistake either.
    pub fn own_io(verb: &str, path: &Path, source: io::Error) -> Self {
        Self::Io { what: format!("{verb} {}", path.display()), source }
    }

    /// By whose doing it was.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Input(_)
            | Self::NotFound(_)
            | Self::Unsupported(_)
            | Self::DoesNotFit(_)
            | Self::Offline(_)
            | Self::Stopped => Blame::User,
            Self::Network(_) | Self::Device(_) | Self::Io { .. } | Self::Failure(_) => Blame::Machine,
        }
    }

    /// The exit code of the process: 2 for the user's mistakes, 130 when the user stopped it (what a shell reports for
    /// Ctrl-C), 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match (self, self.blame()) {
            (Self::Stopped, _) => 130,
            (_, Blame::User) => 2,
            (_, Blame::Machine) => 1,
        }
    }

    /// The same kind of error with `context` before its message, such as the field that holds the value.
    #[must_use]
    pub fn within(self, context: &str) -> Self {
        let add = |message: String| format!("{context}: {message}");
        match self {
            Self::Input(message) => Self::Input(add(message)),
            Self::NotFound(message) => Self::NotFound(add(message)),
            Self::Unsupported(message) => Self::Unsupported(add(message)),
            Self::DoesNotFit(message) => Self::DoesNotFit(add(message)),
            Self::Offline(message) => Self::Offline(add(message)),
            Self::Network(message) => Self::Network(add(message)),
            Self::Device(message) => Self::Device(add(message)),
            Self::Io { what, source } => Self::Io { what: add(what), source },
            Self::Failure(message) => Self::Failure(add(message)),
            Self::Stopped => Self::Stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_from_whose_doing_it_was() {
        assert_eq!(Error::Input("x".into()).exit_code(), 2);
        assert_eq!(Error::Stopped.exit_code(), 130);
        assert_eq!(Error::Failure("x".into()).exit_code(), 1);
        let missing = Error::io("cannot read", Path::new("a"), io::ErrorKind::NotFound.into());
        assert_eq!((missing.exit_code(), missing.to_string().as_str()), (2, "cannot read a: no such file or folder"));
        assert_eq!(missing.within("data.train").to_string(), "data.train: cannot read a: no such file or folder");
        let full = Error::io("cannot write", Path::new("a"), io::ErrorKind::StorageFull.into());
        assert_eq!((full.blame(), full.exit_code()), (Blame::Machine, 1));
        let missing = Error::own_io("cannot read", Path::new("a"), io::ErrorKind::NotFound.into());
        assert_eq!(missing.within("x").exit_code(), 1);
    }
}
