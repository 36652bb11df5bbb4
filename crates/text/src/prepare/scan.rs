//! The first look at all rows: what the files hold, and what becomes of each row.
use super::{
    balance::{self, Plan, Values},
    facts::{Decision, Facts, Stratum},
    files::{self, DataSet, Input, Numbered},
};
use crate::{
    Balance, CleanOptions, CleanReport, Error, OnBadRow, PrepareOptions, PrepareProgress, Result, RowFormat, RowKind,
    Same, Split,
    clean::{self, Cleaner, Mark, Reason, Step},
    report::{FileReport, KeyReport},
    row::{self, Understood, kind_of, place},
    similar::{self, Index},
    split,
};
use rayon::prelude::*;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Keys of a file that are counted by name.
const MAX_KEYS: usize = 100;

/// What was found.
pub(super) struct Scan {
    /// By row.
    pub(super) decisions: Vec<Decision>,
    /// By file.
    pub(super) files: Vec<FileReport>,
    /// What cleaning did.
    pub(super) clean: CleanReport,
    /// By split.
    pub(super) shares: [Share; 3],
    /// What balancing makes of the training rows.
    pub(super) balance: Plan,
}

/// The values that the rows of a split are counted and grouped by.
pub(super) struct Share {
    pub(super) values: BTreeMap<String, usize>,
    pub(super) groups: usize,
    pub(super) largest_group: usize,
}

impl Share {
    fn of(facts: &[Facts], split: Split, names: &[Box<str>], options: &PrepareOptions) -> Self {
        let mut counts = vec![0_usize; names.len()];
        let mut groups: HashMap<u64, usize> = HashMap::new();
        for row in facts.iter().filter(|row| row.decision == Decision::Keep(split)) {
            if let Some(count) = counts.get_mut(row.value as usize) {
                *count += 1;
            }
            if options.group_by.is_some() {
                *groups.entry(row.group).or_default() += 1;
            }
        }
        let counted = names.iter().zip(counts).filter(|(_, count)| *count > 0);
        let values = counted.map(|(name, count)| (name.to_string(), count)).collect();
        Self { values, groups: groups.len(), largest_group: groups.into_values().max().unwrap_or(0) }
    }
}

/// What is known of a file so far.
#[derive(Default)]
struct Seen {
    rows: usize,
    bad_rows: usize,
    keys: BTreeMap<String, KeyReport>,
    /// Number of rows and first line of each format.
    formats: BTreeMap<RowFormat, (usize, usize)>,
    changed: BTreeMap<Step, usize>,
}

impl Seen {
    fn note(&mut self, fields: &Map<String, Value>) {
        for (key, value) in fields {
            if !self.keys.contains_key(key) {
                if self.keys.len() == MAX_KEYS {
                    continue;
                }
                self.keys.insert(key.clone(), KeyReport::default());
            }
            let Some(known) = self.keys.get_mut(key) else { continue };
            known.rows += 1;
            match value {
                Value::Null => known.null += 1,
                value if known.types.contains(kind_of(value)) => {}
                value => drop(known.types.insert(kind_of(value).into())),
            }
        }
    }

    fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.bad_rows += other.bad_rows;
        for (key, found) in other.keys {
            if self.keys.len() < MAX_KEYS || self.keys.contains_key(&key) {
                let known = self.keys.entry(key).or_default();
                known.rows += found.rows;
                known.null += found.null;
                known.types.extend(found.types);
            }
        }
        for (format, (count, line)) in other.formats {
            self.formats.entry(format).or_insert((0, line)).0 += count;
        }
        for (step, count) in other.changed {
            *self.changed.entry(step).or_default() += count;
        }
    }
}

/// Rows of one task.
const TASK: usize = 256;

/// Looks at all rows.
///
/// # Errors
/// A file that cannot be read; with `on_bad_row = "error"` the first bad row, or the first row of the rarer format
/// where a file has several.
pub(super) fn scan(
    options: &PrepareOptions,
    sets: &[DataSet],
    inputs: &[Input],
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Scan> {
    let examiner = Examiner::new(options, sets, inputs)?;
    let (mut facts, seen) = examiner.look_at_all(progress)?;
    let mut clean = CleanReport { compared: examiner.compare != Same::Keep, ..CleanReport::default() };
    let mut rest = &mut facts[..];
    let mut files = Vec::with_capacity(inputs.len());
    for (input, mut seen) in inputs.iter().zip(seen) {
        let (rows, others) = rest.split_at_mut(seen.rows);
        rest = others;
        let format = common_format(&input.name, &seen, options.on_bad_row)?;
        for odd in rows.iter_mut().filter(|row| row.format.is_some() && row.format != format) {
            odd.decision = Decision::Rejected;
            seen.bad_rows += 1;
        }
        cut_licence(rows);
        for (step, count) in seen.changed {
            *clean.changed.entry(step).or_default() += count;
        }
        files.push(FileReport {
            file: input.name.to_string(),
            split: input.split,
            format,
            rows: seen.rows,
            bad_rows: seen.bad_rows,
            keys: seen.keys,
        });
    }
    stratify(&mut facts, inputs, sets);
    clean.kept_duplicates = remove_same(&mut facts, &options.clean, clean.compared);
    let names = examiner.values.names(options)?;
    let shares = Split::ALL.map(|split| Share::of(&facts, split, &names, options));
    let balance = balance::balance(&mut facts, &names, options)?;
    let decisions: Vec<Decision> = facts.into_iter().map(|row| row.decision).collect();
    for decision in &decisions {
        if let Decision::Removed(reason) = decision {
            *clean.removed.entry(*reason).or_default() += 1;
        }
    }
    Ok(Scan { decisions, files, clean, shares, balance })
}

/// Looks at single rows.
struct Examiner<'a> {
    options: &'a PrepareOptions,
    sets: &'a [DataSet],
    inputs: &'a [Input],
    cleaner: Cleaner,
    /// Whether rows are compared with each other, and whether as a whole or by their phrases too.
    compare: Same,
    values: Values,
}

impl<'a> Examiner<'a> {
    fn new(options: &'a PrepareOptions, sets: &'a [DataSet], inputs: &'a [Input]) -> Result<Self> {
        let clean = &options.clean;
        // Where nothing is held out nothing can leak.
        let leakage = match inputs.iter().all(|input| input.split == Some(Split::Train)) {
            true => Same::Keep,
            false => clean.leakage,
        };
        let compare = match (clean.duplicates, leakage) {
            (Same::Keep, Same::Keep) => Same::Keep,
            (Same::Near, _) | (_, Same::Near) => Same::Near,
            _ => Same::Exact,
        };
        let (cleaner, values) = (Cleaner::new(clean)?, Values::new(options));
        Ok(Self { options, sets, inputs, cleaner, compare, values })
    }

    /// The facts of all rows, in order, and what each file holds.
    fn look_at_all(&self, progress: &mut dyn FnMut(PrepareProgress)) -> Result<(Vec<Facts>, Vec<Seen>)> {
        let bytes = self.inputs.iter().map(|input| input.bytes).sum();
        let mut facts: Vec<Facts> = Vec::new();
        let mut all: Vec<Seen> = self.inputs.iter().map(|_| Seen::default()).collect();
        let look = |group: Vec<Numbered>| -> Vec<_> {
            // A task looks at rows of one file only, so that what it has seen belongs to that.
            let tasks: Vec<&[Numbered]> =
                group.chunk_by(|a, b| a.input == b.input).flat_map(|rows| rows.chunks(TASK)).collect();
            let task = |rows: &&[Numbered]| {
                let mut seen = Seen::default();
                let found: Vec<_> = rows.iter().map(|row| self.look(row, &mut seen)).collect();
                (rows[0].input, found, seen)
            };
            tasks.par_iter().map(task).collect()
        };
        let mut note = |done: Vec<(usize, Vec<Result<Facts>>, Seen)>| {
            for (input, found, seen) in done {
                all[input].add(seen);
                for found in found {
                    facts.push(found?);
                }
            }
            Ok(())
        };
        files::for_each_group(
            self.inputs,
            (0..self.inputs.len(), 0),
            self.sets,
            &look,
            &mut note,
            &mut |bytes_done| {
                progress(PrepareProgress::Scanning { bytes_done, bytes });
            },
        )?;
        Ok((facts, all))
    }

    fn look(&self, row: &Numbered, seen: &mut Seen) -> Result<Facts> {
        let input = &self.inputs[row.input];
        let set = &self.sets[input.source];
        seen.rows += 1;
        let understood = row::understand(&row.raw, &input.name, &set.rows, &mut |fields| seen.note(fields));
        let number = row.input;
        let Understood { mut row, format, split_value, value } = match understood {
            Ok(understood) => understood,
            Err(bad) if self.options.on_bad_row == OnBadRow::Error => return Err(bad.error(&input.name)),
            Err(_) => {
                seen.bad_rows += 1;
                return Ok(Facts::rejected());
            }
        };
        seen.formats.entry(format).or_insert((0, row.line)).0 += 1;
        // Before it is cleaned: another cleaning must not move rows between the splits.
        let (seed, (validation, test)) = (self.options.split_seed, set.options.fractions());
        let mut facts = Facts { format: Some(format), ..Facts::rejected() };
        if let Some(value) = &value {
            facts.value = self.values.number(value);
        }
        if matches!(self.options.balance, Balance::Oversample | Balance::Undersample) {
            facts.draw = split::place(&row.content_hash()?, self.options.balance_seed);
        }
        facts.decision = Decision::Keep(match (input.split, split_value) {
            (fixed, Some(value)) if self.options.stratify_by.is_some() => {
                let place = match fixed {
                    Some(_) => None,
                    None => Some(split::place(&row.content_hash()?, seed)),
                };
                facts.stratum = Some(Box::new(Stratum { input: number, value, place }));
                fixed.unwrap_or(Split::Train)
            }
            (fixed, Some(group)) => {
                facts.group = similar::exact(&group, "");
                fixed.unwrap_or_else(|| split::assign(group.as_bytes(), seed, validation, test))
            }
            (Some(split), None) => split,
            (None, None) => split::assign(&row.content_hash()?, seed, validation, test),
        });
        if !self.cleaner.looks_at_text() && self.compare == Same::Keep {
            return Ok(facts);
        }
        if let RowKind::Text(text) = &row.kind {
            facts.mark = self.cleaner.gutenberg_mark(text);
        }
        for step in self.cleaner.clean(&mut row) {
            *seen.changed.entry(step).or_default() += 1;
        }
        let text = clean::whole_text(&row.kind);
        if let Some(reason) = self.cleaner.unwanted(&text) {
            facts.decision = Decision::Removed(reason);
        } else if self.compare != Same::Keep {
            let normal = similar::normal(&text);
            facts.exact = similar::exact(&text, &normal);
            if self.compare == Same::Near {
                facts.sketch = similar::sketch(&normal).map(Box::new);
            }
        }
        Ok(facts)
    }
}

/// Takes out the rows before and after a text of Project Gutenberg that stands in several rows.
fn cut_licence(rows: &mut [Facts]) {
    let remove = |rows: &mut [Facts]| {
        for row in rows.iter_mut().filter(|row| row.decision != Decision::Rejected) {
            row.decision = Decision::Removed(Reason::Gutenberg);
        }
    };
    if let Some(start) = rows.iter().position(|row| row.mark == Some(Mark::Start)) {
        remove(&mut rows[..start]);
    }
    if let Some(end) = rows.iter().position(|row| row.mark == Some(Mark::End)) {
        remove(&mut rows[end + 1..]);
    }
}

/// Holds out the same share of the rows of each value.
fn stratify(facts: &mut [Facts], inputs: &[Input], sets: &[DataSet]) {
    let mut strata: BTreeMap<(usize, &str), Vec<(f64, usize)>> = BTreeMap::new();
    for (index, row) in facts.iter().enumerate().filter(|(_, row)| matches!(row.decision, Decision::Keep(_))) {
        if let Some(stratum) = &row.stratum
            && let Some(place) = stratum.place
        {
            strata.entry((inputs[stratum.input].source, &stratum.value)).or_default().push((place, index));
        }
    }
    let mut held_out = Vec::new();
    for ((source, _), rows) in &mut strata {
        let (validation, test) = sets[*source].options.fractions();
        // Equal rows have equal positions: they stay in one split unless the border lies between them.
        rows.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let (validation, test) = split::stratum(rows.len(), validation, test);
        held_out.extend(rows[..validation].iter().map(|(_, index)| (*index, Split::Validation)));
        held_out.extend(rows[validation..validation + test].iter().map(|(_, index)| (*index, Split::Test)));
    }
    for (index, split) in held_out {
        facts[index].decision = Decision::Keep(split);
    }
}

/// Removes duplicates within each split, and training rows that are held out too. Held-out rows come first, so that of
/// two such rows the one to train on goes. The number of duplicates that stay, where rows were `compared` at all.
fn remove_same(facts: &mut [Facts], options: &CleanOptions, compared: bool) -> usize {
    let mut kept = 0;
    let mut held_out = HashSet::new();
    let mut decisions: Vec<(usize, Reason)> = Vec::new();
    let mut near_held_out = Index::new(options.near_threshold);
    for split in [Split::Validation, Split::Test, Split::Train] {
        let mut seen = HashSet::new();
        let mut near_seen = Index::new(options.near_threshold);
        for (index, row) in facts.iter().enumerate().filter(|(_, row)| row.decision == Decision::Keep(split)) {
            let near = |index: &Index<'_>| row.sketch.as_ref().is_some_and(|sketch| index.contains(sketch));
            let reason = match () {
                () if split == Split::Train && options.leakage != Same::Keep && held_out.contains(&row.exact) => {
                    Some(Reason::Leak)
                }
                () if split == Split::Train && options.leakage == Same::Near && near(&near_held_out) => {
                    Some(Reason::NearLeak)
                }
                () if compared && !seen.insert(row.exact) => match options.duplicates {
                    Same::Keep => {
                        kept += 1;
                        None
                    }
                    Same::Exact | Same::Near => Some(Reason::Duplicate),
                },
                () if options.duplicates == Same::Near && near(&near_seen) => Some(Reason::NearDuplicate),
                () => None,
            };
            if let Some(reason) = reason {
                decisions.push((index, reason));
                continue;
            }
            if let Some(sketch) = &row.sketch {
                if options.duplicates == Same::Near {
                    near_seen.add(sketch);
                }
                if split != Split::Train && options.leakage == Same::Near {
                    near_held_out.add(sketch);
                }
            }
            if split != Split::Train && options.leakage != Same::Keep {
                held_out.insert(row.exact);
            }
        }
    }
    for (index, reason) in decisions {
        facts[index].decision = Decision::Removed(reason);
    }
    kept
}

/// The format of most rows of a file, the first of several that are as many. Others are errors, unless they are
/// skipped.
fn common_format(file: &str, seen: &Seen, on_bad_row: OnBadRow) -> Result<Option<RowFormat>> {
    let common = seen.formats.iter().max_by_key(|(_, (count, line))| (*count, std::cmp::Reverse(*line)));
    if seen.formats.len() < 2 || on_bad_row == OnBadRow::Skip {
        return Ok(common.map(|(format, _)| *format));
    }
    let odd = seen.formats.iter().min_by_key(|(_, (count, line))| (*count, std::cmp::Reverse(*line)));
    let line = odd.map_or(0, |(_, (_, line))| *line);
    let counts: Vec<_> = seen
        .formats
        .iter()
        .map(|(format, (count, line))| format!("{count} of {}: {} (first: {line})", format.name(), format.describe()))
        .collect();
    Err(Error::Input(format!(
        "{}: the rows of a file must all be of one format, but there are {}; put them into separate files, name one with \
         row_format, or set on_bad_row = \"skip\" to keep the most common",
        place(file, line),
        counts.join("; ")
    )))
}
