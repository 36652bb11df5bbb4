//! Where to find NVIDIA's libraries, from the environment, and the opening of a GPU by its name.

use crate::args::{DeviceArgs, ElementName};
use crate::error::{Error, Result};
use crate::source::Settings;
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use tunesmith_model::{Adapter, Llama};
use tunesmith_tensor::cuda::archive::Archive;
use tunesmith_tensor::cuda::{Gpu, Options, Search};
use tunesmith_tensor::{Device, Dtype};

/// Opens `cuda:N`.
///
/// # Errors
/// When the name is another, or the GPU cannot be used: no driver, no device of that number, a library that is missing.
pub(crate) fn open(name: &str, settings: &Settings) -> Result<Device> {
    let number = name.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    let Some(ordinal) = number else {
        return Err(Error::Input(format!("device = {name:?}: it must be cuda:0, or the number of another GPU")));
    };
    let archive = Archive::embedded().map_err(|e| Error::Failure(format!("the kernels in this program: {e}")))?;
    let notice = Some((|text| eprintln!("{text}")) as fn(&str));
    let cache = Some(settings.cache.join("kernels"));
    let options = Options { search: search(|name| env::var_os(name)), cache, archive, notice };
    let gpu = Gpu::open(ordinal, &options).map_err(tunesmith_train::Error::from)?;
    Ok(Device::Cuda(gpu))
}

/// What a configuration's `device` stands for; prints what `auto` came to.
///
/// # Errors
/// When a GPU that is asked for by its number cannot be used.
pub(crate) fn choose(name: &str, settings: &Settings) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => match open("cuda:0", settings) {
            Ok(device) => {
                eprintln!("device: {}", device.gpu().map_or("cpu", |gpu| gpu.name()));
                Ok(device)
            }
            Err(reason) => {
                eprintln!("device: cpu, in f32, since cuda:0 cannot be used: {reason}");
                Ok(Device::Cpu)
            }
        },
        _ => open(name, settings),
    }
}

/// Whether what the command line says of device and type goes together.
///
/// # Errors
/// TF32 where it would change nothing.
pub(crate) fn check(args: &DeviceArgs) -> Result<()> {
    let fix = match (args.device.as_str(), args.dtype) {
        _ if !args.tf32 => return Ok(()),
        ("cpu", _) => "the processor's products are exact f32; leave it out, or add --device cuda:0 --dtype f32",
        (_, ElementName::Bf16) => "products in bf16 are not rounded to TF32; leave it out, or add --dtype f32",
        (_, ElementName::F32) => return Ok(()),
    };
    Err(Error::Input(format!("--tf32: {fix}")))
}

/// Moves `llama` to where the command line wants it.
///
/// # Errors
/// As [`choose`] and [`check`]; also when the model's sizes have no kernels.
pub(crate) fn place(
    llama: &mut Llama,
    adapter: Option<&mut Adapter>,
    args: &DeviceArgs,
    settings: &Settings,
) -> Result<()> {
    check(args)?;
    let device = choose(&args.device, settings)?;
    if let Some(gpu) = device.gpu() {
        gpu.set_tf32(args.tf32);
        let dtype = match args.dtype {
            ElementName::Bf16 => Dtype::BF16,
            ElementName::F32 => Dtype::F32,
        };
        llama.check_device(dtype)?;
        llama.move_to(&device, dtype);
        adapter.into_iter().for_each(|adapter| adapter.move_to(&device, dtype));
        device.synchronize().map_err(tunesmith_train::Error::from)?;
    }
    Ok(())
}

/// Where libraries are looked for: the folders of `TUNESMITH_CUDA_LIBRARIES`, the system, `CUDA_HOME` (or `CUDA_PATH`), and
/// Python environments: the active one, those whose python3 is on the path, and the user's own packages.
fn search(variable: impl Fn(&str) -> Option<OsString>) -> Search {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let folders = |name: &str| {
        let value = variable(name).unwrap_or_default();
        env::split_paths(&value).filter(|p| !p.as_os_str().is_empty()).collect::<Vec<PathBuf>>()
    };
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).map(PathBuf::from);
    let on_path = folders("PATH").into_iter().filter(|bin| bin.join("python3").exists());
    let on_path = on_path.filter_map(|bin| bin.parent().map(PathBuf::from));
    let user = variable("HOME").map(|home| PathBuf::from(home).join(".local"));
    let mut python: Vec<PathBuf> = Vec::new();
    for root in active.chain(on_path).chain(user) {
        if !python.contains(&root) {
            python.push(root);
        }
    }
    Search {
        folders: folders("TUNESMITH_CUDA_LIBRARIES"),
        system: true,
        toolkit: variable("CUDA_HOME").or_else(|| variable("CUDA_PATH")).map(PathBuf::from),
        python,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn the_environment_says_where_to_look() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("env/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::write(bin.join("python3"), "").unwrap();
        let path = format!("/nowhere:{}", bin.display());
        let found = search(|name| {
            let value = match name {
                "TUNESMITH_CUDA_LIBRARIES" => "/a/lib:/b",
                "CUDA_HOME" => "",
                "CUDA_PATH" => "/opt/cuda",
                "VIRTUAL_ENV" => "/venv",
                "PATH" => &path,
                "HOME" => "/home/me",
                _ => return None,
            };
            Some(value.into())
        });
        assert_eq!(found.folders, [PathBuf::from("/a/lib"), "/b".into()]);
        assert_eq!(found.toolkit, Some("/opt/cuda".into()));
        assert_eq!(found.python, ["/venv".into(), folder.path().join("env"), "/home/me/.local".into()]);
        assert!(found.system);
        let nothing = search(|_| None);
        assert!(nothing.folders.is_empty() && nothing.python.is_empty() && nothing.toolkit.is_none());
    }
}
