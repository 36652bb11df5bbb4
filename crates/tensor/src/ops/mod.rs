//! The operations of the model, each with its formula, shapes, checks, forward and backward in one file.
//!
//! Shapes: T tokens of a micro-batch, d hidden size, V vocabulary, f intermediate size, H query heads, K key/value
//! heads, D head size, r LoRA rank. Wrong shapes are programming errors and panic; what a user can get wrong is checked
//! before.

pub mod adamw;
pub mod adamw_8bit;
pub mod adamw_offloaded;
pub mod attention;
pub mod attention_cached;
pub mod attention_decode;
pub mod dropout;
pub mod embedding;
pub mod grad_norm;
pub mod linear;
pub mod linear_cross_entropy;
pub mod products;
pub mod rmsnorm;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod swiglu;

#[cfg(test)]
#[path = "tests/finite_difference.rs"]
pub(crate) mod finite_difference;

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Every op, and whether it has kernels of its own on the CPU and on a GPU.
    const ALL: [(&str, bool, bool); 17] = [
        ("adamw", true, true),
        ("adamw_8bit", true, true),
        // Moves moments of the others to and from the GPU.
        ("adamw_offloaded", false, false),
        ("attention", true, true),
        // Rows, then decoding, over caches on a GPU.
        ("attention_cached", false, false),
        // A cache on a GPU is a tensor: `attention::forward_cached`.
        ("attention_decode", true, true),
        ("dropout", true, true),
        ("embedding", true, true),
        ("grad_norm", true, true),
        ("linear", true, true),
        ("linear_cross_entropy", true, true),
        // On a GPU each product is a launch of `linear`.
        ("products", true, false),
        ("rmsnorm", true, true),
        ("rope", true, true),
        ("rows", true, true),
        ("sample", true, true),
        ("swiglu", true, true),
    ];

    #[test]
    fn one_name_in_three_folders_and_a_parity_case() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let there =
            |folder: &str, name: &str, ending: &str| source.join(folder).join(format!("{name}.{ending}")).exists();
        for (name, cpu, gpu) in ALL {
            assert!(there("ops", name, "rs"), "{name}");
            assert_eq!(there("cpu", name, "rs"), cpu, "{name} on the CPU");
            assert_eq!([there("cuda", name, "rs"), there("cuda", name, "cu")], [gpu; 2], "{name} on a GPU");
            assert_eq!(crate::cuda::tests::parity::CASES.contains(&name), gpu, "{name}: a parity case");
        }
        let files = std::fs::read_dir(source.join("ops")).unwrap().flatten().map(|f| f.path());
        let mut names: Vec<String> = files.map(|f| f.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        names.retain(|name| !["mod", "tests"].contains(&name.as_str()));
        names.sort();
        assert_eq!(names, ALL.map(|(name, ..)| name));
    }
}
