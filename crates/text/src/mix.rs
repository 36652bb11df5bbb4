//! Several data sets mixed: each with its own files, mapping and template, and its share of an epoch.
//!
//! Every set is packed into blocks of its own, and an epoch draws blocks of each: with n_s blocks, e_s epochs and
//! weight w_s, the share of set s is p_s = w_s · (e_s n_s)^(1/T) / Σ, and an epoch of Σ e_s n_s blocks has round(p_s Σ
//! e n) of them. So with temperature T = 1 and weights of 1 each set is seen e_s times an epoch; a higher temperature
//! brings the shares nearer to each other (Arivazhagan et al. 2019, arXiv:1907.05019); a weight multiplies the share.
use crate::PrepareOptions;
use serde::{Deserialize, Serialize};

/// What a data set holds to train on, and how much of it an epoch draws.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// Rows.
    pub rows: usize,
    /// Documents.
    pub documents: usize,
    /// Tokens.
    pub tokens: usize,
    /// Tokens whose loss counts fully.
    pub trained_tokens: usize,
    /// Blocks, which follow those of the sets before it.
    pub blocks: usize,
    /// Blocks that an epoch draws.
    pub blocks_per_epoch: usize,
}

/// Fills in how many blocks of each set an epoch draws, at least one.
pub(crate) fn plan(reports: &mut [SourceReport], options: &PrepareOptions) {
    let sizes = || reports.iter().zip(&options.sources).map(|(report, source)| report.blocks as f64 * source.epochs);
    let epoch: f64 = sizes().sum();
    let pulls: Vec<f64> = sizes()
        .zip(&options.sources)
        .map(|(size, source)| source.weight * size.powf(1.0 / options.mix_temperature))
        .collect();
    let total: f64 = pulls.iter().sum();
    for (report, pull) in reports.iter_mut().zip(pulls) {
        report.blocks_per_epoch = ((pull / total * epoch).round() as usize).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DataSource;

    fn per_epoch(sizes: &[usize], change: impl FnOnce(&mut PrepareOptions)) -> Vec<usize> {
        let mut options = PrepareOptions { sources: vec![DataSource::default(); sizes.len()], ..Default::default() };
        change(&mut options);
        let mut reports: Vec<_> =
            sizes.iter().map(|&blocks| SourceReport { blocks, ..SourceReport::default() }).collect();
        plan(&mut reports, &options);
        reports.into_iter().map(|report| report.blocks_per_epoch).collect()
    }

    #[test]
    fn shares_follow_from_sizes_epochs_weights_and_temperature() {
        assert_eq!(per_epoch(&[100, 10], |_| ()), [100, 10]);
        assert_eq!(per_epoch(&[100, 10], |o| o.sources[1].epochs = 3.5), [100, 35]);
        // Twice the odds: 2 · 10 against 100, of 110 blocks.
        assert_eq!(per_epoch(&[100, 10], |o| o.sources[1].weight = 2.0), [92, 18]);
        // The square roots of 100 and 25 are as 2 to 1.
        assert_eq!(per_epoch(&[100, 25], |o| o.mix_temperature = 2.0), [83, 42]);
        assert_eq!(per_epoch(&[100, 10], |o| o.mix_temperature = 1e9), [55, 55]);
        assert_eq!(per_epoch(&[1000, 1], |o| o.sources[1].weight = 1e-9), [1001, 1]);
    }
}
