//! How far something is: what every long call tells whoever watches.

/// A step of something long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// What is being done, in words; a new text starts a new bar.
    pub what: &'a str,
    /// How much is done.
    pub done: u64,
    /// How much there is to do, where known.
    pub total: Option<u64>,
    /// What is counted.
    pub unit: Unit,
}

/// What [`Progress`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Tensors, blocks, files and the like.
    Items,
}

/// Whoever watches.
pub type Observer<'a> = dyn FnMut(Progress<'_>) + 'a;

impl<'a> Progress<'a> {
    /// Of `total` bytes, `done` are there.
    pub fn bytes(what: &'a str, done: u64, total: Option<u64>) -> Self {
        Self { what, done, total, unit: Unit::Bytes }
    }

    /// Of `total` things, `done` are done.
    pub fn items(what: &'a str, done: usize, total: usize) -> Self {
        Self { what, done: done as u64, total: Some(total as u64), unit: Unit::Items }
    }
}
