//! What the checks allow. Each figure is what the tree has now; it may only fall.

/// Files of all circles together (`cargo xtask circles`).
pub(crate) const MAX_FILES_IN_CIRCLES: usize = 79;

/// The same, with what modules take from those that they are in.
pub(crate) const MAX_FILES_IN_CIRCLES_WITH_PARENTS: usize = 125;

/// Comments wider than 120 columns (`cargo xtask size`).
pub(crate) const MAX_WIDE_COMMENTS: usize = 538;
