//! The copy of a run in a bucket: brought up to date after each checkpoint while training goes on, and what a run on another
//! machine goes on from.
//!
//! The run's folder is the original. Each update looks at what is there now and sends what the bucket does not have, so that
//! whatever one could not send goes with the next. A checkpoint's marker goes last and is deleted first: one without it is not a
//! checkpoint.

use crate::checkpoint::{self, MARKER};
use crate::config::Config;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::SystemTime;
use tunesmith_files::{Error, Progress, Result};
use tunesmith_files::{atomic, atomic::sync_file, hash::sha256_of};
use tunesmith_hub::{Bucket, Settings};

/// Files of a run that change while it goes on, beside its checkpoints.
const ALONG: [&str; 3] = ["run.toml", "lock.json", METRICS];
/// Files of a run that has ended.
const AT_END: [&str; 2] = ["evaluation.json", "report.html"];
const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const FINAL: &str = "final";
/// How folders begin in which a checkpoint arrives.
const FETCHING: &str = ".fetching-";

/// A run's folder and its copy.
pub struct Upload {
    bucket: Bucket,
    run: PathBuf,
    /// Checkpoints to keep besides the best one.
    keep: usize,
    /// Markers that are known to be in the bucket, by the checkpoint's folder.
    sent: HashMap<String, Vec<u8>>,
    /// Size and time of the other files that were sent.
    sent_files: HashMap<&'static str, (u64, Option<SystemTime>)>,
    /// Whether all checkpoints that are there were made by this process, which need not be read to be trusted.
    own: bool,
}

/// Something to tell the user.
#[derive(Debug)]
pub struct News {
    /// What there is to say.
    pub text: String,
    /// Whether something is wrong.
    pub is_warning: bool,
}

/// What whoever watches is told while a copy is opened or finished.
#[derive(Clone, Copy, Debug)]
pub enum UploadEvent<'a> {
    /// How far a download is.
    Progress(Progress<'a>),
    /// Something was done.
    Note(&'a str),
    /// Something is wrong, and the run goes on.
    Warning(&'a str),
}

impl Upload {
    /// The copy that `config` asks for, if it does: with all rights that it will need, and with the newest checkpoint downloaded
    /// when the run is resumed and the bucket has a newer one.
    ///
    /// # Errors
    /// When the bucket cannot be written to, or holds a run and `resume` is not set.
    pub fn open(
        config: &Config,
        resume: bool,
        settings: &Settings,
        observer: &mut dyn FnMut(UploadEvent<'_>),
    ) -> Result<Option<Self>> {
        let Some(spec) = &config.upload else { return Ok(None) };
        let bucket = Bucket::open("upload", spec, settings)?;
        let (run, keep) = (config.output_dir.clone(), config.training.save_total_limit);
        let (sent, sent_files) = (HashMap::new(), HashMap::new());
        let upload = Self { bucket, run, keep, sent, sent_files, own: false };
        upload.bucket.check()?;
        if resume {
            upload.download_newest(config.training.load_best_model_at_end, observer)?;
        } else {
            let taken = [CHECKPOINTS, FINAL, METRICS].into_iter().chain(AT_END);
            let there = upload.bucket.children("")?;
            if taken.into_iter().any(|name| there.iter().any(|there| there == name)) {
                return Err(Error::Input(format!(
                    "{} holds a run already; go on with it by --resume, or choose another upload",
                    upload.bucket.address("")
                )));
            }
        }
        Ok(Some(upload))
    }

    /// Begins to keep the copy up to date.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn start(self) -> Result<Uploader> {
        let (run, address) = (self.run.clone(), self.bucket.address(""));
        let (wake, woken) = sync_channel(1);
        let (say, news) = channel();
        let thread = std::thread::Builder::new()
            .name("upload".into())
            .spawn(move || self.work(&woken, &say))
            .map_err(|source| Error::Io { what: "cannot start the thread that uploads".into(), source })?;
        let uploader = Uploader { wake, thread, news, run, address };
        uploader.wake();
        Ok(uploader)
    }

    /// The checkpoints in the bucket, whole or not: the names of their files by step.
    fn steps(&self) -> Result<BTreeMap<u64, BTreeSet<String>>> {
        let mut steps: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
        for path in self.bucket.list(CHECKPOINTS)? {
            let Some((folder, name)) = path.split_once('/') else { continue };
            let step = folder.strip_prefix("step-").and_then(|step| step.parse().ok());
            if let Some(step) = step.filter(|step| folder == format!("step-{step}")) {
                steps.entry(step).or_default().insert(name.to_owned());
            }
        }
        Ok(steps)
    }

    /// Downloads the newest complete checkpoint where it is newer than those that are here, with the metrics and the
    /// configuration of its run; and the best one, where the run will end with its weights.
    fn download_newest(&self, with_best: bool, observer: &mut dyn FnMut(UploadEvent<'_>)) -> Result<()> {
        let there = self.steps()?;
        let here =
            checkpoint::newest(&self.run.join(CHECKPOINTS)).and_then(|folder| checkpoint::read_state(&folder).ok());
        let is_newer = |step: u64| here.as_ref().is_none_or(|here| step > here.step);
        for (step, names) in there.iter().rev().filter(|(step, names)| is_newer(**step) && names.contains(MARKER)) {
            let Some(newest) = self.fetch(*step, names, observer)? else { continue };
            // It is put in its place last: as long as it is not there, all this is done again.
            for name in ["run.toml", METRICS] {
                if let Some(bytes) = self.bucket.get(name)? {
                    atomic::write(&self.run.join(name), &bytes)?;
                }
            }
            let state = checkpoint::read_state(&newest)?;
            if let Some((best, _)) = state.best.filter(|(best, _)| with_best && best != step)
                && let Some(names) = there.get(&best).filter(|names| names.contains(MARKER))
                && !checkpoint::is_complete(&self.local(best))
                && let Some(fetched) = self.fetch(best, names, observer)?
            {
                self.settle(best, &fetched, observer)?;
            }
            self.settle(*step, &newest, observer)?;
            break;
        }
        // Of checkpoints that an earlier fetch had begun, and that are not wanted any more.
        for entry in fs::read_dir(self.run.join(CHECKPOINTS)).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(FETCHING) {
                fs::remove_dir_all(entry.path()).map_err(|e| Error::io("cannot delete", &entry.path(), e))?;
            }
        }
        Ok(())
    }

    fn local(&self, step: u64) -> PathBuf {
        self.run.join(CHECKPOINTS).join(format!("step-{step}"))
    }

    /// Downloads one checkpoint into a folder beside its place; `None`, with a word to the user, when it turns out to be damaged.
    /// What has arrived of it stays when the fetch breaks off, and the next one goes on there.
    fn fetch(
        &self,
        step: u64,
        names: &BTreeSet<String>,
        observer: &mut dyn FnMut(UploadEvent<'_>),
    ) -> Result<Option<PathBuf>> {
        let dir = format!("{CHECKPOINTS}/step-{step}");
        let address = self.bucket.address(&dir);
        let damaged = |why: &str, observer: &mut dyn FnMut(UploadEvent<'_>)| {
            observer(UploadEvent::Warning(&format!("{address} is passed over: {why}")));
            Ok(None)
        };
        let Some(marker) = self.bucket.get(&format!("{dir}/{MARKER}"))? else { return Ok(None) };
        let Some(hashes) = checkpoint::listed(&marker) else {
            return damaged("its complete.json is not one", observer);
        };
        if let Some(missing) = hashes.keys().find(|name| !names.contains(*name)) {
            return damaged(&format!("{missing} is missing"), observer);
        }
        let stage = self.run.join(CHECKPOINTS).join(format!("{FETCHING}step-{step}"));
        let (parts, whole) = (stage.join("parts"), stage.join("whole"));
        fs::create_dir_all(&whole).map_err(|e| Error::io("cannot create", &whole, e))?;
        let is_right = |name: &str, hash: &str| sha256_of(&whole.join(name)).is_ok_and(|found| found == hash);
        for (name, hash) in &hashes {
            if is_right(name, hash) {
                continue;
            }
            let file = whole.join(name);
            if self
                .bucket
                .fetch(&format!("{dir}/{name}"), &parts, &file, &mut |p| observer(UploadEvent::Progress(p)))?
                .is_none()
                || !is_right(name, hash)
            {
                fs::remove_dir_all(&stage).map_err(|e| Error::io("cannot delete", &stage, e))?;
                return damaged(&format!("{name} is not what its complete.json says"), observer);
            }
            sync_file(&file)?;
        }
        atomic::write(&whole.join(MARKER), &marker)?;
        Ok(Some(whole))
    }

    /// Puts a checkpoint that was fetched in its place.
    fn settle(&self, step: u64, whole: &Path, observer: &mut dyn FnMut(UploadEvent<'_>)) -> Result<()> {
        let to = self.local(step);
        if to.exists() {
            // Not a whole one, or it would not have been fetched.
            fs::remove_dir_all(&to).map_err(|e| Error::io("cannot replace", &to, e))?;
        }
        fs::rename(whole, &to).map_err(|e| Error::io("cannot rename what was fetched to", &to, e))?;
        if let Some(stage) = whole.parent() {
            fs::remove_dir_all(stage).map_err(|e| Error::io("cannot delete", stage, e))?;
        }
        let address = self.bucket.address(&format!("{CHECKPOINTS}/step-{step}"));
        observer(UploadEvent::Note(&format!("fetched {address} to {}", to.display())));
        Ok(())
    }

    /// Brings the copy up to date whenever it is woken, and once more when nobody will wake it again.
    fn work(mut self, woken: &Receiver<()>, say: &Sender<News>) -> Result<()> {
        loop {
            let goes_on = woken.recv().is_ok();
            match self.update(say) {
                Err(error) if goes_on => tell(
                    say,
                    true,
                    format!(
                        "{} is not up to date: {error}; training goes on, and the next checkpoint tries again",
                        self.bucket.address("")
                    ),
                ),
                Ok(()) if goes_on => self.own = true,
                done => return done,
            }
        }
    }

    /// Sends what the bucket does not have, and deletes there the checkpoints that are too many.
    fn update(&mut self, say: &Sender<News>) -> Result<()> {
        self.put_files(&ALONG)?;
        for (step, folder) in checkpoint::list(&self.run.join(CHECKPOINTS)) {
            self.put_folder(&folder, &format!("{CHECKPOINTS}/step-{step}"), say)?;
        }
        self.delete_old()?;
        self.put_folder(&self.run.join(FINAL), FINAL, say)?;
        self.put_files(&AT_END)
    }

    /// Sends files that are there and have changed.
    fn put_files(&mut self, names: &[&'static str]) -> Result<()> {
        for name in names {
            let path = self.run.join(name);
            let Some((file, len)) = open(&path)? else { continue };
            let modified = file.metadata().and_then(|file| file.modified()).ok();
            if self.sent_files.get(name) == Some(&(len, modified)) {
                continue;
            }
            self.bucket.put(name, &file, len, &path)?;
            self.sent_files.insert(name, (len, modified));
        }
        Ok(())
    }

    /// Sends a checkpoint that is not there yet.
    fn put_folder(&mut self, folder: &Path, dir: &str, say: &Sender<News>) -> Result<()> {
        let marker = folder.join(MARKER);
        let read = || match fs::read(&marker) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(|e| Error::io("cannot read", &marker, e)),
        };
        let Some(bytes) = read()? else { return Ok(()) };
        if self.sent.get(dir) == Some(&bytes) {
            return Ok(());
        }
        let name = |name: &str| format!("{dir}/{name}");
        let there = self.bucket.get(&name(MARKER))?;
        if there.as_ref() == Some(&bytes) {
            self.sent.insert(dir.to_owned(), bytes);
            return Ok(());
        }
        if !self.own && !checkpoint::is_complete(folder) {
            tell(say, true, format!("{} is damaged and was not uploaded", folder.display()));
            return Ok(());
        }
        let mut files = Vec::new();
        for file in checkpoint::listed(&bytes).unwrap_or_default().into_keys() {
            let path = folder.join(&file);
            // An open file is read to its end even when the run deletes the checkpoint meanwhile. One that it has deleted
            // already need not be sent.
            let Some((opened, len)) = open(&path)? else { return Ok(()) };
            files.push((file, opened, len, path));
        }
        if read()?.as_ref() != Some(&bytes) {
            // Saved anew just now; the next update is due.
            return Ok(());
        }
        if there.is_some() {
            self.bucket.delete(&name(MARKER))?;
        }
        for (file, opened, len, path) in &files {
            self.bucket.put(&name(file), opened, *len, path)?;
        }
        // A checkpoint that is there has its metrics there too.
        self.put_files(&[METRICS])?;
        self.bucket.put_bytes(&name(MARKER), bytes.clone())?;
        tell(say, false, format!("uploaded {}", self.bucket.address(dir)));
        self.sent.insert(dir.to_owned(), bytes);
        Ok(())
    }

    /// Deletes what the run has written of checkpoints that are too many, or that were never whole.
    fn delete_old(&mut self) -> Result<()> {
        let here = checkpoint::list(&self.run.join(CHECKPOINTS));
        let Some((newest, folder)) = here.last() else { return Ok(()) };
        // Saved anew, or deleted: the next update is due.
        let (Ok(state), Ok(marker)) = (checkpoint::read_state(folder), fs::read(folder.join(MARKER))) else {
            return Ok(());
        };
        let there = self.steps()?;
        let (whole, torn): (Vec<_>, Vec<_>) =
            there.iter().filter(|(step, _)| *step <= newest).partition(|(_, names)| names.contains(MARKER));
        let steps: Vec<u64> = whole.iter().map(|(step, _)| **step).collect();
        let best = state.best.map(|(step, _)| step);
        for step in checkpoint::surplus(&steps, self.keep, best) {
            let dir = format!("{CHECKPOINTS}/step-{step}");
            let marker = self.bucket.get(&format!("{dir}/{MARKER}"))?;
            let listed = marker.and_then(|marker| checkpoint::listed(&marker)).unwrap_or_default();
            self.bucket.delete(&format!("{dir}/{MARKER}"))?;
            self.sent.remove(&dir);
            self.delete(&dir, listed.keys().filter(|name| there[&step].contains(*name)))?;
        }
        // What a run that was killed did not finish. It wrote the same files as this one.
        let names = checkpoint::listed(&marker).unwrap_or_default();
        for (step, files) in torn.into_iter().filter(|(step, _)| !here.iter().any(|(here, _)| here == *step)) {
            let dir = format!("{CHECKPOINTS}/step-{step}");
            self.delete(&dir, names.keys().filter(|name| files.contains(*name)))?;
        }
        Ok(())
    }

    fn delete<'a>(&self, dir: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
        names.into_iter().try_for_each(|name| self.bucket.delete(&format!("{dir}/{name}")))
    }
}

/// The file and its length, if it is there.
fn open(path: &Path) -> Result<Option<(File, u64)>> {
    let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata.len())));
    match opened {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(|e| Error::io("cannot read", path, e)),
    }
}

/// A run that ends does not listen any more.
fn tell(say: &Sender<News>, is_warning: bool, text: String) {
    let _ = say.send(News { text, is_warning });
}

/// A thread that keeps the copy up to date.
pub struct Uploader {
    wake: SyncSender<()>,
    thread: JoinHandle<Result<()>>,
    news: Receiver<News>,
    run: PathBuf,
    address: String,
}

impl Uploader {
    /// Says that there is something new. Never waits: where the thread is busy, it looks again afterwards.
    pub fn wake(&self) {
        let _ = self.wake.try_send(());
    }

    /// What there is to tell since it was asked last.
    pub fn news(&self) -> impl Iterator<Item = News> {
        self.news.try_iter()
    }

    /// Waits until all is in the bucket, and passes on how the run ended.
    ///
    /// # Errors
    /// That of the run; otherwise when the last state is not in the bucket.
    pub fn finish<T>(self, run: Result<T>, observer: &mut dyn FnMut(UploadEvent<'_>)) -> Result<T> {
        let Self { wake, thread, news, run: folder, address } = self;
        drop(wake);
        observer(UploadEvent::Note(&format!("uploading what is left to {address}")));
        // Ends when the thread does.
        for News { text, is_warning } in news {
            observer(if is_warning { UploadEvent::Warning(&text) } else { UploadEvent::Note(&text) });
        }
        let uploaded =
            thread.join().unwrap_or_else(|_| Err(Error::Failure("the thread that uploads broke down".into())));
        let Err(error) = uploaded else {
            observer(UploadEvent::Note(&format!("copy:    {address}")));
            return run;
        };
        let message = format!(
            "{address} is not up to date: {error}. All of the run is in {}; go on with --resume to upload what is missing",
            folder.display()
        );
        match run {
            Err(error) if !matches!(error, Error::Stopped) => {
                observer(UploadEvent::Warning(&message));
                Err(error)
            }
            // Whoever stopped it may want to go on from the bucket.
            _ => Err(Error::Failure(message)),
        }
    }
}
