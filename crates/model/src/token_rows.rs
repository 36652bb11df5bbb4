//! Added tokens: rows of the embedding and of the head that did not come with the model, and how an adapter trains them.
//!
//! A new row begins at the mean of the rows that were there (Hewitt, "Initializing New Word Embeddings for Pretrained Language
//! Models", 2021). A tied head is the embedding: one tensor, one row. The rows of an adapter are parameters of its own, which are
//! looked up in place of those of the frozen matrix, as PEFT's `trainable_token_indices` does it.

use crate::{Config, Error, Llama, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use tunesmith_tensor::{Device, Tensor, Weight};

/// The matrices that have a row for each token, as PEFT names them.
pub const TOKEN_MODULES: [&str; 2] = ["embed_tokens", "lm_head"];

/// Most rows that an adapter may name: more than any vocabulary has.
const MAX_TOKENS: u32 = 1 << 22;

/// Rows of one matrix that an adapter replaces.
#[derive(Debug)]
pub(crate) struct TokenRows {
    /// `embed_tokens` or `lm_head`.
    pub(crate) module: String,
    /// The tokens, ascending.
    pub(crate) ids: Vec<u32>,
    /// Index of the adapter's parameter [n, d] with the rows.
    pub(crate) rows: usize,
}

/// Path of a module of [`TOKEN_MODULES`] in the model.
pub(crate) fn path(module: &str) -> &'static str {
    if module == "lm_head" { "lm_head" } else { "model.embed_tokens" }
}

/// Name of the tensor with the rows of `module` in an adapter.
pub fn token_rows_name(module: &str) -> String {
    format!("base_model.model.{}.token_adapter.trainable_tokens_delta", path(module))
}

/// The tokens of each module as PEFT's config has them, with the ids ascending.
pub type TokenIndices = BTreeMap<String, Vec<u32>>;

/// The indices with which an adapter trains the rows of `ids` in a model of `config`: in the embedding, and in a head of its own.
pub fn token_indices(config: &Config, ids: &[u32]) -> TokenIndices {
    let count = if config.tie_word_embeddings { 1 } else { 2 };
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    TOKEN_MODULES[..count].iter().map(|module| ((*module).to_owned(), ids.clone())).collect()
}

/// `matrix` [rows, d] with rows added to make it `size` of them, each the mean of those that were there.
///
/// # Panics
/// When the matrix has no rows, or more than `size`.
pub fn grown(matrix: &Tensor, size: usize) -> Tensor {
    let (old, cols) = (matrix.rows(), matrix.cols());
    assert!(0 < old && old <= size, "{old} rows cannot become {size}");
    let mean = mean_row(matrix);
    let mut new = Tensor::zeros(&[size, cols]);
    new.data_mut()[..old * cols].copy_from_slice(matrix.data());
    for row in old..size {
        new.row_mut(row).copy_from_slice(&mean);
    }
    new
}

/// The mean of all rows.
pub fn mean_row(matrix: &Tensor) -> Vec<f32> {
    let mut sums = vec![0.0f64; matrix.cols()];
    for row in 0..matrix.rows() {
        for (sum, x) in sums.iter_mut().zip(matrix.row(row)) {
            *sum += f64::from(*x);
        }
    }
    sums.into_iter().map(|sum| (sum / matrix.rows() as f64) as f32).collect()
}

/// Rows that a matrix must have for the tokens of `indices`, at least `vocab_size`.
pub fn vocabulary_for(indices: &TokenIndices, vocab_size: usize) -> usize {
    let highest = indices.values().flatten().max();
    highest.map_or(vocab_size, |id| vocab_size.max(*id as usize + 1))
}

/// Checks what an adapter's config says; the message does not name the file.
pub(crate) fn check(indices: &TokenIndices) -> Result<(), String> {
    for (module, ids) in indices {
        if !TOKEN_MODULES.contains(&module.as_str()) {
            return Err(format!("trainable_token_indices names {module}; it must be embed_tokens or lm_head"));
        }
        if let Some(id) = ids.iter().find(|id| **id >= MAX_TOKENS) {
            return Err(format!("trainable_token_indices has {id}, which is no token of any model"));
        }
        if !ids.is_sorted_by(|a, b| a < b) {
            return Err(format!("trainable_token_indices of {module} must ascend, each once"));
        }
    }
    Ok(())
}

impl Llama {
    /// Gives the embedding and the head `size` rows, if they have fewer; new ones are the mean of the old. A packed matrix becomes
    /// dense.
    ///
    /// # Errors
    /// When the weights are rounded to 8 bits, or on a GPU.
    pub fn grow_vocabulary(&mut self, size: usize) -> Result<()> {
        if size <= self.config.vocab_size {
            return Ok(());
        }
        if self.computes_int8() || self.device() != Device::Cpu {
            return Err(Error::Input(
                "the vocabulary can grow before the weights are rounded to 8 bits or moved to a GPU, not after".into(),
            ));
        }
        for matrix in self.token_matrices() {
            let value = &mut self.parameters[matrix].value;
            *value = grown(&dense(value), size).into();
        }
        self.config.vocab_size = size;
        Ok(())
    }

    /// Begins the rows of added tokens at the mean of all rows, in the embedding and the head; both grow where they have no such
    /// rows.
    ///
    /// # Errors
    /// As [`Llama::grow_vocabulary`].
    pub fn add_tokens(&mut self, ids: &[u32]) -> Result<()> {
        let old = self.config.vocab_size;
        let means: Vec<(usize, Vec<f32>)> =
            self.token_matrices().into_iter().map(|i| (i, mean_row(&dense(&self.parameters[i].value)))).collect();
        self.grow_vocabulary(ids.iter().max().map_or(0, |id| *id as usize + 1))?;
        for (matrix, mean) in means {
            // Those that are new have it already.
            for id in ids.iter().filter(|id| (**id as usize) < old) {
                self.parameters[matrix].make_dense().row_mut(*id as usize).copy_from_slice(&mean);
            }
        }
        Ok(())
    }

    /// The matrix that has the rows of `module`, in f32.
    pub(crate) fn token_matrix(&self, module: &str) -> Cow<'_, Tensor> {
        dense(&self.parameters[self.token_matrix_index(module)].value)
    }

    pub(crate) fn token_matrix_index(&self, module: &str) -> usize {
        if module == "lm_head" { self.head } else { self.embed }
    }

    /// The embedding, and the head where it is another matrix.
    fn token_matrices(&self) -> Vec<usize> {
        if self.head == self.embed { vec![self.embed] } else { vec![self.embed, self.head] }
    }
}

fn dense(value: &Weight) -> Cow<'_, Tensor> {
    match value.dense() {
        Some(dense) => Cow::Borrowed(dense),
        None => Cow::Owned(value.to_tensor()),
    }
}
