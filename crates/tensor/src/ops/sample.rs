//! Choosing the next token from logits: the most likely one, or a draw among the most likely ones.
//!
//! A draw takes the tokens in the order of falling logits (equals: rising ids), cuts the list off after the first k
//! (`top_k`), the first that together reach a share of the probability of these (`top_p`; Holtzman et al., "The curious
//! case of neural text degeneration", 2020) and the last that is likely enough beside the first (`min_p`), and takes
//! the one at which the sum of probabilities passes `uniform` times that of all that are left. A GPU does the same in
//! fixed point (2⁻⁴⁰ of the most likely token): for the same logits it draws the same token, but where the number falls
//! onto the border between two.

pub use crate::contract::{Choice, Draw};
pub use crate::cpu::sample::{Scratch, largest, row};
use crate::cuda;
use crate::tensor::Tensor;

/// A token for each row of `logits` [T, V]; what the rows hold afterwards is not defined.
///
/// # Panics
/// When there are not as many `choices` as rows, V is 0, or an id of a history is not below V.
pub fn rows(logits: &mut Tensor, choices: &[Choice<'_>], scratch: &mut Scratch) -> Vec<u32> {
    assert_eq!(logits.rows(), choices.len(), "a choice for each row of {logits:?}");
    assert!(logits.cols() > 0, "no logits");
    if let Some(gpu) = logits.gpu().cloned() {
        return cuda::sample::rows(&gpu, logits, choices);
    }
    choices.iter().enumerate().map(|(t, choice)| row(logits.row(t), choice, scratch)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    pub(crate) const ALL: Draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };

    fn choose(logits: &[f32], draw: Draw) -> u32 {
        let choice = Choice { repetition_penalty: 1.0, history: &[], draw: Some(draw) };
        row(logits, &choice, &mut Scratch::default())
    }

    #[test]
    fn numbers_fall_where_probabilities_say() {
        let logits = [0.15f32, 0.5, 0.05, 0.3].map(f32::ln);
        let at = |uniform, draw: Draw| choose(&logits, Draw { uniform, ..draw });
        // In the order of probabilities: token 1 up to 0.5, token 3 up to 0.8, token 0 up to 0.95, token 2.
        let steps = [0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96].map(|u| at(u, ALL));
        assert_eq!(steps, [1, 1, 3, 3, 0, 0, 2]);
        let two = Draw { top_k: 2, ..ALL };
        assert_eq!([0.62, 0.63, 0.999].map(|u| at(u, two)), [1, 3, 3]);
        assert_eq!(at(0.999, Draw { top_p: 0.7, ..ALL }), 3);
        assert_eq!(at(0.999, Draw { min_p: 0.4, ..ALL }), 3);
        assert_eq!(at(0.999, Draw { temperature: 0.01, ..ALL }), 1);
    }

    #[test]
    fn the_floor_keeps_the_most_likely_in_their_order() {
        let mut rng = Rng::new(5, 0);
        for n in [70, 1000, 5000] {
            // Coarse values: many ties.
            let logits: Vec<f32> = (0..n).map(|_| (rng.normal() * 8.0).round() / 4.0).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            assert_eq!(largest(&logits), order[0] as u32);
            for k in [1, 2, 20, n - 1] {
                let mut scratch = Scratch::default();
                let draw = Some(Draw { top_k: k, ..ALL });
                row(&logits, &Choice { repetition_penalty: 1.0, history: &[], draw }, &mut scratch);
                let kept: Vec<usize> = scratch.candidates.iter().map(|(id, _)| *id as usize).collect();
                assert_eq!(kept, order[..k]);
            }
        }
    }

    #[test]
    fn the_first_of_the_largest_and_penalties() {
        let mut logits = Tensor::from_slice(&[2, 4], &[1.0, 3.0, 3.0, -1.0, -5.0, -7.0, -5.0, -6.0]);
        let greedy = Choice { repetition_penalty: 1.0, history: &[], draw: None };
        assert_eq!(rows(&mut logits, &[greedy; 2], &mut Scratch::default()), [1, 0]);
        // What occurred twice is made less likely once.
        let penalised = |history| Choice { repetition_penalty: 2.0, history, draw: None };
        let choices = [penalised(&[1, 1]), penalised(&[0])];
        assert_eq!(rows(&mut logits, &choices, &mut Scratch::default()), [2, 2]);
    }
}
