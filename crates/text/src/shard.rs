//! The file that holds the blocks of one split, read block by block.
//!
//! All numbers are little endian. A header of 88 bytes (below); for each token its id (u32, the highest bit says that
//! it is trained); where the header says so, for each token the weight of its loss (f32); for each document its length
//! (u32), its file (u32), its line (u64), its trained bytes (u64), its preference (u32) and the tokens of its prompt
//! (u32); for each block and once at the end the index of its first token and of its first document (u64, u64); the
//! names of the files as a JSON list. Tokens come first so that the file can be written block by block.
use crate::{
    Block, Error, Preference, Report, Result, Sample, Source, SourceReport, Split, atomic::Pending,
    report::FORMAT_VERSION, sample::plain_weights,
};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

const MAGIC: &[u8; 8] = b"TUNESHRD";
const HEADER: usize = 88;
const BLOCK: u64 = 16;
const DOCUMENT: u64 = 32;
const TRAINED: u32 = 1 << 31;
/// Flag of the header: tokens have weights.
const WEIGHTED: u64 = 1;

/// Name of the file of `split` inside a prepared folder.
pub fn file_name(split: Split) -> String {
    format!("{split}.shard")
}

/// The blocks of one split on disk. Blocks are read when asked for, from any thread.
#[derive(Debug)]
pub struct PreparedSplit {
    path: PathBuf,
    file: File,
    #[cfg(not(unix))]
    lock: std::sync::Mutex<()>,
    header: Header,
    files: Vec<Arc<str>>,
    sources: Vec<SourceReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    key: [u8; 32],
    weighted: bool,
    max_length: u64,
    blocks: u64,
    documents: u64,
    tokens: u64,
    names: u64,
}

impl Header {
    fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        writer.write_all(MAGIC)?;
        writer.write_all(&FORMAT_VERSION.to_le_bytes())?;
        writer.write_all(&(if self.weighted { WEIGHTED as u32 } else { 0 }).to_le_bytes())?;
        writer.write_all(&self.key)?;
        for number in [self.max_length, self.blocks, self.documents, self.tokens, self.names] {
            writer.write_all(&number.to_le_bytes())?;
        }
        Ok(())
    }

    fn parse(bytes: &[u8; HEADER]) -> Result<Self, String> {
        if &bytes[..8] != MAGIC {
            return Err("this is no file of prepared data".into());
        }
        let version = number(&bytes[8..12]);
        if version != u64::from(FORMAT_VERSION) {
            return Err(format!("format version {version}, this program reads version {FORMAT_VERSION}"));
        }
        let flags = number(&bytes[12..16]);
        if flags & !WEIGHTED != 0 {
            return Err(format!("it has flags {flags:#x}, which this program does not know"));
        }
        let mut key = [0; 32];
        key.copy_from_slice(&bytes[16..48]);
        let field = |index: usize| number(&bytes[48 + 8 * index..56 + 8 * index]);
        Ok(Self {
            key,
            weighted: flags & WEIGHTED != 0,
            max_length: field(0),
            blocks: field(1),
            documents: field(2),
            tokens: field(3),
            names: field(4),
        })
    }

    /// Where documents, blocks and names begin, and the size of the file: `None` when no file could be as large.
    fn layout(&self) -> Option<[u64; 4]> {
        let per_token = if self.weighted { 8 } else { 4 };
        let documents = self.tokens.checked_mul(per_token)?.checked_add(HEADER as u64)?;
        let blocks = self.documents.checked_mul(DOCUMENT)?.checked_add(documents)?;
        let names = self.blocks.checked_add(1)?.checked_mul(BLOCK)?.checked_add(blocks)?;
        Some([documents, blocks, names, names.checked_add(self.names)?])
    }
}

/// A little-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Writes a shard block by block. The file has its name only when it is complete.
pub(crate) struct Writer {
    pending: Pending,
    header: Header,
    /// What follows the tokens is kept in files of its own, since there may be much of it.
    weights: Option<BufWriter<File>>,
    documents: BufWriter<File>,
    blocks: Vec<(u64, u64)>,
    files: HashMap<Arc<str>, u32>,
    names: Vec<Arc<str>>,
}

impl Writer {
    /// Begins the shard at `path`, in which tokens have weights if it is `weighted`.
    pub(crate) fn create(path: &Path, key: [u8; 32], max_length: usize, weighted: bool) -> Result<Self> {
        let max_length = max_length as u64;
        let header = Header { key, weighted, max_length, blocks: 0, documents: 0, tokens: 0, names: 0 };
        let mut pending = Pending::create(path)?;
        pending.write(|writer| header.write(writer))?;
        let beside = || {
            tempfile::tempfile_in(path.parent().unwrap_or(Path::new(".")))
                .map(BufWriter::new)
                .map_err(|source| Error::Io { what: format!("cannot write beside {}", path.display()), source })
        };
        Ok(Self {
            pending,
            header,
            weights: if weighted { Some(beside()?) } else { None },
            documents: beside()?,
            blocks: Vec::new(),
            files: HashMap::new(),
            names: Vec::new(),
        })
    }

    /// Appends a block of `samples`.
    pub(crate) fn push<'a>(&mut self, samples: impl Iterator<Item = &'a Sample>) -> Result<()> {
        self.blocks.push((self.header.tokens, self.header.documents));
        self.header.blocks += 1;
        for sample in samples {
            if let Some(id) = sample.ids.iter().find(|&&id| id & TRAINED != 0) {
                return Err(Error::Failure(format!("token id {id} is too large for prepared data")));
            }
            if !self.header.weighted && !sample.weights.is_empty() {
                return Err(Error::Failure(format!("{}: a shard without weights was given some", sample.source)));
            }
            let file = match self.files.get(&sample.source.file) {
                Some(&file) => file,
                None => {
                    let file = self.names.len() as u32;
                    self.files.insert(Arc::clone(&sample.source.file), file);
                    self.names.push(Arc::clone(&sample.source.file));
                    file
                }
            };
            let Self { pending, weights, documents, header, .. } = self;
            pending.write(|writer| {
                let length = u32::try_from(sample.ids.len()).map_err(io::Error::other)?;
                documents.write_all(&length.to_le_bytes())?;
                documents.write_all(&file.to_le_bytes())?;
                documents.write_all(&(sample.source.line as u64).to_le_bytes())?;
                documents.write_all(&(sample.bytes as u64).to_le_bytes())?;
                documents.write_all(&(sample.preference as u32).to_le_bytes())?;
                let shared = u32::try_from(sample.shared).map_err(io::Error::other)?;
                documents.write_all(&shared.to_le_bytes())?;
                for (id, trained) in sample.ids.iter().zip(&sample.trained) {
                    writer.write_all(&(id | if *trained { TRAINED } else { 0 }).to_le_bytes())?;
                }
                let Some(weights) = weights else { return Ok(()) };
                match sample.weights.is_empty() {
                    true => plain_weights(&sample.trained).try_for_each(|weight| write_weight(weights, weight))?,
                    false => sample.weights.iter().try_for_each(|&weight| write_weight(weights, weight))?,
                }
                Ok(())
            })?;
            header.documents += 1;
            header.tokens += sample.ids.len() as u64;
        }
        Ok(())
    }

    /// Number of blocks so far.
    pub(crate) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Writes the tables, syncs the file and gives it its name.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { mut pending, mut header, weights, documents, mut blocks, names, .. } = self;
        let names = serde_json::to_vec(&names.iter().map(AsRef::as_ref).collect::<Vec<&str>>())
            .map_err(|e| Error::Failure(format!("the names of the data files do not serialise: {e}")))?;
        header.names = names.len() as u64;
        blocks.push((header.tokens, header.documents));
        pending.write(|writer| {
            for waiting in weights.into_iter().chain([documents]) {
                let mut waiting = waiting.into_inner().map_err(|error| error.into_error())?;
                waiting.seek(SeekFrom::Start(0))?;
                io::copy(&mut waiting, writer)?;
            }
            for (token, document) in blocks {
                writer.write_all(&token.to_le_bytes())?;
                writer.write_all(&document.to_le_bytes())?;
            }
            writer.write_all(&names)?;
            writer.seek(SeekFrom::Start(0))?;
            header.write(writer)
        })?;
        pending.finish()
    }
}

fn write_weight(writer: &mut BufWriter<File>, weight: f32) -> io::Result<()> {
    writer.write_all(&weight.to_le_bytes())
}

impl PreparedSplit {
    /// Opens one split of a folder that [`prepare`](crate::prepare()) wrote. What the header says is checked against
    /// the size of the file before it is believed.
    ///
    /// # Errors
    /// A missing, truncated or foreign file; one that was not written together with the rest of the folder.
    pub fn open(folder: &Path, split: Split) -> Result<Self> {
        let report = Report::read(folder)?;
        let mut opened = Self::open_file(&folder.join(file_name(split)))?;
        if crate::tokenizer::hex(&opened.header.key) != report.key {
            return Err(opened.damaged("it belongs to other data than prepared.json beside it"));
        }
        if split == Split::Train {
            let blocks: usize = report.sources.iter().map(|source| source.blocks).sum();
            let empty = report.sources.iter().any(|source| source.blocks == 0 || source.blocks_per_epoch == 0);
            if !report.sources.is_empty() && (blocks != opened.len() || empty) {
                return Err(opened.damaged("the blocks of its sources do not add up"));
            }
            opened.sources = report.sources;
        }
        Ok(opened)
    }

    pub(crate) fn open_file(path: &Path) -> Result<Self> {
        let cannot = |error| Error::io("cannot read prepared data", path, error);
        let damaged = |what: String| Error::Input(format!("{}: {what}; prepare the data again", path.display()));
        let mut file = File::open(path).map_err(cannot)?;
        let size = file.metadata().map_err(cannot)?.len();
        if size < HEADER as u64 {
            return Err(damaged(format!("the file is cut off: {size} bytes")));
        }
        let mut bytes = [0; HEADER];
        file.read_exact(&mut bytes).map_err(cannot)?;
        let header = Header::parse(&bytes).map_err(damaged)?;
        let Some([_, _, names, _]) = header.layout().filter(|layout| layout[3] == size) else {
            return Err(damaged(format!("the file has {size} bytes, which is not what its header says")));
        };
        let mut opened = Self {
            path: path.to_owned(),
            file,
            #[cfg(not(unix))]
            lock: std::sync::Mutex::new(()),
            header,
            files: Vec::new(),
            sources: Vec::new(),
        };
        let names = opened.read(names, header.names)?;
        let names: Vec<String> = serde_json::from_slice(&names).map_err(|e| damaged(e.to_string()))?;
        opened.files = names.into_iter().map(Arc::from).collect();
        Ok(opened)
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.header.blocks as usize
    }

    /// Whether there is no block.
    pub fn is_empty(&self) -> bool {
        self.header.blocks == 0
    }

    /// Longest block that the data was prepared for, in tokens.
    pub fn max_length(&self) -> usize {
        self.header.max_length as usize
    }

    /// The data sets that training mixes, in the order of their blocks; empty when there is only one.
    pub fn sources(&self) -> &[SourceReport] {
        &self.sources
    }

    /// Number of tokens in all blocks.
    pub fn num_tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Where the documents and the tokens of block `index` are: (offset, length) in bytes of each.
    fn place(&self, index: usize) -> Result<[(u64, u64); 2]> {
        let header = &self.header;
        let Some([documents_at, blocks_at, ..]) = header.layout().filter(|_| (index as u64) < header.blocks) else {
            let blocks = header.blocks;
            return Err(Error::Failure(format!("{}: block {index} of {blocks} was asked for", self.path.display())));
        };
        let entry = self.read(blocks_at + index as u64 * BLOCK, 2 * BLOCK)?;
        let [token, document, token_end, document_end] =
            [0, 1, 2, 3].map(|field| number(&entry[8 * field..8 * field + 8]));
        let in_order = token <= token_end && token_end <= header.tokens;
        if !in_order || document > document_end || document_end > header.documents {
            return Err(self.damaged(&format!("the place of block {index} lies outside the file")));
        }
        Ok([
            (documents_at + document * DOCUMENT, (document_end - document) * DOCUMENT),
            (HEADER as u64 + token * 4, (token_end - token) * 4),
        ])
    }

    /// Lengths in tokens of the documents of block `index`, from 0; its tokens are not read.
    ///
    /// # Errors
    /// As [`PreparedSplit::block`].
    pub fn document_lengths(&self, index: usize) -> Result<Vec<usize>> {
        Ok(self.documents(index)?.into_iter().map(|(_, length)| length).collect())
    }

    /// Row (number of its file, line) and length in tokens of each document of block `index`, from 0; its tokens are
    /// not read.
    ///
    /// # Errors
    /// As [`PreparedSplit::block`].
    pub fn documents(&self, index: usize) -> Result<Vec<((u32, u64), usize)>> {
        let [(offset, length), _] = self.place(index)?;
        let documents = self.read(offset, length)?;
        let of = |document: &[u8]| {
            let row = (number(&document[4..8]) as u32, number(&document[8..16]));
            (row, number(&document[..4]) as usize)
        };
        Ok(documents.chunks_exact(DOCUMENT as usize).map(of).collect())
    }

    /// Reads block `index`, from 0.
    ///
    /// # Errors
    /// No such block, a damaged file, or a failing disk.
    pub fn block(&self, index: usize) -> Result<Block> {
        let [documents, tokens_at] = self.place(index)?;
        let documents = self.read(documents.0, documents.1)?;
        let tokens = self.read(tokens_at.0, tokens_at.1)?;
        let mut block = Block::default();
        for token in tokens.chunks_exact(4) {
            let token = number(token) as u32;
            block.ids.push(token & !TRAINED);
            block.trained.push(token & TRAINED != 0);
        }
        if self.header.weighted {
            // They follow all tokens, in the same order and size.
            let weights = self.read(tokens_at.0 + 4 * self.header.tokens, tokens_at.1)?;
            for weight in weights.chunks_exact(4) {
                let weight = f32::from_bits(number(weight) as u32);
                if !(weight >= 0.0 && weight.is_finite()) {
                    return Err(self.damaged(&format!("block {index} has a weight of {weight}")));
                }
                block.weights.push(weight);
            }
        }
        for document in documents.chunks_exact(DOCUMENT as usize) {
            let file = number(&document[4..8]) as usize;
            let Some(file) = self.files.get(file).map(Arc::clone) else {
                return Err(self.damaged(&format!("block {index} names file {file}, which is not listed")));
            };
            block.lengths.push(number(&document[..4]) as usize);
            block.sources.push(Source { file, line: number(&document[8..16]) as usize });
            block.bytes.push(number(&document[16..24]) as usize);
            let preference = number(&document[24..28]) as usize;
            let Some(preference) = Preference::ALL.get(preference) else {
                return Err(self
                    .damaged(&format!("block {index} has a document of preference {preference}, which there is not")));
            };
            block.preferences.push(*preference);
            block.shared.push(number(&document[28..32]) as usize);
        }
        let paired = |preferences: &[Preference]| {
            (preferences[0] == Preference::Chosen) == (preferences[1] == Preference::Rejected)
        };
        let ends = [
            block.preferences.first() == Some(&Preference::Rejected),
            block.preferences.last() == Some(&Preference::Chosen),
        ];
        if ends.contains(&true) || !block.preferences.windows(2).all(paired) {
            return Err(self.damaged(&format!("the answers of block {index} are not in pairs")));
        }
        if block.shared.iter().zip(&block.lengths).any(|(shared, length)| shared > length) {
            return Err(self.damaged(&format!("block {index} has a prompt that is longer than its document")));
        }
        if block.lengths.iter().sum::<usize>() != block.ids.len() || block.lengths.contains(&0) {
            return Err(self.damaged(&format!("the documents of block {index} do not add up to its tokens")));
        }
        Ok(block)
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Input(format!("{}: {what}; prepare the data again", self.path.display()))
    }

    /// Reads `length` bytes at `offset`. Callers have checked both against the size of the file.
    fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        self.read_at(&mut bytes, offset).map_err(|e| Error::io("cannot read prepared data", &self.path, e))?;
        Ok(bytes)
    }

    #[cfg(unix)]
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, offset)
    }

    #[cfg(not(unix))]
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        use std::io::{Seek, SeekFrom};
        // The position in the file is shared by all threads.
        let _guard = self.lock.lock().map_err(|_| io::Error::other("a reading thread failed"))?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack;
    use proptest::prelude::*;
    use std::fs;

    fn sample(seed: u32, length: usize) -> Sample {
        Sample {
            ids: (0..length as u32).map(|i| seed * 100 + i).collect(),
            trained: (0..length).map(|i| i > 0 && !(i as u32 + seed).is_multiple_of(3)).collect(),
            weights: Vec::new(),
            bytes: length * 3,
            source: Source { file: format!("file{}.txt", seed % 3).into(), line: seed as usize + 1 },
            preference: [Preference::Plain, Preference::Desirable, Preference::Undesirable][seed as usize % 3],
            shared: length / 2,
        }
    }

    fn written(samples: &[Sample], plan: &[Vec<usize>]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.shard");
        let weighted = samples.iter().any(|sample| !sample.weights.is_empty());
        let mut writer = Writer::create(&path, [7; 32], 16, weighted).unwrap();
        plan.iter().for_each(|block| writer.push(block.iter().map(|&index| &samples[index])).unwrap());
        assert_eq!(writer.num_blocks(), plan.len());
        writer.finish().unwrap();
        (folder, path)
    }

    proptest! {
        #[test]
        fn blocks_read_back_as_written(lengths in proptest::collection::vec(1_usize..16, 0..30), weighted: bool) {
            let mut samples: Vec<_> = lengths.iter().enumerate().map(|(i, &length)| sample(i as u32, length)).collect();
            // Where one has weights all are written with theirs.
            for sample in samples.iter_mut().step_by(2).filter(|_| weighted) {
                sample.weights = (0..sample.ids.len()).map(|i| i as f32 / 8.0).collect();
            }
            let plan = pack::plan(&lengths, 16, true);
            let (_folder, path) = written(&samples, &plan);
            let shard = PreparedSplit::open_file(&path).unwrap();
            prop_assert_eq!((shard.len(), shard.max_length(), shard.is_empty()), (plan.len(), 16, plan.is_empty()));
            prop_assert_eq!(shard.num_tokens(), lengths.iter().sum::<usize>() as u64);
            for (index, documents) in plan.iter().enumerate() {
                let mut expected = Block::default();
                documents.iter().for_each(|&document| expected.push(&samples[document]));
                if weighted && expected.weights.is_empty() {
                    expected.weights = plain_weights(&expected.trained).collect();
                }
                prop_assert_eq!(shard.document_lengths(index).unwrap(), &expected.lengths[..]);
                prop_assert_eq!(shard.block(index).unwrap(), expected);
            }
            prop_assert!(shard.block(plan.len()).is_err());
        }

        #[test]
        fn no_damage_makes_it_panic(at in 0_usize..400, byte: u8, cut in 0_usize..400, weighted: bool) {
            let mut samples = [sample(1, 5), sample(2, 7)];
            if weighted {
                samples[0].weights = vec![0.5; 5];
            }
            let (_folder, path) = written(&samples, &[vec![0], vec![1]]);
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len().saturating_sub(cut.saturating_sub(200)));
            fs::write(&path, bytes).unwrap();
            if let Ok(shard) = PreparedSplit::open_file(&path) {
                for index in 0..shard.len().min(10) {
                    let _ = shard.block(index);
                }
            }
        }
    }

    #[test]
    fn a_header_that_lies_is_refused() {
        let (_folder, path) = written(&[sample(1, 5)], &[vec![0]]);
        let good = fs::read(&path).unwrap();
        let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            fs::write(&path, bytes).unwrap();
            let error = PreparedSplit::open_file(&path).and_then(|shard| shard.block(0)).unwrap_err();
            assert!(matches!(error, Error::Input(_)), "{error:?}");
            error.to_string()
        };
        for field in [56, 64, 72, 80] {
            for value in [u64::MAX, u64::MAX / 32, 2] {
                let lie = |bytes: &mut Vec<u8>| bytes[field..field + 8].copy_from_slice(&value.to_le_bytes());
                assert!(refusal(&lie).contains("not what its header says"));
            }
        }
        assert!(refusal(&|bytes| bytes.truncate(50)).contains("cut off: 50 bytes"));
        assert!(refusal(&|bytes| bytes.truncate(120)).contains("not what its header says"));
        assert!(refusal(&|bytes| bytes[0] = b'X').contains("no file of prepared data"));
        assert!(refusal(&|bytes| bytes[8] = 9).contains("format version 9"));
        assert!(refusal(&|bytes| bytes[12] = 6).contains("flags 0x6"));
        assert!(refusal(&|bytes| bytes[12] = 1).contains("not what its header says"));
        assert!(refusal(&|bytes| bytes[140] = 9).contains("lies outside the file"));
        assert!(refusal(&|bytes| bytes[132] = 7).contains("of preference 7"));
        assert!(refusal(&|bytes| bytes[132] = Preference::Chosen as u8).contains("not in pairs"));
        assert!(refusal(&|bytes| bytes[136] = 9).contains("longer than its document"));
        assert!(refusal(&|bytes| bytes[108] = 4).contains("do not add up"));
        assert!(refusal(&|bytes| bytes[112] = 4).contains("names file 4"));
    }
}
