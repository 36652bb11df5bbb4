//! How long rows are: counts in classes of about an eighth of an octave.
use serde::{Deserialize, Serialize};

/// Lengths up to this have a class of their own.
const EXACT: usize = 16;

/// Rows of about the same length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthClass {
    /// The longest that belongs to it, in tokens; the classes before it end below.
    pub up_to: usize,
    /// Rows.
    pub rows: usize,
    /// Their tokens.
    pub tokens: usize,
}

/// Rows by their number of tokens, before anything was cut off. Classes without rows are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lengths(pub Vec<LengthClass>);

/// The end of the class that `tokens` belongs to: every number to 16, then eight to each doubling, so that powers of
/// two end a class.
fn class_end(tokens: usize) -> usize {
    if tokens <= EXACT {
        return tokens;
    }
    let step = ((tokens - 1) / (EXACT / 2)).checked_ilog2().map_or(1, |octave| 1 << octave);
    tokens.next_multiple_of(step)
}

impl LengthClass {
    /// The shortest length that belongs to it, in tokens.
    pub fn start(&self) -> usize {
        class_start(self.up_to)
    }
}

impl Lengths {
    /// Counts the rows of `other` too.
    pub fn merge(&mut self, other: &Self) {
        for class in &other.0 {
            let own = self.class(class.up_to);
            own.rows += class.rows;
            own.tokens += class.tokens;
        }
    }

    /// The class that ends at `up_to`, made if need be.
    fn class(&mut self, up_to: usize) -> &mut LengthClass {
        let at = self.0.partition_point(|class| class.up_to < up_to);
        if self.0.get(at).is_none_or(|class| class.up_to != up_to) {
            self.0.insert(at, LengthClass { up_to, ..LengthClass::default() });
        }
        &mut self.0[at]
    }

    /// Counts a row.
    pub fn add(&mut self, tokens: usize) {
        let class = self.class(class_end(tokens));
        class.rows += 1;
        class.tokens += tokens;
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.0.iter().map(|class| class.rows).sum()
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.0.iter().map(|class| class.tokens).sum()
    }

    /// Rows longer than `limit`, and their tokens beyond it: exact where `limit` ends a class, as powers of two do;
    /// otherwise rows of the class that it cuts are not counted.
    pub fn beyond(&self, limit: usize) -> (usize, usize) {
        let longer = self.0.iter().filter(|class| class.start() > limit);
        longer.fold((0, 0), |(rows, tokens), class| (rows + class.rows, tokens + class.tokens - class.rows * limit))
    }

    /// The smallest class end that at least `share` of the rows do not exceed.
    pub fn quantile(&self, share: f64) -> usize {
        let wanted = (share * self.rows() as f64).ceil() as usize;
        let mut seen = 0;
        for class in &self.0 {
            seen += class.rows;
            if seen >= wanted {
                return class.up_to;
            }
        }
        0
    }
}

/// The shortest length of the class that ends at `up_to`.
fn class_start(up_to: usize) -> usize {
    if up_to <= EXACT {
        return up_to;
    }
    let step = ((up_to - 1) / (EXACT / 2)).checked_ilog2().map_or(1, |octave| 1 << octave);
    up_to - step + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_join_without_a_gap_and_end_at_powers_of_two() {
        let ends: Vec<usize> = (0..5000).map(class_end).collect();
        assert_eq!(ends[..20], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 18, 20]);
        for (tokens, end) in ends.iter().enumerate() {
            assert!((class_start(*end)..=*end).contains(&tokens), "{tokens}: {}..={end}", class_start(*end));
            assert_eq!(class_end(*end), *end);
        }
        for power in 5..12 {
            assert_eq!((ends[1 << power], class_start(ends[(1 << power) + 1])), (1 << power, (1 << power) + 1));
        }
    }

    #[test]
    fn what_lies_beyond_a_limit_is_exact_at_powers_of_two() {
        let rows = [3, 16, 17, 30, 64, 65, 200, 1000, 1025, 5000];
        let mut lengths = Lengths::default();
        rows.iter().for_each(|row| lengths.add(*row));
        assert_eq!((lengths.rows(), lengths.tokens()), (10, rows.iter().sum()));
        for limit in [16, 32, 64, 128, 1024, 8192] {
            let over: Vec<usize> = rows.iter().filter(|row| **row > limit).map(|row| row - limit).collect();
            assert_eq!(lengths.beyond(limit), (over.len(), over.iter().sum()), "{limit}");
        }
        assert_eq!((lengths.quantile(0.5), lengths.quantile(1.0), lengths.quantile(0.0)), (64, 5120, 3));
        assert!(lengths.0.is_sorted_by_key(|class| class.up_to));
        assert_eq!(Lengths::default().quantile(0.5), 0);
    }
}
