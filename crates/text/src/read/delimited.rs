//! Tables in text: fields separated by commas, semicolons or tabs, with names in the first line and quotes as in RFC
//! 4180.
use super::{Raw, RawRow, RawRows, rows};
use crate::{
    Error, Result,
    input::{self, Input},
    source::Kind,
};
use serde_json::{Map, Value};
use std::{
    io::{self, BufRead, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

pub(super) fn open(path: PathBuf, mut input: Input, kind: Kind, limit: usize) -> Result<RawRows> {
    let encoding = input.encoding;
    let delimiter = if kind == Kind::Tsv { b'\t' } else { delimiter(&mut input, &path)? };
    let allowance = Arc::new(AtomicU64::new(0));
    // The reader takes a buffer at a time, so a record may have been read this far ahead.
    let slack = 64 << 10;
    let budget = Budget { inner: input, left: Arc::clone(&allowance), last: b'\n' };
    let refill = move || allowance.store(limit as u64 + slack, Ordering::Relaxed);
    refill();
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .flexible(true)
        .buffer_capacity(slack as usize)
        .from_reader(budget);
    let names = header(&mut reader, &path, encoding)?;
    let mut record = csv::ByteRecord::new();
    Ok(rows(move || {
        refill();
        let start = reader.position().line() as usize;
        if !reader.read_byte_record(&mut record).map_err(|e| csv_error(&path, start, e))? {
            return Ok(None);
        }
        // The position of a record is that of the blank lines before it, so the line is told from where it ends.
        let inside: usize = record.iter().flatten().filter(|&&byte| byte == b'\n').count();
        let line = (reader.position().line() as usize).saturating_sub(1 + inside);
        if record.len() != names.len() {
            let (fields, columns) = (record.len(), names.len());
            let what = format!(
                "{fields} fields, but the header has {columns}; put quotes around fields that contain the separator {:?}",
                char::from(delimiter)
            );
            return Ok(Some(RawRow::new(line, Raw::Bad(what))));
        }
        let mut fields = Map::new();
        for (name, field) in names.iter().zip(&record) {
            match encoding.decode(field) {
                Ok(text) => fields.insert(name.clone(), Value::String(text.into_owned())),
                Err(what) => return Ok(Some(RawRow::new(line, Raw::Bad(format!("{name:?}: {what}"))))),
            };
        }
        Ok(Some(RawRow::new(line, Raw::Fields(fields))))
    }))
}

fn header(reader: &mut csv::Reader<Budget>, path: &Path, encoding: input::Encoding) -> Result<Vec<String>> {
    let header = reader.byte_headers().map_err(|e| csv_error(path, 1, e))?;
    let wrong = |what: String| Error::Input(format!("{}, line 1: {what}", path.display()));
    let mut names: Vec<String> = Vec::with_capacity(header.len());
    for name in header {
        let name = encoding.decode(name).map_err(wrong)?.trim().to_owned();
        if names.contains(&name) {
            return Err(wrong(format!("two columns are called {name:?}; the first line must name each column once")));
        }
        names.push(name);
    }
    Ok(names)
}

/// The separator that the header uses most, a comma where it uses none.
fn delimiter(input: &mut Input, path: &Path) -> Result<u8> {
    let start = input.fill_buf().map_err(|e| input::read_error(path, Some(1), e))?;
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0), (b'|', 0)];
    let mut in_quotes = false;
    for &byte in start.iter().take_while(|byte| **byte != b'\n') {
        in_quotes ^= byte == b'"';
        if let Some((_, count)) = counts.iter_mut().find(|(known, _)| *known == byte && !in_quotes) {
            *count += 1;
        }
    }
    // The first of several that are used as often.
    Ok(counts.iter().rev().max_by_key(|(_, count)| *count).map_or(b',', |(byte, _)| *byte))
}

fn csv_error(path: &Path, line: usize, error: csv::Error) -> Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => input::read_error(path, Some(line), error),
        other => Error::Input(format!("{}, line {line}: {other:?}", path.display())),
    }
}

/// Ends a record that does not end: a quote that is never closed would take the rest of the file into memory. Line ends
/// become `\n`, and the last line has one, so that lines can be counted.
struct Budget {
    inner: Input,
    left: Arc<AtomicU64>,
    last: u8,
}

impl Read for Budget {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(io::Error::other(
                "this record is longer than max_row_bytes; is a quote not closed? Close it, or raise max_row_bytes",
            ));
        }
        let mut available = self.inner.fill_buf()?;
        if available.first() == Some(&b'\r') {
            self.inner.consume(1);
            available = self.inner.fill_buf()?;
            if available.first() != Some(&b'\n') {
                buffer[0] = b'\r';
                self.last = b'\r';
                return Ok(1);
            }
        }
        if available.is_empty() && self.last != b'\n' {
            buffer[0] = b'\n';
            self.last = b'\n';
            return Ok(1);
        }
        let part = memchr::memchr(b'\r', available).unwrap_or(available.len());
        let count = part.min(buffer.len()).min(left as usize);
        buffer[..count].copy_from_slice(&available[..count]);
        self.last = buffer[..count].last().copied().unwrap_or(self.last);
        self.inner.consume(count);
        self.left.store(left - count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
