//! Training rows balanced by a label or a group: drawn more or less often, or with more or less weight.
use super::facts::{Decision, Facts, NONE};
use crate::{Balance, Balanced, Error, PrepareOptions, Result, Split, clean::Reason};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{PoisonError, RwLock},
};

/// Different labels that are counted where nobody asked for it: more are no classes.
const MAX_LABELS: usize = 1000;

/// Different values that rows can be balanced by.
const MAX_VALUES: usize = 100_000;

/// The values that rows are counted by, each with a number.
pub(super) struct Values {
    known: RwLock<Known>,
    limit: usize,
}

#[derive(Default)]
struct Known {
    numbers: HashMap<Box<str>, u32>,
    names: Vec<Box<str>>,
    overflowed: bool,
}

impl Values {
    pub(super) fn new(options: &PrepareOptions) -> Self {
        let limit = match (options.balance, &options.stratify_by) {
            (Balance::None, None) => MAX_LABELS,
            (Balance::None, Some(_)) => NONE as usize,
            _ => MAX_VALUES,
        };
        Self { known: RwLock::default(), limit }
    }

    /// The number of `value`; the same for the same value.
    pub(super) fn number(&self, value: &str) -> u32 {
        // A thread that failed cannot have left the table half changed.
        if let Some(&number) = self.known.read().unwrap_or_else(PoisonError::into_inner).numbers.get(value) {
            return number;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(&number) = known.numbers.get(value) {
            return number;
        }
        if known.names.len() >= self.limit {
            known.overflowed = true;
            return NONE;
        }
        let number = known.names.len() as u32;
        known.numbers.insert(value.into(), number);
        known.names.push(value.into());
        number
    }

    /// The values by number; none when there are too many to be classes.
    ///
    /// # Errors
    /// Too many values to balance by.
    pub(super) fn names(self, options: &PrepareOptions) -> Result<Vec<Box<str>>> {
        let known = self.known.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (known.overflowed, options.balance) {
            (false, _) => Ok(known.names),
            (true, Balance::None) => Ok(Vec::new()),
            (true, _) => Err(Error::Input(format!(
                "{:?}, which the rows are to be balanced by, has more than {MAX_VALUES} different values; name a key with fewer \
                 in balance_by",
                options.balance_key().1
            ))),
        }
    }
}

/// What becomes of each row.
#[derive(Default)]
pub(super) struct Plan {
    /// By row, how often it is trained on; empty when once.
    pub(super) copies: Vec<u32>,
    /// By row, how much its loss counts; empty when 1.
    pub(super) weights: Vec<f32>,
    /// By value.
    pub(super) values: BTreeMap<String, Balanced>,
}

/// Balances the training rows among `facts`, in which rows that are not drawn are removed.
///
/// With n_v rows of value v and a target share p_v: undersampling draws n · p_v rows of each, where n = min n_v / p_v,
/// so that no row is drawn twice; oversampling takes n = max n_v / p_v, so that none is left out; loss weights are p_v
/// · Σn / n_v, whose mean over all rows is 1. Which rows are drawn follows from a hash of what they say.
///
/// # Errors
/// A target that does not name exactly the values of the training rows.
pub(super) fn balance(facts: &mut [Facts], names: &[Box<str>], options: &PrepareOptions) -> Result<Plan> {
    if options.balance == Balance::None {
        return Ok(Plan::default());
    }
    let mut rows: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, row) in facts.iter().enumerate().filter(|(_, row)| row.decision == Decision::Keep(Split::Train)) {
        if let Some(name) = names.get(row.value as usize) {
            rows.entry(name).or_default().push(index);
        }
    }
    let shares = shares(&rows, options)?;
    let ratio = |(name, share): (&&str, &f64)| rows[*name].len() as f64 / share;
    let (least, most) =
        shares.iter().map(ratio).fold((f64::INFINITY, 0.0_f64), |(least, most), n| (least.min(n), most.max(n)));
    let all: usize = rows.values().map(Vec::len).sum();
    let mut plan = Plan::default();
    match options.balance {
        Balance::LossWeight => plan.weights = vec![1.0; facts.len()],
        _ => plan.copies = vec![1; facts.len()],
    }
    for (name, mut members) in rows {
        let (count, share) = (members.len(), shares[name]);
        let mut balanced = Balanced { rows: count, drawn: count, weight: 1.0 };
        match options.balance {
            Balance::None => {}
            Balance::LossWeight => {
                balanced.weight = (share * all as f64 / count as f64) as f32;
                members.iter().for_each(|&index| plan.weights[index] = balanced.weight);
            }
            Balance::Oversample | Balance::Undersample => {
                let n = if options.balance == Balance::Oversample { most } else { least };
                balanced.drawn = ((n * share).round() as usize).max(1);
                members.sort_by(|&a, &b| facts[a].draw.total_cmp(&facts[b].draw).then(a.cmp(&b)));
                let (each, further) = (balanced.drawn / count, balanced.drawn % count);
                for (place, &index) in members.iter().enumerate() {
                    let copies = each + usize::from(place < further);
                    plan.copies[index] = u32::try_from(copies).unwrap_or(u32::MAX);
                    if copies == 0 {
                        facts[index].decision = Decision::Removed(Reason::Balance);
                    }
                }
            }
        }
        plan.values.insert(name.to_owned(), balanced);
    }
    Ok(plan)
}

/// The share that each value is to have.
fn shares<'a>(rows: &BTreeMap<&'a str, Vec<usize>>, options: &PrepareOptions) -> Result<BTreeMap<&'a str, f64>> {
    let target = &options.balance_target;
    if target.is_empty() {
        return Ok(rows.keys().map(|name| (*name, 1.0 / rows.len() as f64)).collect());
    }
    let found = || rows.keys().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    if let Some(unknown) = target.keys().find(|name| !rows.contains_key(name.as_str())) {
        return Err(Error::Input(format!(
            "balance_target names {unknown:?}, but no row to train on has it; the values are {}",
            found()
        )));
    }
    let total: f64 = target.values().sum();
    let share = |name: &&'a str| match target.get(*name) {
        Some(share) => Ok((*name, share / total)),
        None => Err(Error::Input(format!(
            "balance_target does not say which share {name:?} is to have; the values are {}",
            found()
        ))),
    };
    rows.keys().map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of these values, and how often or how much each counts.
    fn plan(rows: &[(&str, usize)], balance: Balance, target: &[(&str, f64)]) -> Result<(Vec<Facts>, Plan)> {
        let target = target.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect();
        let options = PrepareOptions { balance, balance_target: target, ..PrepareOptions::default() };
        let values = Values::new(&options);
        let mut facts = Vec::new();
        for (name, count) in rows {
            for place in 0..*count {
                let value = values.number(name);
                // The later a row, the earlier it is drawn.
                let mut row = Facts::train();
                (row.value, row.draw) = (value, -(place as f64));
                facts.push(row);
            }
        }
        let names = values.names(&options)?;
        let plan = super::balance(&mut facts, &names, &options)?;
        Ok((facts, plan))
    }

    fn drawn(plan: &Plan) -> Vec<usize> {
        plan.values.values().map(|value| value.drawn).collect()
    }

    #[test]
    fn undersampling_draws_no_row_twice_and_oversampling_leaves_none_out() {
        let rows = [("a", 6), ("b", 2), ("c", 4)];
        let (facts, under) = plan(&rows, Balance::Undersample, &[]).unwrap();
        assert_eq!(drawn(&under), [2, 2, 2]);
        assert_eq!(under.copies, [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]);
        let removed = facts.iter().filter(|row| row.decision == Decision::Removed(Reason::Balance)).count();
        assert_eq!(removed, 6);
        let (_, over) = plan(&rows, Balance::Oversample, &[]).unwrap();
        assert_eq!(drawn(&over), [6, 6, 6]);
        assert_eq!(over.copies, [1, 1, 1, 1, 1, 1, 3, 3, 1, 1, 2, 2]);
        let target = [("a", 1.0), ("b", 2.0), ("c", 1.0)];
        let (_, over) = plan(&rows, Balance::Oversample, &target).unwrap();
        assert_eq!(drawn(&over), [6, 12, 6]);
        let (_, under) = plan(&rows, Balance::Undersample, &target).unwrap();
        assert_eq!(drawn(&under), [1, 2, 1]);
    }

    #[test]
    fn loss_weights_have_the_mean_one_and_the_target_as_shares() {
        let (_, plan) = plan(&[("a", 6), ("b", 2)], Balance::LossWeight, &[("a", 0.25), ("b", 0.75)]).unwrap();
        assert!(plan.copies.is_empty());
        assert_eq!(plan.weights.iter().sum::<f32>(), 8.0);
        assert_eq!(plan.weights[..6].iter().sum::<f32>(), 2.0);
        assert_eq!(plan.values["b"], Balanced { rows: 2, drawn: 2, weight: 3.0 });
    }

    #[test]
    fn a_target_names_exactly_the_values() {
        let refusal = |target: &[(&str, f64)]| {
            plan(&[("a", 1), ("b", 1)], Balance::Oversample, target).err().expect("refused").to_string()
        };
        assert!(refusal(&[("a", 1.0), ("x", 1.0)]).contains("names \"x\", but no row to train on has it"));
        assert!(
            refusal(&[("a", 1.0)]).contains("does not say which share \"b\" is to have; the values are \"a\", \"b\"")
        );
    }

    #[test]
    fn many_labels_are_no_classes() {
        let options = PrepareOptions::default();
        let values = Values::new(&options);
        let numbers: Vec<u32> = (0..=MAX_LABELS).map(|i| values.number(&i.to_string())).collect();
        assert_eq!((numbers[3], numbers[MAX_LABELS], values.number("3")), (3, NONE, 3));
        assert!(values.names(&options).unwrap().is_empty());
    }
}
