//! Parquet and Arrow files, batch by batch.
use super::{Raw, RawRow, RawRows, rows, value::value};
use crate::{
    Error, Result, RowOptions, input,
    source::{self, Kind},
};
use arrow_array::RecordBatch;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, Schema};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Rows in memory at once, of a Parquet file. Those of an Arrow file are as large as its writer made them.
const BATCH: usize = 256;

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

pub(super) fn open(path: &Path, kind: Kind, options: &RowOptions, read: &Arc<AtomicU64>) -> Result<RawRows> {
    let file = File::open(path).map_err(|e| Error::io("cannot read", path, e))?;
    let size = file.metadata().map_err(|e| Error::io("cannot read", path, e))?.len();
    let opening = guarded(|| match kind {
        Kind::Parquet => parquet(file),
        _ => arrow(file, size),
    });
    let (schema, mut batches, total) = opening.map_err(|what| damaged(path, None, &what))?;
    let reader = Columns::new(path, &schema, options)?;
    let (path, read) = (path.to_owned(), Arc::clone(read));
    let (mut number, mut at, mut batch, mut counted) = (0, 0, None::<RecordBatch>, 0);
    Ok(rows(move || {
        loop {
            if let Some(rows) = &batch
                && at < rows.num_rows()
            {
                number += 1;
                at += 1;
                let fields = reader.row(rows, at - 1)?;
                let row = RawRow::new(number, Raw::Fields(fields));
                let too_long = || input::too_long(row.bytes, reader.limit);
                return Ok(Some(match row.bytes > reader.limit {
                    true => RawRow::new(number, Raw::Bad(too_long())),
                    false => row,
                }));
            }
            let next =
                guarded(|| batches.next().transpose()).map_err(|what| damaged(&path, Some(number + 1), &what))?;
            (batch, at) = (next, 0);
            // There is no telling how far a columnar file has been read, but how many of its rows.
            let done = match (&batch, total) {
                (Some(_), Some(total)) if total > 0 => size * number as u64 / total,
                (Some(_), _) => counted,
                (None, _) => size,
            };
            read.fetch_add(done - counted, Ordering::Relaxed);
            counted = done;
            if batch.is_none() {
                return Ok(None);
            }
        }
    }))
}

fn damaged(path: &Path, row: Option<usize>, what: &str) -> Error {
    let row = row.map_or_else(String::new, |row| format!(", row {row}"));
    Error::Input(format!("{}{row}: the file is damaged or cut off: {what}", path.display()))
}

/// Both libraries panic on some damaged files.
fn guarded<T>(read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("its parts do not fit together".into()),
    }
}

/// Schema, rows and, where it is known, their number.
fn parquet(file: File) -> Result<(Schema, Batches, Option<u64>), ArrowError> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let rows = builder.metadata().file_metadata().num_rows();
    let schema = builder.schema().as_ref().clone();
    let reader = builder.with_batch_size(BATCH).build()?;
    Ok((schema, Box::new(reader), u64::try_from(rows).ok()))
}

/// The file format (Feather) begins with its name; what does not is a stream, as Hugging Face's `datasets` writes it.
fn arrow(mut file: File, size: u64) -> Result<(Schema, Batches, Option<u64>), ArrowError> {
    let mut magic = [0; 6];
    let is_file = size >= 8 && file.read_exact(&mut magic).is_ok() && &magic == b"ARROW1";
    check_messages(&file, if is_file { 8 } else { 0 }, size)?;
    file.seek(SeekFrom::Start(0))?;
    let reader = BufReader::new(file);
    Ok(match is_file {
        true => {
            let reader = FileReader::try_new(reader, None)?;
            (reader.schema().as_ref().clone(), Box::new(reader), None)
        }
        false => {
            let reader = StreamReader::try_new(reader, None)?;
            (reader.schema().as_ref().clone(), Box::new(reader), None)
        }
    })
}

/// The library makes room for what a message says it has before reading it, so the sizes are held against the file
/// first.
fn check_messages(file: &File, start: u64, size: u64) -> Result<(), ArrowError> {
    let lies = || ArrowError::ParseError("a message says it is longer than the file".into());
    let mut file = BufReader::new(file);
    let mut at = start;
    while at + 8 <= size {
        file.seek(SeekFrom::Start(at))?;
        let mut head = [0; 8];
        file.read_exact(&mut head)?;
        if head[..4] != [0xff; 4] {
            // Before format 0.15 the length stood alone; after the messages of a file comes its footer.
            break;
        }
        let length = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        if length == 0 {
            break;
        }
        if at + 8 + length > size {
            return Err(lies());
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        let message = arrow_ipc::root_as_message(&bytes)
            .map_err(|e| ArrowError::ParseError(format!("a message is not readable: {e}")))?;
        let body = u64::try_from(message.bodyLength()).map_err(|_| lies())?;
        let start = at + 8 + length;
        at = start.checked_add(body).filter(|end| *end <= size).ok_or_else(lies)?;
        let dictionary = message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data());
        if let Some(batch) = message.header_as_record_batch().or(dictionary)
            && batch.compression().is_some()
        {
            for buffer in batch.buffers().iter().flatten() {
                check_buffer(&mut file, start, body, buffer.offset(), buffer.length())?;
            }
        }
    }
    Ok(())
}

/// The same for a compressed buffer, which begins with its length when it is unpacked (-1 where it is not packed).
fn check_buffer(
    file: &mut BufReader<&File>,
    start: u64,
    body: u64,
    offset: i64,
    length: i64,
) -> Result<(), ArrowError> {
    let lies = || ArrowError::ParseError("a compressed column says it is longer than it can be".into());
    let (offset, length) = (u64::try_from(offset).map_err(|_| lies())?, u64::try_from(length).map_err(|_| lies())?);
    if length < 8 {
        return Ok(());
    }
    if offset.checked_add(length).is_none_or(|end| end > body) {
        return Err(lies());
    }
    file.seek(SeekFrom::Start(start + offset))?;
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes)?;
    match i64::from_le_bytes(bytes) {
        -1 => Ok(()),
        unpacked if (0..=(length * source::EXPANSION + (64 << 20)) as i64).contains(&unpacked) => Ok(()),
        _ => Err(lies()),
    }
}

/// What is wanted of the columns of a file.
struct Columns {
    place: String,
    limit: usize,
    /// By column: its name, whether its values are looked at, and the names of a Hugging Face class label.
    columns: Vec<(String, bool, Option<Vec<String>>)>,
}

impl Columns {
    fn new(path: &Path, schema: &Schema, options: &RowOptions) -> Result<Self> {
        let features = schema.metadata.get("huggingface").and_then(|text| serde_json::from_str::<Value>(text).ok());
        let names = |column: &str| -> Option<Vec<String>> {
            let feature = features.as_ref()?.get("info")?.get("features")?.get(column)?;
            feature.get("names")?.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
        };
        let mut columns: Vec<(String, bool, Option<Vec<String>>)> = Vec::new();
        for field in schema.fields() {
            let name = field.name();
            if columns.iter().any(|(known, ..)| known == name) {
                return Err(Error::Input(format!("{}: two columns are called {name:?}", path.display())));
            }
            columns.push((name.clone(), options.reads(name), names(name)));
        }
        Ok(Self { place: path.display().to_string(), limit: options.max_row_bytes, columns })
    }

    fn row(&self, batch: &RecordBatch, index: usize) -> Result<Map<String, Value>> {
        let mut fields = Map::new();
        for ((name, wanted, labels), column) in self.columns.iter().zip(batch.columns()) {
            // Images and the like are not made into JSON; that they are there still counts for what the row is.
            let found = match wanted {
                true => value(column, index).map_err(|what| {
                    Error::Input(format!("{}: column {name:?} has {what}, which cannot be read as text", self.place))
                })?,
                false => Value::Null,
            };
            fields.insert(name.clone(), label(found, labels.as_deref()));
        }
        Ok(fields)
    }
}

/// A class label by its name.
fn label(value: Value, names: Option<&[String]>) -> Value {
    let name = value.as_u64().zip(names).and_then(|(index, names)| names.get(index as usize));
    name.map_or(value.clone(), |name| Value::String(name.clone()))
}
