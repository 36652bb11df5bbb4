//! LoRA adapters (Hu et al. 2021; rsLoRA: Kalajdzievski 2023): values beside a model that does not know of them.
//!
//! The adapted layer computes `y = W x + s B A x` with A \[r, in\] and B \[out, r\], and s = alpha / r, or alpha / sqrt(r)
//! for rank-stabilised LoRA. An adapter may also have rows of added tokens, which stand in for those of the embedding and the head,
//! and a classification head. A pass takes `Option<&Adapter>`: without one it is the base model, to the bit.

mod config;
mod folder;

pub use config::{AdapterConfig, Modules};
pub use folder::{AdapterFile, save_adapter};

use crate::config::default_labels;
use crate::llama::{LINEAR_NAMES, Llama};
use crate::token_rows::{TokenIndices, TokenRows, mean_row, token_indices, token_rows_name, vocabulary_for};
use crate::{Error, Parameter, Result};
use folder::PREFIX;
use std::collections::BTreeMap;
use std::path::Path;
use tunesmith_tensor::ops::{linear, rows};
use tunesmith_tensor::{Device, Dtype, Tensor, Weight, rng::Rng};

/// The classification head, as PEFT's `modules_to_save` and transformers name it.
pub(crate) const SCORE: &str = "score";

/// An adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    /// What it adapts, and how.
    pub config: AdapterConfig,
    /// Its tensors, under PEFT's names.
    pub parameters: Vec<Parameter>,
    /// The pairs of each block, in the order of its linear layers.
    pairs: Vec<[Option<Pair>; LINEAR_NAMES.len()]>,
    token_rows: Vec<TokenRows>,
    /// Index of the classification head [classes, d].
    score: Option<usize>,
}

/// The adapter of one linear layer.
#[derive(Debug)]
struct Pair {
    /// Path of the layer without `.weight`, as PEFT names modules.
    module: String,
    /// Index of A [r, in]; B [out, r] comes next.
    a: usize,
    scale: f32,
    dropout: f32,
}

/// A borrowed pair of one linear layer.
#[derive(Clone, Copy)]
pub(crate) struct Lora<'a> {
    /// A [r, in].
    pub(crate) a: &'a Weight,
    /// B [out, r].
    pub(crate) b: &'a Weight,
    /// Index of A among the adapter's parameters; B comes next.
    pub(crate) index: usize,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
}

impl Adapter {
    /// A new adapter of `model` that trains: A Kaiming-uniform with a = √5, that is uniform in ±1/√in, B zero, so that the model
    /// computes what it did before.
    ///
    /// # Errors
    /// When the configuration matches no linear layer.
    pub fn new(model: &Llama, config: &AdapterConfig, seed: u64) -> Result<Self> {
        let mut adapter = Self::empty(model, config.clone());
        let mut stream = 0;
        for (l, layer) in model.layers.iter().enumerate() {
            for (i, linear) in layer.linears.iter().enumerate().filter(|(_, linear)| config.matches(&linear.module)) {
                stream += 1;
                let weight = &model.parameters[linear.weight].value;
                let (num_out, num_in, rank) = (weight.rows(), weight.cols(), config.rank_for(&linear.module));
                let mut rng = Rng::new(seed, stream);
                let bound = 1.0 / (num_in as f32).sqrt();
                let mut a = Tensor::zeros(&[rank, num_in]);
                a.data_mut().iter_mut().for_each(|x| *x = (2.0 * rng.uniform() - 1.0) * bound);
                adapter.push_pair((l, i), &linear.module, [a, Tensor::zeros(&[num_out, rank])], true);
            }
        }
        if adapter.parameters.is_empty() {
            return Err(Error::Input(format!(
                "target_modules = {:?} matches no linear layer of this model; it has {}, or all-linear",
                config.target_modules,
                LINEAR_NAMES.join(", ")
            )));
        }
        Ok(adapter)
    }

    /// The adapter of a PEFT folder for `model`, whose vocabulary grows where the adapter has rows beyond it; `trained` says whether
    /// training goes on with it.
    ///
    /// # Errors
    /// When its tensors do not fit this model.
    pub fn open(model: &mut Llama, mut file: AdapterFile, trained: bool) -> Result<Self> {
        file.check_against(&model.config)?;
        let known = |module: &String| model.linears().any(|l| &l.module == module);
        if let Some(extra) = file.tensors.keys().find(|module| !known(module)) {
            return Err(Error::Input(format!("the adapter has tensors for {extra}, which this model does not have")));
        }
        // What the file has decides, not its target_modules: an adapter may have been trained on a subset.
        let mut adapter = Self::empty(model, file.config);
        for (l, layer) in model.layers.iter().enumerate() {
            for (i, linear) in layer.linears.iter().enumerate() {
                if let Some((a, b)) = file.tensors.remove(&linear.module) {
                    adapter.push_pair((l, i), &linear.module, [a, b], trained);
                }
            }
        }
        if !file.token_rows.is_empty() {
            let indices = adapter.config.trainable_token_indices.clone();
            model.grow_vocabulary(vocabulary_for(&indices, model.config.vocab_size))?;
            for (module, rows) in file.token_rows {
                let ids = indices.get(&module).cloned().unwrap_or_default();
                adapter.push_rows(module, ids, rows, trained);
            }
        }
        if let Some(score) = file.score {
            adapter.push_score(score, trained);
        }
        Ok(adapter)
    }

    fn empty(model: &Llama, config: AdapterConfig) -> Self {
        let pairs = model.layers.iter().map(|_| Default::default()).collect();
        Self { config, parameters: Vec::new(), pairs, token_rows: Vec::new(), score: None }
    }

    fn push(&mut self, name: String, value: Tensor, trained: bool) -> usize {
        self.parameters.push(Parameter::new(name, value, trained));
        self.parameters.len() - 1
    }

    fn push_pair(&mut self, (l, i): (usize, usize), module: &str, pair: [Tensor; 2], trained: bool) {
        let a = self.parameters.len();
        for (letter, value) in ["A", "B"].into_iter().zip(pair) {
            self.push(format!("{PREFIX}{module}.lora_{letter}.weight"), value, trained);
        }
        let (scale, dropout) = (self.config.scaling_for(module), self.config.lora_dropout as f32);
        self.pairs[l][i] = Some(Pair { module: module.to_owned(), a, scale, dropout });
    }

    fn push_rows(&mut self, module: String, ids: Vec<u32>, rows: Tensor, trained: bool) {
        let rows = self.push(token_rows_name(&module), rows, trained);
        self.token_rows.push(TokenRows { module, ids, rows });
    }

    fn push_score(&mut self, score: Tensor, trained: bool) {
        self.score = Some(self.push(format!("{PREFIX}{SCORE}.weight"), score, trained));
    }

    /// Adds rows for the tokens `ids`, which train from the mean of all rows of `model` on; the matrices stay frozen, and grow where
    /// they have no such rows.
    ///
    /// # Errors
    /// As [`Llama::grow_vocabulary`].
    pub fn train_tokens(&mut self, model: &mut Llama, ids: &[u32]) -> Result<()> {
        let indices: TokenIndices = token_indices(&model.config, ids);
        let mut rows = BTreeMap::new();
        for (module, ids) in &indices {
            let mean = mean_row(&model.token_matrix(module));
            let mut own = Tensor::zeros(&[ids.len(), mean.len()]);
            (0..ids.len()).for_each(|row| own.row_mut(row).copy_from_slice(&mean));
            rows.insert(module.clone(), own);
        }
        model.grow_vocabulary(vocabulary_for(&indices, model.config.vocab_size))?;
        self.config.trainable_token_indices.clone_from(&indices);
        for ((module, ids), (_, rows)) in indices.into_iter().zip(rows) {
            self.push_rows(module, ids, rows, true);
        }
        Ok(())
    }

    /// Adds a classification head for `num_classes` classes that trains, initialised as a weight of `model`; PEFT saves it as a whole
    /// (`modules_to_save`).
    pub fn train_score(&mut self, model: &Llama, num_classes: usize, seed: u64) {
        self.push_score(model.initial_score(num_classes, seed), true);
        self.config.task_type = Some("SEQ_CLS".into());
        self.config.modules_to_save = vec![SCORE.into()];
    }

    /// The pair of linear layer `i` of block `l`.
    pub(crate) fn pair(&self, l: usize, i: usize) -> Option<Lora<'_>> {
        let Pair { a, scale, dropout, .. } = self.pairs[l][i].as_ref()?;
        let (a, b, index) = (&self.parameters[*a].value, &self.parameters[a + 1].value, *a);
        Some(Lora { a, b, index, scale: *scale, dropout: *dropout })
    }

    /// The rows of added tokens in `module` (`embed_tokens`, `lm_head`): ids, which ascend, and index of the parameter [n, d].
    pub(crate) fn rows_of(&self, module: &str) -> Option<(&[u32], usize)> {
        self.token_rows.iter().find(|rows| rows.module == module).map(|rows| (&rows.ids[..], rows.rows))
    }

    /// Index of the classification head.
    pub(crate) fn score(&self) -> Option<usize> {
        self.score
    }

    /// Number of classes of its classification head.
    pub fn num_classes(&self) -> Option<usize> {
        self.score.map(|score| self.parameters[score].value.rows())
    }

    /// Whether the model that it belongs to may be rounded to 8 bits ([`Llama::compute_int8`]).
    ///
    /// # Errors
    /// When it has rows of added tokens.
    pub fn check_int8(&self) -> Result<()> {
        if self.token_rows.is_empty() {
            return Ok(());
        }
        Err(Error::Input(
            "the adapter has rows of added tokens, which are not rounded to 8 bits; compute in f32, or merge the adapter first"
                .into(),
        ))
    }

    /// Whether something of block `l` trains.
    pub(crate) fn trains_in(&self, l: usize) -> bool {
        self.pairs[l].iter().flatten().any(|pair| self.parameters[pair.a..pair.a + 2].iter().any(|p| p.trained))
    }

    /// Moves it from the CPU to `device`, as [`Llama::move_to`] does with a model.
    pub fn move_to(&mut self, device: &Device, dtype: Dtype) {
        self.parameters.iter_mut().for_each(|parameter| parameter.move_to(device, dtype));
    }

    /// The pairs as (module path, A [r, in], B [out, r]), in the order of the model.
    ///
    /// # Panics
    /// When the adapter is on a GPU.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
        let tensor = |i: usize| self.parameters[i].value.tensor();
        self.pairs.iter().flatten().flatten().map(move |p| (p.module.as_str(), tensor(p.a), tensor(p.a + 1)))
    }

    /// The rows of tokens by module.
    ///
    /// # Panics
    /// When the adapter is on a GPU.
    pub fn token_rows(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.token_rows.iter().map(|rows| (rows.module.as_str(), self.parameters[rows.rows].value.tensor()))
    }

    /// Writes it into the folder `dir` as PEFT does, in f32 wherever it is.
    ///
    /// # Errors
    /// As [`save_adapter`].
    pub fn save(&self, dir: &Path) -> Result<()> {
        let tensors: Vec<_> = self.parameters.iter().map(|p| (p.name.clone(), p.host())).collect();
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), &**tensor));
        folder::write(dir, &self.config, &tensors.collect())
    }

    /// Adds s · B A to each adapted weight of `model`, writes rows of tokens into its matrices and gives it the classification head:
    /// the model computes the same without the adapter. Packed weights that change become dense.
    ///
    /// # Errors
    /// When the model's weights are rounded to 8 bits.
    pub fn merge_into(mut self, model: &mut Llama) -> Result<()> {
        if model.computes_int8() {
            return Err(crate::int8::values_are_gone("the base model"));
        }
        for l in 0..self.pairs.len() {
            for i in 0..self.pairs[l].len() {
                let Some(Lora { a, b, scale, .. }) = self.pair(l, i) else { continue };
                let merged = model.parameters[model.layers[l].linears[i].weight].make_dense();
                // B [out, r] · A [r, in] has the form of an input gradient: rows of the first times the second.
                linear::matmul_input_gradient(b.tensor(), a.tensor(), scale, merged, linear::Into::Accumulate);
            }
        }
        for TokenRows { module, ids, rows } in &self.token_rows {
            let matrix = model.token_matrix_index(module);
            let matrix = model.parameters[matrix].make_dense();
            rows::scatter(self.parameters[*rows].value.tensor(), ids, matrix);
        }
        if let Some(score) = self.score {
            let score = self.parameters.swap_remove(score).value;
            let labels = default_labels(score.rows());
            model.set_score(score, labels);
        }
        Ok(())
    }
}
