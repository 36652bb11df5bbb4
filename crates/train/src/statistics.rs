//! Losses on held-out documents with their uncertainty: mean loss, perplexity, bits per byte, and base against tuned.
//!
//! Intervals are percentile intervals of the bootstrap over documents (Efron and Tibshirani, An Introduction to the
//! Bootstrap, 1993, chapter 13): documents, not tokens, are drawn, because the tokens of one document hang together.
//! A difference is resampled in pairs, the same documents for both models, so that what makes a document hard for both
//! cancels (Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004).

use std::{f64::consts::LN_2, fmt};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Documents beyond this number are gathered into as many groups, and groups are drawn. The variance of a sum over
/// independent documents is the same, and the time stays bounded.
const MAX_UNITS: usize = 10_000;

/// The loss of one document (or row) of an evaluation set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DocumentLoss {
    /// Sum of the cross-entropy over the scored tokens, in nats.
    pub loss_sum: f64,
    /// Number of scored tokens.
    pub num_tokens: u64,
    /// UTF-8 bytes of the text of the scored tokens; 0 where unknown.
    pub num_bytes: u64,
}

/// How intervals are made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Number of resamples. Default 1000.
    pub num_resamples: usize,
    /// Share of the distribution inside an interval, between 0 and 1. Default 0.95.
    pub confidence: f64,
    /// Seed of the draws: the same rows and seed give the same interval. Default 42.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { num_resamples: 1000, confidence: 0.95, seed: 42 }
    }
}

/// A number with its interval; without one (`None`) where there are fewer than two documents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The estimate on all documents.
    pub value: f64,
    /// Lower end of the interval.
    pub low: Option<f64>,
    /// Upper end of the interval.
    pub high: Option<f64>,
}

impl Estimate {
    /// Both ends of the interval, if there is one.
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.low.zip(self.high)
    }

    /// The estimate of `f` of this number, for a growing `f`: percentiles pass through it unchanged.
    fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self { value: f(self.value), low: self.low.map(&f), high: self.high.map(&f) }
    }
}

/// The loss of one model on one set of documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossStatistics {
    /// Mean cross-entropy over all scored tokens, in nats.
    pub mean_loss: Estimate,
    /// `exp(mean_loss)`.
    pub perplexity: Estimate,
    /// Loss sum / (ln 2 * bytes) (Gao et al., The Pile, 2020, section 3.1): comparable between tokenizers. `None`
    /// where the bytes are unknown.
    pub bits_per_byte: Option<Estimate>,
    /// Scored tokens.
    pub num_tokens: u64,
    /// Documents with at least one scored token.
    pub num_documents: u64,
    /// Bytes of the scored text.
    pub num_bytes: u64,
}

/// Two models on the same documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The model before fine-tuning.
    pub base: LossStatistics,
    /// The model after fine-tuning.
    pub tuned: LossStatistics,
    /// Mean loss of tuned minus that of base, in nats per token: negative is better.
    pub loss_difference: Estimate,
    /// Share of the resamples in which the tuned model's loss is lower; `None` with fewer than two documents.
    pub share_better: Option<f64>,
    /// Confidence of the intervals, between 0 and 1.
    pub confidence: f64,
}

/// What the interval of a difference allows to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval is below zero.
    Better,
    /// The whole interval is above zero.
    Worse,
    /// The interval contains zero.
    Undecided,
    /// There are too few documents for an interval.
    TooFewDocuments,
}

impl Comparison {
    /// What the interval of the loss difference allows to say.
    pub fn verdict(&self) -> Verdict {
        match self.loss_difference.interval() {
            None => Verdict::TooFewDocuments,
            Some((_, high)) if high < 0.0 => Verdict::Better,
            Some((low, _)) if low > 0.0 => Verdict::Worse,
            Some(_) => Verdict::Undecided,
        }
    }
}

impl fmt::Display for Comparison {
    /// The verdict in one or two plain sentences.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let opening = match self.verdict() {
            Verdict::Better => "The fine-tuned model is better on the held-out data",
            Verdict::Worse => "The fine-tuned model is worse on the held-out data",
            Verdict::Undecided => "No reliable difference on the held-out data",
            Verdict::TooFewDocuments => "Too few held-out documents to judge",
        };
        let (base, tuned) = (self.base.perplexity.value, self.tuned.perplexity.value);
        let change = 100.0 * (tuned / base - 1.0);
        write!(f, "{opening}: perplexity {base:.2} before, {tuned:.2} after ({})", signed(change, 1, " %"))?;
        let Some((low, high)) = self.loss_difference.interval() else {
            return write!(f, ". An interval needs at least two documents; add more to the test set.");
        };
        let difference = signed(self.loss_difference.value, 3, "");
        let (low, high) = (signed(low, 3, ""), signed(high, 3, ""));
        let confidence = 100.0 * self.confidence;
        write!(f, ". The loss changed by {difference} nats per token ({confidence:.0} % interval {low} to {high}")?;
        match self.verdict() {
            Verdict::Undecided => write!(f, ", which contains zero: more test documents would narrow it)."),
            _ => write!(f, ")."),
        }
    }
}

/// A number with its sign, a real minus, and a unit.
fn signed(value: f64, decimals: usize, unit: &str) -> String {
    let sign = if value < 0.0 { "\u{2212}" } else { "+" };
    format!("{sign}{:.decimals$}{unit}", value.abs())
}

/// The statistics of one model.
///
/// # Errors
/// [`Error::Input`] when no token was scored or the settings are out of range; [`Error::Failure`] when a loss is not
/// finite (the number of the row, from 1, is named).
pub fn loss_statistics(rows: &[DocumentLoss], bootstrap: &Bootstrap) -> Result<LossStatistics> {
    check_rows(rows)?;
    let resamples = Resamples::draw(rows, rows, bootstrap)?;
    Ok(resamples.statistics(rows, |sums| sums.base))
}

/// Base against tuned on the same documents: `base[i]` and `tuned[i]` are the same document.
///
/// # Errors
/// As [`loss_statistics`]; besides [`Error::Failure`] when the two do not cover the same documents.
pub fn compare(base: &[DocumentLoss], tuned: &[DocumentLoss], bootstrap: &Bootstrap) -> Result<Comparison> {
    if base.len() != tuned.len() {
        return Err(Error::Failure(format!(
            "base and tuned were evaluated on {} and {} documents; a comparison needs the same ones",
            base.len(),
            tuned.len()
        )));
    }
    check_rows(base)?;
    check_rows(tuned)?;
    if let Some(at) = (0..base.len()).find(|&i| base[i].num_tokens != tuned[i].num_tokens) {
        return Err(Error::Failure(format!(
            "document {} has {} scored tokens with the base model and {} with the tuned one; a comparison needs the same",
            at + 1,
            base[at].num_tokens,
            tuned[at].num_tokens
        )));
    }
    let resamples = Resamples::draw(base, tuned, bootstrap)?;
    let base = resamples.statistics(base, |sums| sums.base);
    let tuned = resamples.statistics(tuned, |sums| sums.tuned);
    let difference = tuned.mean_loss.value - base.mean_loss.value;
    let num_better = resamples.sums.iter().filter(|sums| sums.tuned < sums.base).count();
    Ok(Comparison {
        loss_difference: resamples.estimate(difference, |sums| (sums.tuned - sums.base) / sums.num_tokens),
        share_better: (!resamples.sums.is_empty()).then(|| num_better as f64 / resamples.sums.len() as f64),
        confidence: bootstrap.confidence,
        base,
        tuned,
    })
}

fn check_rows(rows: &[DocumentLoss]) -> Result<()> {
    if let Some(at) = rows.iter().position(|row| !row.loss_sum.is_finite()) {
        return Err(Error::Failure(format!("the loss of evaluation document {} is {}", at + 1, rows[at].loss_sum)));
    }
    if rows.iter().all(|row| row.num_tokens == 0) {
        return Err(Error::Input(format!(
            "the evaluation set has no scored token in its {} documents: give a split with text that carries loss",
            rows.len()
        )));
    }
    Ok(())
}

/// Sums over documents; both losses in nats.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    base: f64,
    tuned: f64,
    num_tokens: f64,
    num_bytes: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.base += other.base;
        self.tuned += other.tuned;
        self.num_tokens += other.num_tokens;
        self.num_bytes += other.num_bytes;
    }
}

/// The sums of every resample; none where there are fewer than two documents.
struct Resamples {
    sums: Vec<Sums>,
    confidence: f64,
}

impl Resamples {
    fn draw(base: &[DocumentLoss], tuned: &[DocumentLoss], bootstrap: &Bootstrap) -> Result<Self> {
        let &Bootstrap { num_resamples, confidence, seed } = bootstrap;
        if num_resamples == 0 {
            return Err(Error::Input("num_resamples is 0; a bootstrap needs at least 1 (1000 is usual)".into()));
        }
        if !(confidence > 0.0 && confidence < 1.0) {
            return Err(Error::Input(format!("confidence is {confidence}; give a share between 0 and 1 such as 0.95")));
        }
        // Documents without a scored token say nothing, and a resample of them alone would divide by zero.
        let documents: Vec<Sums> = base
            .iter()
            .zip(tuned)
            .filter(|(row, _)| row.num_tokens > 0)
            .map(|(base, tuned)| Sums {
                base: base.loss_sum,
                tuned: tuned.loss_sum,
                num_tokens: base.num_tokens as f64,
                num_bytes: base.num_bytes as f64,
            })
            .collect();
        let mut units = vec![Sums::default(); documents.len().min(MAX_UNITS)];
        for (i, document) in documents.iter().enumerate() {
            units[i % MAX_UNITS].add(document);
        }
        if units.len() < 2 {
            return Ok(Self { sums: Vec::new(), confidence });
        }
        let mut random = SplitMix64(seed);
        let sums = (0..num_resamples)
            .map(|_| {
                let mut sums = Sums::default();
                for _ in 0..units.len() {
                    sums.add(&units[random.below(units.len())]);
                }
                sums
            })
            .collect();
        Ok(Self { sums, confidence })
    }

    /// The interval of `value`, which `statistic` computes from sums. Resamples without a number (no bytes) are left out.
    fn estimate(&self, value: f64, statistic: impl Fn(&Sums) -> f64) -> Estimate {
        let mut values: Vec<f64> = self.sums.iter().map(statistic).filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        Estimate { value, low: quantile(&values, tail), high: quantile(&values, 1.0 - tail) }
    }

    fn statistics(&self, rows: &[DocumentLoss], loss: impl Fn(&Sums) -> f64) -> LossStatistics {
        let scored = || rows.iter().filter(|row| row.num_tokens > 0);
        let loss_sum: f64 = scored().map(|row| row.loss_sum).sum();
        let num_tokens: u64 = scored().map(|row| row.num_tokens).sum();
        let num_bytes: u64 = scored().map(|row| row.num_bytes).sum();
        let mean_loss = self.estimate(loss_sum / num_tokens as f64, |sums| loss(sums) / sums.num_tokens);
        let bits = |loss_sum: f64, num_bytes: f64| loss_sum / (LN_2 * num_bytes);
        LossStatistics {
            mean_loss,
            perplexity: mean_loss.map(f64::exp),
            bits_per_byte: (num_bytes > 0)
                .then(|| self.estimate(bits(loss_sum, num_bytes as f64), |sums| bits(loss(sums), sums.num_bytes))),
            num_tokens,
            num_documents: scored().count() as u64,
            num_bytes,
        }
    }
}

/// The quantile of sorted values by linear interpolation (type 7 of Hyndman and Fan, 1996); `None` of no values.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let position = share * sorted.len().checked_sub(1)? as f64;
    let below = sorted[position.floor() as usize];
    let above = sorted[position.ceil() as usize];
    Some(below + (above - below) * position.fract())
}

/// SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): small, fast, and
/// the same numbers on every machine and in every release, which the pinned intervals need.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end` (at most 2^32): the upper half of a product; its bias is below `end` / 2^32.
    fn below(&mut self, end: usize) -> usize {
        (((self.next() >> 32) * end as u64) >> 32) as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(loss_sum: f64, num_tokens: u64, num_bytes: u64) -> DocumentLoss {
        DocumentLoss { loss_sum, num_tokens, num_bytes }
    }

    fn close(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance, "{a} is not within {tolerance} of {b}");
    }

    /// Documents of 100 tokens and 400 bytes, losses uniform in `mean` +- 0.5 (standard deviation 1 / sqrt(12)).
    fn uniform_documents(num_documents: usize, mean: f64, seed: u64) -> Vec<DocumentLoss> {
        let mut random = SplitMix64(seed);
        let mut draw = || (random.next() >> 11) as f64 / (1u64 << 53) as f64;
        (0..num_documents).map(|_| row(100.0 * (mean - 0.5 + draw()), 100, 400)).collect()
    }

    #[test]
    fn splitmix_gives_the_published_numbers() {
        let mut random = SplitMix64(1234567);
        assert_eq!(random.next(), 6457827717110365317);
        assert_eq!(random.next(), 3203168211198807973);
    }

    #[test]
    fn means_weigh_tokens_and_bytes() {
        let rows = [row(30.0, 10, 40), row(20.0, 30, 110), row(0.0, 0, 7)];
        let statistics = loss_statistics(&rows, &Bootstrap::default()).unwrap();
        close(statistics.mean_loss.value, 1.25, 1e-12);
        close(statistics.perplexity.value, 1.25f64.exp(), 1e-12);
        close(statistics.bits_per_byte.unwrap().value, 50.0 / (LN_2 * 150.0), 1e-12);
        assert_eq!((statistics.num_tokens, statistics.num_documents, statistics.num_bytes), (40, 2, 150));
        // The ends are the two documents alone.
        close(statistics.mean_loss.low.unwrap(), 20.0 / 30.0, 1e-12);
        close(statistics.mean_loss.high.unwrap(), 3.0, 1e-12);
    }

    #[test]
    fn equal_documents_have_an_interval_of_no_width() {
        let statistics = loss_statistics(&[row(8.0, 4, 16); 50], &Bootstrap::default()).unwrap();
        assert_eq!(statistics.mean_loss.interval(), Some((2.0, 2.0)));
        let bits = statistics.bits_per_byte.unwrap();
        close(bits.high.unwrap() - bits.low.unwrap(), 0.0, 1e-12);
    }

    #[test]
    fn one_document_has_no_interval() {
        let rows = [row(8.0, 4, 0), row(0.0, 0, 0)];
        let comparison = compare(&rows, &rows, &Bootstrap::default()).unwrap();
        assert_eq!(comparison.base.mean_loss, Estimate { value: 2.0, low: None, high: None });
        assert_eq!(comparison.base.bits_per_byte, None);
        assert_eq!(comparison.share_better, None);
        assert_eq!(comparison.verdict(), Verdict::TooFewDocuments);
        assert!(comparison.to_string().contains("at least two documents"), "{comparison}");
    }

    #[test]
    fn width_is_that_of_the_normal_approximation() {
        // Also beyond MAX_UNITS, where documents are drawn in groups.
        for num_documents in [400, 5_000, 35_000] {
            let rows = uniform_documents(num_documents, 3.0, 7);
            let statistics = loss_statistics(&rows, &Bootstrap::default()).unwrap();
            let (low, high) = statistics.mean_loss.interval().unwrap();
            let expected = 2.0 * 1.96 * (1.0 / 12f64.sqrt()) / (num_documents as f64).sqrt();
            close(high - low, expected, 0.12 * expected);
            close((low + high) / 2.0, statistics.mean_loss.value, 0.1 * expected);
        }
    }

    #[test]
    fn intervals_cover_the_truth_as_often_as_they_say() {
        let bootstrap = Bootstrap { num_resamples: 300, ..Bootstrap::default() };
        let covered = (0..400)
            .filter(|&trial| {
                let rows = uniform_documents(40, 3.0, 1000 + trial);
                let (low, high) = loss_statistics(&rows, &bootstrap).unwrap().mean_loss.interval().unwrap();
                low <= 3.0 && 3.0 <= high
            })
            .count();
        assert!((364..=392).contains(&covered), "{covered} of 400 intervals cover the truth");
    }

    #[test]
    fn pairs_cancel_what_is_common() {
        // Documents differ by far more than the two models, which differ by 0.02 everywhere.
        let base = uniform_documents(60, 3.0, 3);
        let tuned: Vec<_> = base.iter().map(|r| row(r.loss_sum - 2.0, r.num_tokens, r.num_bytes)).collect();
        let comparison = compare(&base, &tuned, &Bootstrap::default()).unwrap();
        close(comparison.loss_difference.value, -0.02, 1e-9);
        close(comparison.loss_difference.low.unwrap(), -0.02, 1e-9);
        close(comparison.loss_difference.high.unwrap(), -0.02, 1e-9);
        assert_eq!(comparison.share_better, Some(1.0));
        assert_eq!(comparison.verdict(), Verdict::Better);
        // Either model alone has a wide interval, and it is the one that it has without a partner.
        assert!(comparison.base.mean_loss.high.unwrap() - comparison.base.mean_loss.low.unwrap() > 0.1);
        assert_eq!(comparison.base, loss_statistics(&base, &Bootstrap::default()).unwrap());
        let worse = compare(&tuned, &base, &Bootstrap::default()).unwrap();
        assert_eq!((worse.verdict(), worse.share_better), (Verdict::Worse, Some(0.0)));
    }

    #[test]
    fn verdicts_say_what_the_interval_allows() {
        let base = uniform_documents(30, 3.0, 3);
        let noise = uniform_documents(30, 3.0, 4);
        let undecided = compare(&base, &noise, &Bootstrap::default()).unwrap();
        assert_eq!(undecided.verdict(), Verdict::Undecided);
        let share = undecided.share_better.unwrap();
        assert!(share > 0.0 && share < 1.0);
        assert!(undecided.to_string().contains("contains zero"), "{undecided}");
        let better: Vec<_> = noise.iter().map(|r| row(r.loss_sum - 100.0, r.num_tokens, r.num_bytes)).collect();
        let text = compare(&base, &better, &Bootstrap::default()).unwrap().to_string();
        assert!(
            text.starts_with("The fine-tuned model is better") && text.contains("95 % interval \u{2212}"),
            "{text}"
        );
    }

    #[test]
    fn the_seed_decides_the_draws() {
        let rows = uniform_documents(50, 3.0, 3);
        let with_seed = |seed| loss_statistics(&rows, &Bootstrap { seed, ..Bootstrap::default() }).unwrap();
        assert_eq!(with_seed(1), with_seed(1));
        assert_ne!(with_seed(1).mean_loss.low, with_seed(2).mean_loss.low);
    }

    #[test]
    fn wrong_input_is_named() {
        let good = [row(1.0, 1, 1), row(2.0, 2, 2)];
        let default = Bootstrap::default();
        let message = |result: Result<LossStatistics>| result.unwrap_err().to_string();
        assert!(message(loss_statistics(&[], &default)).contains("no scored token"));
        assert!(message(loss_statistics(&[row(0.0, 0, 3)], &default)).contains("no scored token in its 1 documents"));
        assert!(message(loss_statistics(&[good[0], row(f64::NAN, 1, 1)], &default)).contains("document 2 is NaN"));
        let none = Bootstrap { num_resamples: 0, ..default };
        assert!(message(loss_statistics(&good, &none)).contains("num_resamples is 0"));
        let all = Bootstrap { confidence: 95.0, ..default };
        assert!(message(loss_statistics(&good, &all)).contains("confidence is 95"));
        let message = |result: Result<Comparison>| result.unwrap_err().to_string();
        assert!(message(compare(&good, &good[..1], &default)).contains("2 and 1 documents"));
        assert!(
            message(compare(&good, &[good[0], row(2.0, 3, 2)], &default)).contains("document 2 has 2 scored tokens")
        );
    }

    proptest! {
        #[test]
        fn intervals_are_ordered_and_perplexity_follows_the_loss(
            rows in prop::collection::vec((0.0f64..500.0, 0u64..200, 0u64..900), 1..30), seed: u64,
        ) {
            let rows: Vec<_> = rows.into_iter().map(|(loss, tokens, bytes)| row(loss, tokens, bytes)).collect();
            prop_assume!(rows.iter().any(|row| row.num_tokens > 0));
            let bootstrap = Bootstrap { num_resamples: 50, seed, ..Bootstrap::default() };
            let statistics = loss_statistics(&rows, &bootstrap).unwrap();
            let scored = rows.iter().filter(|row| row.num_tokens > 0).count();
            prop_assert_eq!(statistics.mean_loss.interval().is_some(), scored >= 2);
            if let Some((low, high)) = statistics.mean_loss.interval() {
                prop_assert!(low <= high);
                prop_assert_eq!(statistics.perplexity.interval(), Some((low.exp(), high.exp())));
            }
        }
    }
}
