//! The transformer block, described once: its linear layers and norms with the names that Hugging Face and GGUF give them,
//! their shapes and biases, and what the families of models call themselves. Import, export, adapters, planner and errors
//! read this table; forward and backward are explicit code.

use crate::Config;

/// A family of models: their blocks differ by fields of [`Config`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// LLaMA 2 and 3, and what was built like them.
    Llama,
    /// Qwen 2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen 3: norms on the heads of q and k.
    Qwen3,
}

impl Family {
    /// Every family that the engine computes.
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// `model_type` of a `config.json`, and `general.architecture` of a GGUF file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The class in `architectures` of a `config.json`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// Whether q, k and v have a bias, and whether o has one, in a model whose files say `asked`.
    pub(crate) fn attention_biases(self, asked: bool) -> (bool, bool) {
        if self == Self::Qwen2 { (true, false) } else { (asked, asked) }
    }

    /// Whether the heads of q and k are normalised.
    pub(crate) fn has_qk_norm(self) -> bool {
        self == Self::Qwen3
    }

    /// The family called `name`, or what messages say of a name that is none.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|family| family.name() == name);
        found.ok_or_else(|| format!("{name:?}, a family that this engine does not compute; {}", Self::supported()))
    }

    /// The names of all families, for messages.
    pub(crate) fn supported() -> String {
        let names = Self::ALL.map(|family| format!("{:?} ({})", family.name(), family.architecture()));
        format!("supported are {}", names.join(", "))
    }
}

/// One linear layer of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// Hugging Face's path below `model.layers.N`.
    pub path: &'static str,
    /// GGUF's name below `blk.N`.
    pub gguf: &'static str,
    /// Extents of the weight, [out, in].
    pub shape: [usize; 2],
    /// Whether it adds a bias [out].
    pub bias: bool,
    /// Heads of q and k where GGUF has their rows in the order of interleaved rotation: row `2 j + side` of a head is
    /// Hugging Face's row `side * head_dim / 2 + j`.
    pub interleaved_heads: Option<usize>,
}

/// One norm of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSpec {
    /// Hugging Face's path below `model.layers.N`.
    pub path: &'static str,
    /// GGUF's name below `blk.N`.
    pub gguf: &'static str,
    /// Elements that are normalised together.
    pub len: usize,
}

/// A block of a model; all its blocks are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// q, k, v, o, gate, up, down, as in [`LINEAR_NAMES`].
    pub linears: [LinearSpec; 7],
    /// Before attention, before the MLP, and with `use_qk_norm` those of q and of k, each over a head before its rotation.
    pub norms: Vec<NormSpec>,
}

/// Last parts of the paths of a block's linear layers, in the order of [`Block::linears`].
pub const LINEAR_NAMES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Names of tensors with their shapes.
pub(crate) type NamedShapes = Vec<(String, Vec<usize>)>;

/// One tensor of a model as files have it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorSpec {
    /// Hugging Face's name.
    pub name: String,
    /// GGUF's name.
    pub gguf: String,
    /// Outermost extent first; a linear weight is [out, in].
    pub shape: Vec<usize>,
    /// As in [`LinearSpec`]; of a bias too.
    pub interleaved_heads: Option<usize>,
}

impl Config {
    /// The table of this model's blocks.
    pub fn block(&self) -> Block {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let (h, k) = (heads * self.head_dim, kv_heads * self.head_dim);
        let (qkv, o, mlp) = (self.attention_bias, self.attention_out_bias, self.mlp_bias);
        // The converter of GGUF files reorders rows for this architecture and leaves them alone for the others.
        let interleaved = |heads: usize| (self.model_type == Family::Llama).then_some(heads);
        let linear =
            |path, gguf, shape, bias, interleaved_heads| LinearSpec { path, gguf, shape, bias, interleaved_heads };
        let norm = |path, gguf, len| NormSpec { path, gguf, len };
        let mut norms = vec![norm("input_layernorm", "attn_norm", d), norm("post_attention_layernorm", "ffn_norm", d)];
        if self.use_qk_norm {
            norms.push(norm("self_attn.q_norm", "attn_q_norm", self.head_dim));
            norms.push(norm("self_attn.k_norm", "attn_k_norm", self.head_dim));
        }
        Block {
            linears: [
                linear("self_attn.q_proj", "attn_q", [h, d], qkv, interleaved(heads)),
                linear("self_attn.k_proj", "attn_k", [k, d], qkv, interleaved(kv_heads)),
                linear("self_attn.v_proj", "attn_v", [k, d], qkv, None),
                linear("self_attn.o_proj", "attn_output", [d, h], o, None),
                linear("mlp.gate_proj", "ffn_gate", [f, d], mlp, None),
                linear("mlp.up_proj", "ffn_up", [f, d], mlp, None),
                linear("mlp.down_proj", "ffn_down", [d, f], mlp, None),
            ],
            norms,
        }
    }

    /// The linear layers of all blocks as (number of the block, module as PEFT names it, extents [out, in]).
    pub fn linear_modules(&self) -> Vec<(usize, String, [usize; 2])> {
        let block = self.block();
        let of_block = |layer: usize| {
            let module =
                move |linear: &LinearSpec| (layer, format!("model.layers.{layer}.{}", linear.path), linear.shape);
            block.linears.iter().map(module)
        };
        (0..self.num_hidden_layers).flat_map(of_block).collect()
    }

    /// All tensors in the order of the model: embedding, layers, norm, head. A tied head is not listed.
    pub(crate) fn tensors(&self) -> Vec<TensorSpec> {
        let (v, d, block) = (self.vocab_size, self.hidden_size, self.block());
        let tensor = |name: &str, gguf: &str, part: &str, shape: &[usize], interleaved_heads| TensorSpec {
            name: format!("{name}.{part}"),
            gguf: format!("{gguf}.{part}"),
            shape: shape.to_vec(),
            interleaved_heads,
        };
        let mut tensors = vec![tensor("model.embed_tokens", "token_embd", "weight", &[v, d], None)];
        for layer in 0..self.num_hidden_layers {
            let names =
                |path: &str, gguf: &str| (format!("model.layers.{layer}.{path}"), format!("blk.{layer}.{gguf}"));
            for LinearSpec { path, gguf, shape, bias, interleaved_heads } in &block.linears {
                let (name, gguf) = names(path, gguf);
                tensors.push(tensor(&name, &gguf, "weight", shape, *interleaved_heads));
                if *bias {
                    tensors.push(tensor(&name, &gguf, "bias", &shape[..1], *interleaved_heads));
                }
            }
            for NormSpec { path, gguf, len } in &block.norms {
                let (name, gguf) = names(path, gguf);
                tensors.push(tensor(&name, &gguf, "weight", &[*len], None));
            }
        }
        tensors.push(tensor("model.norm", "output_norm", "weight", &[d], None));
        if !self.tie_word_embeddings {
            tensors.push(tensor("lm_head", "output", "weight", &[v, d], None));
        }
        tensors
    }

    /// Names and shapes of all weights, in the order of the model: embedding, layers, norm, head. Linear weights are
    /// [out, in]. A tied head is not listed.
    pub fn expected_tensors(&self) -> NamedShapes {
        self.tensors().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect()
    }

    /// Number of weights, a tied head counted once.
    pub fn num_params(&self) -> usize {
        self.tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::from_json(text, "config.json").unwrap()
    }

    #[test]
    fn tensors_are_listed_in_order_with_biases_norms_and_head() {
        let mut config = config(include_str!("../tests/fixtures/tiny-llama3/config.json"));
        let tensors = config.expected_tensors();
        assert_eq!(tensors.len(), 3 + 9 * 3);
        assert_eq!(tensors[0], ("model.embed_tokens.weight".into(), vec![512, 64]));
        assert_eq!(tensors[2], ("model.layers.0.self_attn.k_proj.weight".into(), vec![32, 64]));
        assert_eq!(tensors[29], ("lm_head.weight".into(), vec![512, 64]));
        (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) = (true, true, true);
        (config.attention_out_bias, config.use_qk_norm) = (true, true);
        let tensors = config.expected_tensors();
        assert_eq!(tensors.len(), 2 + 18 * 3);
        assert_eq!(tensors[4], ("model.layers.0.self_attn.k_proj.bias".into(), vec![32]));
        assert_eq!(tensors[17], ("model.layers.0.self_attn.q_norm.weight".into(), vec![16]));
        assert_eq!(tensors.last().unwrap().0, "model.norm.weight");
    }

    #[test]
    fn families_have_their_tensors_and_names_in_gguf_files() {
        let qwen2 = config(include_str!("../tests/fixtures/tiny-qwen2/config.json"));
        let qwen3 = config(include_str!("../tests/fixtures/tiny-qwen3/config.json"));
        assert_eq!((qwen2.num_params(), qwen3.num_params()), (68_520, 79_848));
        let names = |config: &Config| config.tensors().into_iter().map(|t| t.gguf).collect::<Vec<_>>();
        assert!(names(&qwen2).contains(&"blk.3.attn_v.bias".to_owned()));
        assert!(!names(&qwen2).iter().any(|name| name.contains("attn_output.bias") || name.contains("_norm_")));
        assert!(names(&qwen3).contains(&"blk.0.attn_k_norm.weight".to_owned()));
        assert!(!names(&qwen3).iter().any(|name| name.ends_with("bias")));
        assert!(qwen2.tensors().iter().chain(&qwen3.tensors()).all(|tensor| tensor.interleaved_heads.is_none()));
        for (linear, name) in qwen3.block().linears.iter().zip(LINEAR_NAMES) {
            assert!(linear.path.ends_with(&format!(".{name}")));
        }
    }
}
