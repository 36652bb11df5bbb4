//! What is known of each row between the two readings, and what was decided about it.
use crate::{
    RowFormat, Split,
    clean::{Mark, Reason},
    similar::Sketch,
};

/// What stands for no value.
pub(super) const NONE: u32 = u32::MAX;

/// What becomes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It goes here.
    Keep(Split),
    /// It cannot be used, or is of another format than the rest of its file.
    Rejected,
    /// Cleaning took it out.
    Removed(Reason),
}

/// What is kept of a row until all have been seen.
pub(super) struct Facts {
    pub(super) decision: Decision,
    pub(super) format: Option<RowFormat>,
    pub(super) mark: Option<Mark>,
    pub(super) exact: u64,
    pub(super) sketch: Option<Box<Sketch>>,
    pub(super) stratum: Option<Box<Stratum>>,
    /// A hash of the value that it is grouped by.
    pub(super) group: u64,
    /// The number of the value that it is counted and balanced by.
    pub(super) value: u32,
    /// In [0, 1): which rows of the same value are drawn first.
    pub(super) draw: f64,
}

/// What a row is stratified by.
pub(super) struct Stratum {
    /// Index of the row's file.
    pub(super) input: usize,
    pub(super) value: String,
    /// In [0, 1): which rows of the same value are held out. None when the file decides.
    pub(super) place: Option<f64>,
}

impl Facts {
    pub(super) fn rejected() -> Self {
        Self {
            decision: Decision::Rejected,
            format: None,
            mark: None,
            exact: 0,
            sketch: None,
            stratum: None,
            group: 0,
            value: NONE,
            draw: 0.0,
        }
    }

    #[cfg(test)]
    pub(super) fn train() -> Self {
        Self { decision: Decision::Keep(Split::Train), ..Self::rejected() }
    }
}
