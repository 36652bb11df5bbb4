//! Ctrl-C as one flag: the first one asks what is running to stop, the second one, or one while nothing listens, ends
//! the program at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use tunesmith_files::{Error, Result};

/// Set by the first Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);
/// Whether something runs that looks at [`STOP`].
static LISTENING: AtomicBool = AtomicBool::new(false);
/// What is said when it is set.
static NOTICE: OnceLock<&str> = OnceLock::new();

/// Takes over Ctrl-C for the rest of the program; `notice` is printed when the flag is set.
///
/// # Errors
/// When the system does not allow it.
pub(crate) fn install(notice: Option<&'static str>) -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    if let Some(notice) = notice {
        NOTICE.get_or_init(|| notice);
    }
    let handler = || {
        if STOP.swap(true, Ordering::Relaxed) || !LISTENING.load(Ordering::Relaxed) {
            std::process::exit(i32::from(Error::Stopped.exit_code()));
        }
        if let Some(notice) = NOTICE.get() {
            eprintln!("{notice}");
        }
    };
    let installed = INSTALLED.get_or_init(|| ctrlc::set_handler(handler).map_err(|e| e.to_string()));
    installed.clone().map_err(|e| Error::Failure(format!("cannot listen to Ctrl-C: {e}")))
}

/// The flag that `work` and what it calls look at.
pub(crate) fn flag() -> &'static AtomicBool {
    &STOP
}

/// Does `work`, which stops when the flag is set.
pub(crate) fn listening<T>(work: impl FnOnce() -> T) -> T {
    STOP.store(false, Ordering::Relaxed);
    LISTENING.store(true, Ordering::Relaxed);
    let done = work();
    LISTENING.store(false, Ordering::Relaxed);
    done
}
