//! Writing to a bucket: what a run or an export puts below one prefix, and takes back from there.

use crate::{
    Settings,
    cache::io_error,
    http,
    objects::{self, Kind, Location, Object},
};
use futures_util::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart, path::Path as Key};
use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};
use tokio::runtime::Runtime;
use tunesmith_files::atomic::create_folder;
use tunesmith_files::{Error, Observer, Result};

/// How locations to write to are given.
const FORMS: &str = "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";

/// Bytes of a part of a large object; what is not larger goes in one request.
const PART: u64 = 8 << 20;
/// Parts that S3 takes for one object.
const MOST_PARTS: u64 = 10_000;
/// Parts on their way at the same time.
const CONCURRENT: usize = 3;

/// Bytes of memory that writing to a bucket takes: the parts on their way, the one that is being filled, and the client.
pub const UPLOAD_MEMORY: u64 = (CONCURRENT as u64 + 1) * PART + 8_000_000;

/// A prefix of a bucket that may be written to. Names are relative to it, with forward slashes.
pub struct Bucket {
    location: Location,
    settings: Settings,
    runtime: Runtime,
    store: Box<dyn ObjectStore>,
}

/// What is done to an object.
type Done<T> = object_store::Result<T>;

impl Bucket {
    /// Takes `spec` apart; nothing is asked of the network yet. `field` is what the user set to `spec`.
    ///
    /// # Errors
    /// [`Error::Input`] for what is not a prefix of a bucket, without credentials, or while offline.
    pub fn open(field: &str, spec: &str, settings: &Settings) -> Result<Self> {
        let spec = if spec.ends_with("://") { spec } else { spec.trim_end_matches('/') };
        let wrong =
            |why: &str| Error::Input(format!("{field} = {spec:?} is not a place to write to: {why}; write {FORMS}"));
        let location = Location::parse(spec)?.ok_or_else(|| wrong("it is not in a bucket"))?;
        if location.kind == Kind::Web {
            return Err(wrong("web servers are only read from"));
        }
        if objects::is_pattern(&location.key) {
            return Err(wrong("`*`, `?` and `[` stand for several names"));
        }
        if settings.offline {
            return Err(Error::Offline(format!(
                "{field} = {spec:?} needs the network, which is off: leave it out, or go without --offline, \
                 TUNESMITH_OFFLINE and HF_HUB_OFFLINE"
            )));
        }
        let runtime = http::runtime()?;
        let settings = settings.clone();
        let store = location.store(&settings).map_err(|error| explain(&location, error, &settings).0)?;
        Ok(Self { location, settings, runtime, store })
    }

    /// The address of `name`, as other commands read it.
    pub fn address(&self, name: &str) -> String {
        match name {
            "" => self.location.spec(),
            _ => format!("{}/{name}", self.location.spec()),
        }
    }

    fn key(&self, name: &str) -> Result<Key> {
        let path = [&self.location.key, name].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
        Key::parse(path).map_err(|error| explain(&self.location, error.into(), &self.settings).0)
    }

    /// Makes a request, again where that may help, waiting for longer each time; `None` when there is no such object.
    fn request<T>(&self, mut make: impl AsyncFnMut() -> Result<Done<T>>) -> Result<Option<T>> {
        self.runtime.block_on(http::retry(async || match make().await {
            Ok(Ok(done)) => Ok(Some(done)),
            Ok(Err(object_store::Error::NotFound { .. })) => Ok(None),
            Ok(Err(error)) => Err(explain(&self.location, error, &self.settings)),
            Err(error) => Err((error, false)),
        }))
    }

    /// Whether everything that writing needs is allowed: lists, writes a small object and deletes it again.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no such bucket or a right is missing; [`Error::Failure`] when it cannot be reached.
    pub fn check(&self) -> Result<()> {
        self.children("")?;
        let name = ".tunesmith-write-check";
        self.put_bytes(name, b"whether this prefix may be written to\n".to_vec())?;
        self.delete(name)
    }

    /// Names of the objects and of the folders directly below the prefix or below its folder `below`.
    ///
    /// # Errors
    /// As [`Bucket::check`].
    pub fn children(&self, below: &str) -> Result<Vec<String>> {
        let prefix = self.key(below)?;
        let prefix = (!prefix.as_ref().is_empty()).then_some(&prefix);
        let found = self.request(async || Ok(self.store.list_with_delimiter(prefix).await))?;
        let found = found.ok_or_else(|| self.missing(below))?;
        let objects = found.objects.iter().map(|object| &object.location);
        Ok(objects.chain(&found.common_prefixes).filter_map(Key::filename).map(str::to_owned).collect())
    }

    /// All objects below the folder `below`, relative to it.
    ///
    /// # Errors
    /// As [`Bucket::check`].
    pub fn list(&self, below: &str) -> Result<Vec<String>> {
        let prefix = self.key(below)?;
        let found = self.request(async || Ok(self.store.list(Some(&prefix)).try_collect::<Vec<_>>().await))?;
        let found = found.ok_or_else(|| self.missing(below))?;
        let names = found.iter().filter_map(|object| object.location.as_ref().strip_prefix(prefix.as_ref()));
        Ok(names.map(|name| name.trim_start_matches('/').to_owned()).collect())
    }

    /// A small object, whole; `None` when there is none of this name.
    ///
    /// # Errors
    /// As [`Bucket::check`].
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let key = self.key(name)?;
        let found = self.request(async || {
            Ok(match self.store.get(&key).await {
                Ok(answer) => answer.bytes().await,
                Err(error) => Err(error),
            })
        })?;
        Ok(found.map(|bytes| bytes.to_vec()))
    }

    /// Writes a small object.
    ///
    /// # Errors
    /// As [`Bucket::check`].
    pub fn put_bytes(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let key = self.key(name)?;
        let payload = PutPayload::from(bytes);
        let put = self.request(async || Ok(self.store.put(&key, payload.clone()).await))?;
        put.map(drop).ok_or_else(|| self.missing(name))
    }

    /// Writes the first `len` bytes of an open file; a large one in parts, a few at a time. The object appears when all of it
    /// has arrived. `path` is the file's, for messages.
    ///
    /// # Errors
    /// As [`Bucket::check`]; when the file cannot be read.
    pub fn put(&self, name: &str, file: &File, len: u64, path: &Path) -> Result<()> {
        let key = self.key(name)?;
        let part = PART.max(len.div_ceil(MOST_PARTS));
        let put = self.request(async || {
            let mut rest = open_again(file, path)?.take(len);
            if len <= PART {
                let mut bytes = Vec::with_capacity(len as usize);
                rest.read_to_end(&mut bytes).map_err(io_error("cannot read", path))?;
                check_length(bytes.len() as u64, len, path)?;
                return Ok(self.store.put(&key, bytes.into()).await.map(drop));
            }
            let upload = match self.store.put_multipart(&key).await {
                Ok(upload) => upload,
                Err(error) => return Ok(Err(error)),
            };
            let mut parts = WriteMultipart::new_with_chunk_size(upload, part as usize);
            match send(&mut parts, &mut rest, len, path).await {
                Ok(Ok(())) => Ok(parts.finish().await.map(drop)),
                failed => {
                    // Parts that are left would be paid for. Why it failed says more than why they could not be removed.
                    let _ = parts.abort().await;
                    failed
                }
            }
        })?;
        put.ok_or_else(|| self.missing(name))
    }

    /// Deletes an object; one that is not there is fine.
    ///
    /// # Errors
    /// As [`Bucket::check`].
    pub fn delete(&self, name: &str) -> Result<()> {
        let key = self.key(name)?;
        self.request(async || Ok(self.store.delete(&key).await)).map(drop)
    }

    /// Downloads an object into the file `to`. What has arrived of it stands in the folder `parts` until it is whole: a fetch that
    /// broke off goes on there, also in a later run. `None` when there is no such object.
    ///
    /// # Errors
    /// As [`Bucket::check`]; when a file cannot be written.
    pub fn fetch(&self, name: &str, parts: &Path, to: &Path, progress: &mut Observer<'_>) -> Result<Option<()>> {
        let location = self.key(name)?;
        let Some(meta) = self.request(async || Ok(self.store.head(&location).await))? else { return Ok(None) };
        let object = Object { location, path: name.to_owned(), meta };
        create_folder(parts)?;
        let part = parts.join(object.id());
        self.runtime.block_on(self.location.download_object(&*self.store, &object, &part, &self.settings, progress))?;
        fs::rename(&part, to).map_err(io_error("cannot write", to))?;
        Ok(Some(()))
    }

    fn missing(&self, name: &str) -> Error {
        Error::NotFound(format!("{}: there is no such bucket (404): check the name and the server", self.address(name)))
    }
}

/// Another reader of an open file, from its beginning: the file may have lost its name since it was opened.
fn open_again(file: &File, path: &Path) -> Result<File> {
    let go = || {
        let mut again = file.try_clone()?;
        std::io::Seek::rewind(&mut again)?;
        Ok(again)
    };
    go().map_err(io_error("cannot read", path))
}

fn check_length(got: u64, len: u64, path: &Path) -> Result<()> {
    if got == len {
        return Ok(());
    }
    Err(Error::Failure(format!("{} became shorter while it was uploaded: {got} bytes of {len}", path.display())))
}

/// Sends `len` bytes part by part; the rest of the last part goes with `finish`.
async fn send(parts: &mut WriteMultipart, from: &mut impl Read, len: u64, path: &Path) -> Result<Done<()>> {
    let mut buffer = vec![0; 1 << 20];
    let mut sent = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read.map_err(io_error("cannot read", path))?,
        };
        if count == 0 {
            return check_length(sent, len, path).map(Ok);
        }
        sent += count as u64;
        if let Err(error) = parts.wait_for_capacity(CONCURRENT).await {
            return Ok(Err(error));
        }
        parts.write(&buffer[..count]);
    }
}

/// What went wrong with a request of a writer; whether trying again may help.
fn explain(location: &Location, error: object_store::Error, settings: &Settings) -> (Error, bool) {
    let rights = "list, read, write and delete objects below it";
    location.explain(error, settings, rights, "Check the network and the server")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_to_is_named() {
        let settings = Settings::from_variables([("HOME".into(), "/home/a".into())]).unwrap();
        let said = |spec: &str, settings: &Settings| {
            let error = Bucket::open("upload", spec, settings).err().unwrap();
            assert_eq!(error.exit_code(), 2, "{error}");
            error.to_string()
        };
        assert!(
            said("runs/a", &settings).contains("upload = \"runs/a\" is not a place to write to: it is not in a bucket")
        );
        assert!(said("https://h.example/a", &settings).contains("web servers are only read from"));
        assert!(said("s3://b/run-*", &settings).contains("stand for several names"));
        assert!(said("s3://b/a//b", &settings).contains("not a plain key"));
        assert!(said("s3://", &settings).contains("not the name of a bucket"));
        let offline = Settings { offline: true, ..settings.clone() };
        assert!(said("s3://b/a", &offline).contains("needs the network"));
        let bucket = Bucket::open("upload", "s3://b/run/", &settings).unwrap();
        assert_eq!((bucket.address(""), bucket.address("a/b")), ("s3://b/run".into(), "s3://b/run/a/b".into()));
        assert_eq!(bucket.key("final/x").unwrap().as_ref(), "run/final/x");
        let root = Bucket::open("upload", "s3://b", &settings).unwrap();
        assert_eq!(root.key("final/x").unwrap().as_ref(), "final/x");
    }
}
