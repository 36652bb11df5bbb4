//! Compiles every kernel for every GPU that is supported, without a GPU, and looks at what the compiler made: registers,
//! spills, matrix instructions. The compiler and its tools come from NVIDIA's packages on PyPI.

use crate::{Result, size::target_directory};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use tunesmith_tensor::cuda::Search;
use tunesmith_tensor::cuda::archive::{ARCHITECTURES, Archive};
use tunesmith_tensor::cuda::compiler::Compiler;
use tunesmith_tensor::cuda::kernels::Module;

/// One release for all, so that tables of different days can be compared.
const PACKAGES: [&str; 3] =
    ["nvidia-cuda-nvrtc==13.5.37", "nvidia-cuda-cuobjdump==13.5.37", "nvidia-cuda-nvdisasm==13.5.37"];
/// Kernels that may use the stack: sines reduce large angles in an array, and only the models of tests have heads of 16.
const MAY_USE_STACK: [(&str, &str); 3] =
    [("rope-f32", "rope_angles"), ("rope-bf16", "rope_angles"), ("attention-bf16-16", "attention_backward_queries")];

/// What the compiler says of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    registers: u32,
    stack: u32,
}

/// Prints the table; fails when a kernel does not compile, spills, or lacks its matrix instructions. Writes what was compiled to
/// `archive`.
pub(crate) fn check(root: &Path, archive: Option<&Path>) -> Result<()> {
    let environment = install(&target_directory(root)?)?;
    let search = Search { python: vec![environment.clone()], ..Search::default() };
    let compiler = Compiler::open(&search, u32::MAX).map_err(|e| e.to_string())?;
    let tools = tools(&environment)?;
    let scratch = environment.join("cubins");
    std::fs::create_dir_all(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
    let jobs: Vec<(Module, &str)> =
        Module::all().into_iter().flat_map(|m| ARCHITECTURES.into_iter().map(move |a| (m, a))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((module, architecture)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((module.name(), *architecture, build(&compiler, &tools, &scratch, module, architecture)?));
        }
        Ok::<_, String>(done)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let join = |h: std::thread::ScopedJoinHandle<'_, _>| h.join().unwrap_or(Err("a thread panicked".into()));
        handles.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    report(parts.into_iter().flatten())?;
    let Some(file) = archive else { return Ok(()) };
    let mut archive = Archive::default();
    for (module, architecture) in jobs {
        let path = scratch.join(format!("{}-{architecture}.cubin", module.name()));
        let code = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        archive.insert(&module, architecture, code);
    }
    let bytes = archive.to_bytes();
    println!("{}: {:.1} MB", file.display(), bytes.len() as f64 / 1e6);
    crate::write(file, bytes)
}

type Built = BTreeMap<String, Usage>;

fn report(built: impl Iterator<Item = (String, &'static str, Built)>) -> Result<()> {
    let mut table: BTreeMap<(String, String), BTreeMap<&str, Usage>> = BTreeMap::new();
    for (module, architecture, kernels) in built {
        for (kernel, usage) in kernels {
            table.entry((module.clone(), kernel)).or_default().insert(architecture, usage);
        }
    }
    println!("registers a thread (+ bytes of stack)");
    println!("{:<24} {:<28} {}", "module", "kernel", ARCHITECTURES.map(|a| format!("{a:>8}")).concat());
    let mut spilled = Vec::new();
    for ((module, kernel), usages) in &table {
        let cell = |a: &str| match usages.get(a) {
            Some(Usage { registers, stack: 0 }) => format!("{registers:>8}"),
            Some(Usage { registers, stack }) => format!("{:>8}", format!("{registers}+{stack}")),
            None => format!("{:>8}", "-"),
        };
        println!("{module:<24} {kernel:<28} {}", ARCHITECTURES.map(cell).concat());
        if usages.len() != ARCHITECTURES.len() {
            return Err(format!("{module}: {kernel} is missing for some architectures"));
        }
        if usages.values().any(|u| u.stack > 0) && !MAY_USE_STACK.contains(&(module.as_str(), kernel.as_str())) {
            spilled.push(format!("{module} {kernel}"));
        }
    }
    println!("{} kernels for {} architectures", table.len(), ARCHITECTURES.len());
    if spilled.is_empty() { Ok(()) } else { Err(format!("registers are spilled in {}", spilled.join(", "))) }
}

/// Installs the packages into an environment of their own, once.
fn install(target: &Path) -> Result<PathBuf> {
    let environment = target.join("kernels-python");
    let marker = environment.join("installed.txt");
    let wanted = PACKAGES.join("\n");
    if std::fs::read_to_string(&marker).is_ok_and(|found| found == wanted) {
        return Ok(environment);
    }
    let run = |program: &Path, args: &[&str]| {
        let output = Command::new(program).args(args).output().map_err(|e| format!("{}: {e}", program.display()))?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(format!("{} {}: {error}", program.display(), args.join(" "))) }
    };
    // A folder, not an environment: it needs no ensurepip, and nothing in it is imported.
    let site = environment.join("lib").join("python3").join("site-packages");
    let site = site.to_str().ok_or("the target folder's name is not UTF-8")?;
    let mut args = vec!["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", site];
    args.extend(PACKAGES);
    run(Path::new("python3"), &args)?;
    std::fs::write(&marker, wanted).map_err(|e| format!("{}: {e}", marker.display()))?;
    Ok(environment)
}

/// The folder of cuobjdump and nvdisasm.
fn tools(environment: &Path) -> Result<PathBuf> {
    let nvidia = environment.join("lib/python3/site-packages/nvidia");
    let folders = std::fs::read_dir(&nvidia).map_err(|e| format!("{}: {e}", nvidia.display()))?;
    let mut bins = folders.flatten().map(|f| f.path().join("bin"));
    bins.find(|bin| bin.join("cuobjdump").exists()).ok_or(format!("{} has no cuobjdump", nvidia.display()))
}

fn build(compiler: &Compiler, tools: &Path, scratch: &Path, module: &Module, architecture: &str) -> Result<Built> {
    let code = compiler.compile(module, architecture).map_err(|e| e.to_string())?;
    let path = scratch.join(format!("{}-{architecture}.cubin", module.name()));
    std::fs::write(&path, code).map_err(|e| format!("{}: {e}", path.display()))?;
    let kernels = usages(&cuobjdump(tools, "--dump-resource-usage", &path)?)?;
    for kernel in module.source.kernels() {
        if !kernels.contains_key(*kernel) {
            return Err(format!("{}: no {kernel} in {}", module.name(), path.display()));
        }
    }
    if module.source.uses_tensor_cores() && !cuobjdump(tools, "--dump-sass", &path)?.contains("HMMA") {
        return Err(format!("{} for {architecture} has no matrix instructions", module.name()));
    }
    Ok(kernels)
}

fn cuobjdump(tools: &Path, what: &str, path: &Path) -> Result<String> {
    let program = tools.join("cuobjdump");
    let paths = std::env::join_paths([tools]).map_err(|e| e.to_string())?;
    let output = Command::new(&program).arg(what).arg(path).env("PATH", paths).output();
    let output = output.map_err(|e| format!("{}: {e}", program.display()))?;
    if !output.status.success() {
        return Err(format!("cuobjdump {what}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Kernels and what they use, from lines such as ` Function name:` and `  REG:40 STACK:0 SHARED:0 ...`.
fn usages(text: &str) -> Result<Built> {
    let mut kernels = Built::new();
    let mut name = None;
    for line in text.lines().map(str::trim) {
        if let Some(function) = line.strip_prefix("Function ") {
            name = Some(function.trim_end_matches(':').to_string());
        } else if let (Some(kernel), true) = (&name, line.starts_with("REG:")) {
            let field = |key: &str| {
                let value = line.split_whitespace().find_map(|part| part.strip_prefix(key));
                value.and_then(|v| v.parse().ok()).ok_or(format!("no {key} in {line:?}"))
            };
            kernels.insert(kernel.clone(), Usage { registers: field("REG:")?, stack: field("STACK:")? });
            name = None;
        }
    }
    Ok(kernels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_tensor::cuda::kernels::Source;

    #[test]
    fn resource_usage_is_read() {
        let text = "\nFatbin elf code:\n\nResource usage:\n Common:\n  GLOBAL:0\n Function swiglu:\n  REG:26 STACK:8 \
                    SHARED:0 LOCAL:0 CONSTANT[0]:568 TEXTURE:0\n";
        let got = usages(text).unwrap();
        assert_eq!(got.into_iter().collect::<Vec<_>>(), [("swiglu".into(), Usage { registers: 26, stack: 8 })]);
        assert!(usages(" Function f:\n  REG:x STACK:0\n").is_err());
    }

    #[test]
    fn every_source_has_kernels() {
        for source in Source::ALL {
            assert!(!source.kernels().is_empty() && !source.head_dims().is_empty(), "{}", source.name());
        }
    }
}
