//! Which files of a data set's repository are wanted: its configurations and splits, from the header of its README.md or,
//! without one, from the names of its files, as the library `datasets` reads them.

use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};
use tunesmith_files::kind::{Kind, kind};
use tunesmith_files::{Error, Result};

/// What is wanted of a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subset {
    /// The configuration; the default one when absent.
    pub(crate) config: Option<String>,
    /// The split; every way to name one is known to the caller.
    pub(crate) split: Option<String>,
}

/// How a subset is written, for messages.
pub(crate) const FORM: &str = "hf:datasets/org/name[@revision][?config=NAME][&split=NAME]";

impl Subset {
    /// Parses what follows `?`.
    pub(crate) fn parse(query: &str) -> Result<Self, String> {
        let mut subset = Self::default();
        for part in query.split('&') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let field = match key {
                "config" => &mut subset.config,
                "split" => &mut subset.split,
                _ => return Err(format!("`{part}` is neither config=NAME nor split=NAME")),
            };
            let sound = |c: char| c.is_alphanumeric() || "._-+".contains(c);
            if value.is_empty() || !value.chars().all(sound) {
                return Err(format!("`{value}` is not the name of a {key}"));
            }
            if field.replace(value.to_owned()).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        Ok(subset)
    }

    /// What stands behind the name in a spec.
    pub(crate) fn query(&self) -> String {
        let part = |key: &str, value: &Option<String>| value.as_ref().map(|value| format!("{key}={value}"));
        let parts: Vec<_> = [part("config", &self.config), part("split", &self.split)].into_iter().flatten().collect();
        if parts.is_empty() { String::new() } else { format!("?{}", parts.join("&")) }
    }
}

/// Splits of a configuration, and the files of each.
type Splits = BTreeMap<String, BTreeSet<String>>;

/// The files of `names` that `subset` means. `card` is the text of README.md, if there is one.
///
/// # Errors
/// In words that follow the spec: a header that cannot be read, a configuration or split that is not there or must be named,
/// files that are not read.
pub(crate) fn choose(
    subset: &Subset,
    card: Option<&str>,
    names: &BTreeSet<String>,
) -> Result<BTreeSet<String>, String> {
    let mut configs = match card {
        Some(card) => described(card, names)?,
        None => BTreeMap::new(),
    };
    if configs.is_empty() {
        configs = by_names(names)?;
    }
    let listed = || configs.keys().filter(|name| !name.is_empty()).cloned().collect::<Vec<_>>().join(", ");
    let (config, splits) = match &subset.config {
        Some(name) => configs.get_key_value(name).ok_or_else(|| match listed() {
            list if list.is_empty() => format!("the data set has no configurations, so there is no `{name}`"),
            list => format!("there is no configuration `{name}`; the data set has {list}"),
        })?,
        None => match configs.get_key_value("default").or_else(|| configs.get_key_value("")) {
            Some(found) => found,
            None if configs.len() == 1 => configs.first_key_value().ok_or("the data set is empty")?,
            None => {
                return Err(format!("the data set has several configurations: add ?config=NAME; it has {}", listed()));
            }
        },
    };
    let wanted = subset.split.as_deref().unwrap_or("train");
    let files = splits.get(wanted).filter(|files| !files.is_empty()).ok_or_else(|| {
        let there: Vec<&str> =
            splits.iter().filter(|(_, files)| !files.is_empty()).map(|(name, _)| &name[..]).collect();
        let of = if config.is_empty() { String::new() } else { format!(" of configuration `{config}`") };
        format!("there is no split `{wanted}`{of}; choose with ?split=NAME; there are {}", there.join(", "))
    })?;
    // Names come from the network and become paths.
    match files.iter().find(|name| !is_plain(name)) {
        Some(name) => Err(format!("the repository lists the name `{name}`, which is not plain enough to fetch")),
        None => Ok(files.clone()),
    }
}

/// A relative path that needs no escaping in an address.
fn is_plain(name: &str) -> bool {
    name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-+=@,()/".contains(c))
}

/// The header of a README.md, as far as it matters here.
#[derive(Default, Deserialize)]
struct Header {
    #[serde(default)]
    configs: Vec<Config>,
}

#[derive(Deserialize)]
struct Config {
    config_name: String,
    #[serde(default)]
    data_files: Option<DataFiles>,
    #[serde(default)]
    data_dir: Option<String>,
    #[serde(default)]
    default: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum DataFiles {
    Path(String),
    Items(Vec<Item>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Item {
    Path(String),
    Split { split: String, path: Paths },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Paths {
    One(String),
    Several(Vec<String>),
}

/// The configurations that the header names. None when there is no header, or it names none.
fn described(card: &str, names: &BTreeSet<String>) -> Result<BTreeMap<String, Splits>, String> {
    let mut lines = card.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Ok(BTreeMap::new());
    }
    let header: String = lines.take_while(|line| line.trim_end() != "---").map(|line| format!("{line}\n")).collect();
    if header.trim().is_empty() {
        return Ok(BTreeMap::new());
    }
    let header: Header = serde_saphyr::from_str(&header).map_err(|e| {
        format!("the header of README.md cannot be read: {}", e.to_string().lines().next().unwrap_or_default())
    })?;
    let mut configs = BTreeMap::new();
    let several = header.configs.len() > 1;
    for config in header.configs {
        let splits = match config.data_files {
            Some(files) => given(files, config.data_dir.as_deref(), names)?,
            None => {
                let below = config.data_dir.map_or_else(String::new, |folder| format!("{}/", folder.trim_matches('/')));
                let inside = names.iter().filter(|name| name.starts_with(&below)).cloned().collect();
                by_names(&inside)?.into_values().next().unwrap_or_default()
            }
        };
        // The one that is marked stands under a name that is looked for first.
        if config.default && several && config.config_name != "default" {
            configs.insert(String::new(), splits.clone());
        }
        configs.insert(config.config_name, splits);
    }
    Ok(configs)
}

/// The files that patterns of a header mean.
fn given(files: DataFiles, folder: Option<&str>, names: &BTreeSet<String>) -> Result<Splits, String> {
    let mut splits = Splits::new();
    let items = match files {
        DataFiles::Path(path) => vec![Item::Path(path)],
        DataFiles::Items(items) => items,
    };
    for item in items {
        let (split, patterns) = match item {
            Item::Path(path) => ("train".to_owned(), vec![path]),
            Item::Split { split, path: Paths::One(path) } => (split, vec![path]),
            Item::Split { split, path: Paths::Several(paths) } => (split, paths),
        };
        let found = splits.entry(split).or_default();
        for pattern in patterns {
            let pattern = match folder {
                Some(folder) => format!("{}/{pattern}", folder.trim_matches('/')),
                None => pattern,
            };
            let matcher = glob::Pattern::new(&pattern)
                .map_err(|e| format!("README.md has the pattern `{pattern}`, which cannot be read: {e}"))?;
            let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
            let before = found.len();
            found.extend(names.iter().filter(|name| matcher.matches_with(name, options)).cloned());
            if let Some(name) = found.iter().find(|name| kind(Path::new(name)).is_err()) {
                return Err(format!("README.md names {name}, which is of a kind that is not read"));
            }
            if found.len() == before {
                return Err(format!("README.md names {pattern}, but the repository has no such file"));
            }
        }
    }
    Ok(splits)
}

/// Files that describe others.
const DESCRIPTIONS: &[&str] =
    &["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"];

/// Configurations and splits by the names of files and folders.
fn by_names(names: &BTreeSet<String>) -> Result<BTreeMap<String, Splits>, String> {
    let data = |name: &&String| {
        let last = name.rsplit('/').next().unwrap_or_default();
        let is_hidden = name.split('/').any(|part| part.starts_with('.'));
        !is_hidden && !DESCRIPTIONS.contains(&last)
    };
    let known: Vec<(&String, Kind)> =
        names.iter().filter(data).filter_map(|name| kind(Path::new(name)).ok().map(|(kind, _)| (name, kind))).collect();
    // Beside columns, text is documentation; beside rows, plain text is.
    let best =
        [&[Kind::Parquet][..], &[Kind::Arrow], &[Kind::JsonLines, Kind::Csv, Kind::Tsv, Kind::Json], &[Kind::Text]]
            .into_iter()
            .find(|kinds| known.iter().any(|(_, kind)| kinds.contains(kind)));
    let Some(best) = best else {
        return Err(
            "the repository has no file of data that is read (Parquet, Arrow, JSON, CSV, TSV, text); if it is \
                    made by a script, try the revision @refs/convert/parquet"
                .into(),
        );
    };
    let mut configs: BTreeMap<String, Splits> = BTreeMap::new();
    for (name, _) in known.iter().filter(|(_, kind)| best.contains(kind)) {
        let (config, split) = config_and_split(name);
        configs.entry(config).or_default().entry(split).or_default().insert((*name).clone());
    }
    Ok(configs)
}

/// Names that mean a split.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Configuration (empty: the only one) and split of a file.
fn config_and_split(name: &str) -> (String, String) {
    let parts: Vec<&str> = name.split('/').collect();
    let stem = parts.last().map_or("", |file| file.split('.').next().unwrap_or_default());
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // As the hub converts data sets: config/split/0000.parquet.
    if let [config, split, _] = parts[..]
        && is_number(stem)
    {
        return (config.to_owned(), split.to_owned());
    }
    // As they are pushed: split-00000-of-00001.
    if let Some((rest, of)) = stem.rsplit_once("-of-")
        && let Some((split, number)) = rest.rsplit_once('-')
        && is_number(of)
        && is_number(number)
        && split != "data"
    {
        return (String::new(), split.to_owned());
    }
    let words = |part: &str| part.split(|c: char| !c.is_alphanumeric()).map(str::to_lowercase).collect::<Vec<_>>();
    let folders = parts[..parts.len() - 1].iter().copied().chain([stem]);
    let found = folders.flat_map(words).find_map(|word| SPLITS.iter().find(|(_, known)| known.contains(&&word[..])));
    (String::new(), found.map_or("train", |(split, _)| *split).to_owned())
}

/// The error of a data set where a model or an adapter is wanted.
pub(crate) fn not_a_model(spec: &str) -> Error {
    Error::Input(format!("{spec} is a data set; give it in data.train, data.validation or data.test"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn chosen(query: &str, card: Option<&str>, list: &[&str]) -> Result<Vec<String>, String> {
        let subset = if query.is_empty() { Subset::default() } else { Subset::parse(query)? };
        choose(&subset, card, &names(list)).map(|files| files.into_iter().collect())
    }

    #[test]
    fn subsets_are_read_and_written_again() {
        for query in ["config=fr&split=train", "split=dev", "config=a.b-c"] {
            assert_eq!(Subset::parse(query).unwrap().query(), format!("?{query}"));
        }
        assert_eq!(Subset::default().query(), "");
        for (query, says) in [
            ("x=1", "neither"),
            ("split=", "not the name"),
            ("split=a&split=b", "twice"),
            ("config=../x", "not the name"),
        ] {
            assert!(Subset::parse(query).unwrap_err().contains(says), "{query}");
        }
    }

    const CARD: &str = "---\nlicense: mit\ndataset_info:\n  features:\n  - name: text\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n\
        \x20 - split: train\n    path: en/train-*\n  - split: test\n    path:\n    - en/test.csv\n    - 'en/more/**/*.csv'\n\
        - config_name: fr\n  data_files: fr/*.jsonl\n- config_name: de\n  data_dir: de\n---\n# Text\n";
    const FILES: &[&str] = &[
        "README.md",
        "en/train-1.csv",
        "en/train-2.csv",
        "en/deep/train-3.csv",
        "en/test.csv",
        "en/more/x/y.csv",
        "fr/a.jsonl",
        "de/dev.csv",
        "de/train.csv",
    ];

    #[test]
    fn the_header_says_configurations_and_splits() {
        assert_eq!(chosen("", Some(CARD), FILES).unwrap(), ["en/train-1.csv", "en/train-2.csv"]);
        assert_eq!(chosen("split=test", Some(CARD), FILES).unwrap(), ["en/more/x/y.csv", "en/test.csv"]);
        assert_eq!(chosen("config=fr", Some(CARD), FILES).unwrap(), ["fr/a.jsonl"]);
        assert_eq!(chosen("config=de&split=validation", Some(CARD), FILES).unwrap(), ["de/dev.csv"]);
        let error = chosen("split=dev", Some(CARD), FILES).unwrap_err();
        assert!(error.contains("no split `dev`") && error.contains("test, train"), "{error}");
        let error = chosen("config=es", Some(CARD), FILES).unwrap_err();
        assert!(error.contains("no configuration `es`; the data set has de, en, fr"), "{error}");
        let unmarked = CARD.replace("  default: true\n", "");
        let error = chosen("", Some(&unmarked), FILES).unwrap_err();
        assert!(error.contains("add ?config=NAME; it has de, en, fr"), "{error}");
    }

    #[test]
    fn a_header_that_does_not_fit_is_an_error() {
        let card = |files: &str| format!("---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n");
        assert!(chosen("", Some(&card("none/*.csv")), FILES).unwrap_err().contains("no such file"));
        assert!(chosen("", Some(&card("README.md")), FILES).unwrap_err().contains("a kind that is not read"));
        assert!(chosen("", Some(&card("'a['")), FILES).unwrap_err().contains("cannot be read"));
        assert!(chosen("", Some("---\nconfigs: 3\n---\n"), FILES).unwrap_err().contains("header of README.md"));
        assert!(chosen("", Some("---\n{\n---\n"), FILES).unwrap_err().contains("header of README.md"));
    }

    #[test]
    fn names_say_splits_where_there_is_no_header() {
        let pushed = [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/extra-00000-of-00001.parquet",
            "notes.txt",
        ];
        assert_eq!(chosen("", Some("# Only text"), &pushed).unwrap(), pushed[..2]);
        assert_eq!(chosen("split=extra", None, &pushed).unwrap(), pushed[2..3]);
        let converted = ["en/train/0000.parquet", "en/test/0000.parquet", "fr/train/0000.parquet"];
        assert_eq!(chosen("config=en&split=test", None, &converted).unwrap(), converted[1..2]);
        assert!(chosen("", None, &converted).unwrap_err().contains("several configurations"));
        let saved = [
            "dataset_dict.json",
            "train/data-00000-of-00001.arrow",
            "train/state.json",
            "dev/data-00000-of-00001.arrow",
        ];
        assert_eq!(chosen("", None, &saved).unwrap(), saved[1..2]);
        assert_eq!(chosen("split=validation", None, &saved).unwrap(), saved[3..]);
        assert_eq!(chosen("", None, &["my_train_rows.csv", "my-test.csv"]).unwrap(), ["my_train_rows.csv"]);
        assert_eq!(chosen("", None, &["rows.jsonl.gz", "info.txt"]).unwrap(), ["rows.jsonl.gz"]);
        assert!(chosen("", None, &["script.py"]).unwrap_err().contains("@refs/convert/parquet"));
        assert!(chosen("", None, &["a b.csv"]).unwrap_err().contains("not plain enough"));
    }
}
