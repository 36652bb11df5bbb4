//! Added tokens: rows of the embedding and of the head that did not come with the model, and how an adapter trains them.
//!
//! A new row begins at the mean of the rows that were there (Hewitt, "Initializing New Word Embeddings for Pretrained Language
//! Models", 2021). A tied head is the embedding: one tensor, one row. While an adapter trains, the rows are parameters of their
//! own and are copied into the frozen matrix after each update, as PEFT's `trainable_token_indices` does it.

use crate::llama::{Llama, Parameter};
use crate::{Config, Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use tunesmith_tensor::ops::rows;
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
    /// Index of the parameter [n, d] with the rows.
    pub(crate) rows: usize,
    /// Index of the matrix.
    pub(crate) matrix: usize,
    /// The rows [n, d] of the base model.
    base: Tensor,
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
                self.make_dense(matrix);
                self.parameters[matrix].value.tensor_mut().row_mut(*id as usize).copy_from_slice(&mean);
            }
        }
        Ok(())
    }

    /// Adds the rows of `ids` to the attached adapter, which trains them from the mean of all rows on; the rest of the matrices
    /// stays frozen.
    ///
    /// # Errors
    /// When no adapter is attached, or as [`Llama::grow_vocabulary`].
    pub fn train_tokens(&mut self, ids: &[u32]) -> Result<()> {
        let indices = token_indices(&self.config, ids);
        let size = vocabulary_for(&indices, self.config.vocab_size);
        let mut means = BTreeMap::new();
        for module in indices.keys() {
            let matrix = &self.parameters[self.token_matrix(module)].value;
            means.insert(module.clone(), mean_row(&dense(matrix)));
        }
        self.grow_vocabulary(size)?;
        let Some(adapter) = &mut self.adapter else {
            return Err(Error::Failure("rows of tokens train with an adapter, and there is none".into()));
        };
        adapter.trainable_token_indices.clone_from(&indices);
        for (module, ids) in indices {
            let mean = &means[&module];
            let mut rows = Tensor::zeros(&[ids.len(), mean.len()]);
            for row in 0..ids.len() {
                rows.row_mut(row).copy_from_slice(mean);
            }
            self.push_rows(module, ids, rows, true);
        }
        Ok(())
    }

    /// Attaches rows that were read from an adapter. Their shapes have been checked.
    pub(crate) fn attach_token_rows(
        &mut self,
        rows: BTreeMap<String, Tensor>,
        indices: &TokenIndices,
        trained: bool,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        self.grow_vocabulary(vocabulary_for(indices, self.config.vocab_size))?;
        for (module, rows) in rows {
            let ids = indices.get(&module).cloned().unwrap_or_default();
            self.push_rows(module, ids, rows, trained);
        }
        Ok(())
    }

    fn push_rows(&mut self, module: String, ids: Vec<u32>, rows: Tensor, trained: bool) {
        let matrix = self.token_matrix(&module);
        self.make_dense(matrix);
        let mut base = Tensor::zeros(rows.shape());
        for (row, id) in ids.iter().enumerate() {
            base.row_mut(row).copy_from_slice(self.parameters[matrix].value.tensor().row(*id as usize));
        }
        let index = self.parameters.len();
        let name = token_rows_name(&module);
        self.parameters.push(Parameter { name, value: rows.into(), trained, low: None });
        self.token_rows.push(TokenRows { module, ids, rows: index, matrix, base });
        self.place_token_rows(true);
    }

    /// Copies the adapter's rows of tokens (or, without it, those of the base model) to where they are read. To be called when the
    /// rows have changed.
    pub fn place_token_rows(&mut self, adapted: bool) {
        for at in 0..self.token_rows.len() {
            let TokenRows { ids, rows, matrix, base, .. } = &self.token_rows[at];
            // An adapter's parameters stand behind those of the base model.
            let (matrices, others) = self.parameters.split_at_mut(*rows);
            let (own, matrix) = (&others[0], matrices[*matrix].value.tensor_mut());
            let device = matrix.device();
            let from = match adapted {
                // In bf16 the upper halves, to which the whole values are rounded.
                true if own.value.device() == device => Cow::Borrowed(own.value.tensor()),
                true => own.host(),
                false => Cow::Borrowed(base),
            };
            let from = match from.device() == device {
                true => from,
                false => Cow::Owned(from.to_device(&device, matrix.dtype())),
            };
            rows::scatter(&from, ids, matrix);
        }
    }

    /// The rows of tokens that the attached adapter has: module and rows [n, d], on the processor.
    pub fn adapter_token_rows(&self) -> impl Iterator<Item = (&str, Cow<'_, Tensor>)> {
        self.token_rows.iter().map(|rows| (rows.module.as_str(), self.parameters[rows.rows].host()))
    }

    fn token_matrix(&self, module: &str) -> usize {
        if module == "lm_head" { self.head } else { self.embed }
    }

    /// The embedding, and the head where it is another matrix.
    fn token_matrices(&self) -> Vec<usize> {
        if self.head == self.embed { vec![self.embed] } else { vec![self.embed, self.head] }
    }

    fn make_dense(&mut self, matrix: usize) {
        let value = &mut self.parameters[matrix].value;
        if value.dense().is_none() {
            *value = value.to_tensor().into();
        }
    }
}

fn dense(value: &Weight) -> Cow<'_, Tensor> {
    match value.dense() {
        Some(dense) => Cow::Borrowed(dense),
        None => Cow::Owned(value.to_tensor()),
    }
}
