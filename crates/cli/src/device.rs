//! Where to find NVIDIA's libraries, from the environment, and the opening of a GPU by its name.

use crate::args::DeviceArgs;
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use tunesmith_files::{Error, Result};
use tunesmith_hub::Settings;
use tunesmith_infer::Placement;
use tunesmith_tensor::cuda::archive::Archive;
use tunesmith_tensor::cuda::{Gpu, Options, Search};
use tunesmith_tensor::{Device, DeviceSpec};

/// How GPUs are opened by this program: its libraries, kernels and messages.
///
/// # Errors
/// When the kernels inside the program are damaged.
pub(crate) fn options(settings: &Settings) -> Result<Options> {
    let archive = Archive::embedded().map_err(|e| Error::Failure(format!("the kernels in this program: {e}")))?;
    let notice = Some((|text| eprintln!("{text}")) as fn(&str));
    let cache = Some(settings.cache.join("kernels"));
    Ok(Options { search: search(|name| env::var_os(name)), cache, archive, notice })
}

/// Opens what a configuration or an argument names; prints what `auto` came to.
///
/// # Errors
/// When a GPU that is asked for by its number cannot be used.
pub(crate) fn open(spec: DeviceSpec, settings: &Settings) -> Result<Device> {
    let (device, reason) = spec.open(&options(settings)?)?;
    match (reason, device.gpu()) {
        (Some(reason), _) => eprintln!("device: cpu, in f32, since cuda:0 cannot be used: {reason}"),
        (None, Some(gpu)) if spec == DeviceSpec::Auto => eprintln!("device: {}", gpu.name()),
        _ => {}
    }
    Ok(device)
}

/// Opens a GPU for a command that needs one.
///
/// # Errors
/// As [`open`]; when it is none.
pub(crate) fn open_gpu(spec: DeviceSpec, settings: &Settings) -> Result<(Device, Arc<Gpu>)> {
    let device = open(spec, settings)?;
    let gpu = device.gpu().cloned();
    let gpu = gpu.ok_or_else(|| Error::Input(format!("--device {spec}: give a GPU by its number, such as cuda:0")))?;
    Ok((device, gpu))
}

/// Opens what the command line names, after a look at whether its options go together.
///
/// # Errors
/// As [`open`] and [`Placement::check`].
pub(crate) fn placement(args: &DeviceArgs, settings: &Settings) -> Result<Placement> {
    let (dtype, tf32) = (args.dtype.into(), args.tf32);
    Placement::check(args.device, dtype, tf32)?;
    Ok(Placement { device: open(args.device, settings)?, dtype, tf32 })
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
