//! Attaching, initialising and merging LoRA adapters (Hu et al. 2021; rsLoRA: Kalajdzievski 2023).

use crate::llama::{Llama, Lora, Parameter};
use crate::{AdapterConfig, AdapterFile, Error, Result};
use std::borrow::Cow;
use tunesmith_tensor::{Tensor, Weight, ops::linear, rng::Rng};

impl Llama {
    /// Attaches a new adapter that trains: A Kaiming-uniform with a = √5, that is uniform in ±1/√in, B zero, so that the
    /// model computes what it did before. Everything else is frozen.
    ///
    /// # Errors
    /// When the configuration matches no linear layer, or an adapter is attached already.
    pub fn add_adapter(&mut self, config: &AdapterConfig, seed: u64) -> Result<()> {
        let mut stream = 0;
        self.attach(config, true, |rank, num_in, num_out| {
            stream += 1;
            let mut rng = Rng::new(seed, stream);
            let bound = 1.0 / (num_in as f32).sqrt();
            let mut a = Tensor::zeros(&[rank, num_in]);
            a.data_mut().iter_mut().for_each(|x| *x = (2.0 * rng.uniform() - 1.0) * bound);
            Ok((a, Tensor::zeros(&[num_out, rank])))
        })
    }

    /// Attaches an adapter that was read from a PEFT folder; `trained` says whether training goes on with it.
    ///
    /// # Errors
    /// When its tensors do not fit this model.
    pub fn attach_adapter(&mut self, mut file: AdapterFile, trained: bool) -> Result<()> {
        file.check_against(&self.config)?;
        if let Some(extra) = file.tensors.keys().find(|m| !self.linears().any(|l| &l.module == *m)) {
            return Err(Error::Input(format!("the adapter has tensors for {extra}, which this model does not have")));
        }
        // What the file has decides, not its target_modules: an adapter may have been trained on a subset.
        let config = file.config.clone();
        let modules: Vec<String> = self.linears().map(|l| l.module.clone()).collect();
        self.begin_adapter()?;
        for (i, module) in modules.iter().enumerate() {
            if let Some((a, b)) = file.tensors.remove(module) {
                self.push_pair(i, module, a, b, &config, trained);
            }
        }
        self.attach_token_rows(file.token_rows, &config.trainable_token_indices, trained)?;
        self.adapter = Some(config);
        Ok(())
    }

    fn attach(
        &mut self,
        config: &AdapterConfig,
        trained: bool,
        mut make: impl FnMut(usize, usize, usize) -> Result<(Tensor, Tensor)>,
    ) -> Result<()> {
        let targets: Vec<(usize, String, usize)> = self
            .linears()
            .enumerate()
            .filter(|(_, l)| config.matches(&l.module))
            .map(|(i, l)| (i, l.module.clone(), l.weight))
            .collect();
        if targets.is_empty() {
            let known = crate::llama::LINEAR_NAMES.join(", ");
            return Err(Error::Input(format!(
                "target_modules = {:?} matches no linear layer of this model; it has {known}, or all-linear",
                config.target_modules
            )));
        }
        self.begin_adapter()?;
        for (i, module, weight) in targets {
            let (num_out, num_in) = (self.parameters[weight].value.rows(), self.parameters[weight].value.cols());
            let (a, b) = make(config.rank_for(&module), num_in, num_out)?;
            self.push_pair(i, &module, a, b, config, trained);
        }
        self.adapter = Some(config.clone());
        Ok(())
    }

    fn begin_adapter(&mut self) -> Result<()> {
        if self.adapter.is_some() {
            return Err(Error::Input("an adapter is attached already; merge it before attaching another".into()));
        }
        self.parameters.iter_mut().for_each(|p| p.trained = false);
        Ok(())
    }

    fn push_pair(&mut self, i: usize, module: &str, a: Tensor, b: Tensor, config: &AdapterConfig, trained: bool) {
        let next = self.parameters.len();
        for (letter, value) in [("A", a), ("B", b)] {
            let name = format!("base_model.model.{module}.lora_{letter}.weight");
            self.parameters.push(Parameter { name, value: value.into(), trained, low: None });
        }
        let (scale, dropout) = (config.scaling_for(module), config.lora_dropout as f32);
        self.layers[i / 7].linears[i % 7].lora = Some(Lora { a: next, b: next + 1, scale, dropout });
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = &crate::llama::Linear> {
        self.layers.iter().flat_map(|l| &l.linears)
    }

    /// The adapter's tensors as (module path, A [r, in], B [out, r]), in the order of the model.
    pub fn adapter_tensors(&self) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
        self.linears().filter_map(|l| {
            let lora = l.lora.as_ref()?;
            Some((l.module.as_str(), self.parameters[lora.a].value.tensor(), self.parameters[lora.b].value.tensor()))
        })
    }

    /// As [`Llama::adapter_tensors`], on the processor in f32 wherever the model is.
    pub fn host_adapter_tensors(&self) -> impl Iterator<Item = (&str, Cow<'_, Tensor>, Cow<'_, Tensor>)> {
        self.linears().filter_map(|l| {
            let lora = l.lora.as_ref()?;
            Some((l.module.as_str(), self.parameters[lora.a].host(), self.parameters[lora.b].host()))
        })
    }

    /// The f32 values of the tensor `name` (a Hugging Face name) of the base model, on the processor wherever the model is.
    ///
    /// # Errors
    /// As [`Llama::base_tensor`].
    pub fn host_tensor(&self, name: &str) -> Result<Cow<'_, Tensor>> {
        self.base_tensor(name)?;
        let found = self.parameters.iter().find(|p| p.name == name).map(Parameter::host);
        found.ok_or_else(|| Error::Failure(format!("the model has no tensor {name}")))
    }

    /// The tensor `name` (a Hugging Face name) of the base model.
    ///
    /// # Errors
    /// When the model has none of that name, or only one rounded to 8 bits.
    pub fn base_tensor(&self, name: &str) -> Result<&Weight> {
        let found = self.parameters.iter().find(|p| p.name == name).map(|p| &p.value);
        if let Some(Weight::Int8(_)) = found {
            return Err(crate::int8::values_are_gone(name));
        }
        found.ok_or_else(|| Error::Failure(format!("the model has no tensor {name}")))
    }

    /// Adds s · B A to each adapted weight and detaches the adapter: the model computes the same without it. Packed weights that
    /// are adapted become dense.
    ///
    /// # Errors
    /// When no adapter is attached, or the weights are rounded to 8 bits.
    pub fn merge_adapter(&mut self) -> Result<()> {
        if self.computes_int8() {
            return Err(crate::int8::values_are_gone("the base model"));
        }
        self.enable_adapter(true);
        if self.adapter.take().is_none() {
            return Err(Error::Input("there is no adapter to merge".into()));
        }
        for l in 0..self.layers.len() {
            for i in 0..7 {
                let layer = &mut self.layers[l].linears[i];
                let Some(lora) = layer.lora.take() else { continue };
                let weight = layer.weight;
                let mut merged = match std::mem::replace(&mut self.parameters[weight].value, Tensor::default().into()) {
                    Weight::Dense(dense) => dense,
                    packed => packed.to_tensor(),
                };
                let (a, b) = (self.parameters[lora.a].value.tensor(), self.parameters[lora.b].value.tensor());
                // B [out, r] · A [r, in] has the form of an input gradient: rows of the first times the second.
                linear::matmul_input_gradient(b, a, lora.scale, &mut merged, linear::Store::Accumulate);
                self.parameters[weight].value = merged.into();
            }
        }
        // Rows of tokens are in their matrices already.
        self.token_rows.clear();
        self.parameters.retain(|p| !p.name.starts_with("base_model."));
        Ok(())
    }
}
