//! JSON objects, one a line, or as the elements of one list.
use super::{Raw, RawRow, RawRows, rows};
use crate::{
    Error, Result,
    input::{self, Encoding, Input, Line},
};
use std::{
    io::BufRead,
    path::{Path, PathBuf},
};

pub(super) fn open(path: PathBuf, mut input: Input, limit: usize) -> Result<RawRows> {
    let mut line = 1;
    let first = next_byte_after_blanks(&mut input, &path, &mut line)?;
    Ok(match first {
        Some(b'[') => {
            input.consume(1);
            list(path, input, line, limit)
        }
        _ => lines(path, input, line, limit),
    })
}

fn lines(path: PathBuf, mut input: Input, first_line: usize, limit: usize) -> RawRows {
    let (mut line, mut buffer) = (first_line - 1, Vec::new());
    rows(move || {
        loop {
            line += 1;
            let found = input::read_line(&mut input, limit, &mut buffer);
            return Ok(match found.map_err(|e| input::read_error(&path, Some(line), e))? {
                None => None,
                Some(Line::TooLong(bytes)) => Some(RawRow::new(line, Raw::Bad(input::too_long(bytes, limit)))),
                Some(Line::Whole) if buffer.trim_ascii().is_empty() => continue,
                Some(Line::Whole) => Some(RawRow::new(line, content(input.encoding, &buffer))),
            });
        }
    })
}

fn content(encoding: Encoding, bytes: &[u8]) -> Raw {
    match encoding.decode(bytes) {
        Ok(text) => Raw::Json(text.into_owned()),
        Err(what) => Raw::Bad(what),
    }
}

/// The elements of a list whose bracket has been read.
fn list(path: PathBuf, mut input: Input, first_line: usize, limit: usize) -> RawRows {
    let (mut line, mut first, mut closed) = (first_line, true, false);
    rows(move || {
        let broken = |line: usize, what: &str| {
            Error::Input(format!("{}, line {line}: broken JSON: {what}; a list of rows is expected", path.display()))
        };
        if closed {
            return Ok(None);
        }
        let mut next = next_byte_after_blanks(&mut input, &path, &mut line)?;
        if next == Some(b',') && !first {
            input.consume(1);
            next = next_byte_after_blanks(&mut input, &path, &mut line)?;
            if next == Some(b']') {
                return Err(broken(line, "a comma with no row after it"));
            }
        } else if !first && next.is_some() && next != Some(b']') {
            return Err(broken(line, "a comma is missing between two rows"));
        }
        first = false;
        match next {
            None => Err(broken(line, "the list is not closed")),
            Some(b']') => {
                input.consume(1);
                closed = true;
                match next_byte_after_blanks(&mut input, &path, &mut line)? {
                    None => Ok(None),
                    Some(_) => Err(broken(line, "there is something after the list")),
                }
            }
            Some(_) => {
                let start = line;
                let (bytes, length) = element(&mut input, &path, &mut line, limit)?
                    .ok_or_else(|| broken(line, &format!("the row of line {start} is not closed")))?;
                let content = if length > limit {
                    Raw::Bad(input::too_long(length, limit))
                } else {
                    content(input.encoding, &bytes)
                };
                Ok(Some(RawRow::new(start, content)))
            }
        }
    })
}

/// The bytes of one element and their number, up to the comma or bracket after it, which stays. Beyond `limit` they are
/// only counted. `None` when the file ends first.
fn element(input: &mut Input, path: &Path, line: &mut usize, limit: usize) -> Result<Option<(Vec<u8>, usize)>> {
    let (mut bytes, mut length) = (Vec::new(), 0);
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    loop {
        let available = input.fill_buf().map_err(|e| input::read_error(path, Some(*line), e))?;
        if available.is_empty() {
            return Ok(None);
        }
        let mut used = 0;
        let mut done = false;
        for &byte in available {
            if in_string {
                in_string = escaped || byte != b'"';
                escaped = !escaped && byte == b'\\';
            } else {
                match byte {
                    b',' | b']' | b'}' if depth == 0 => {
                        done = true;
                        break;
                    }
                    b'"' => in_string = true,
                    b'[' | b'{' => depth += 1,
                    b']' | b'}' => {
                        depth -= 1;
                        done = depth == 0;
                    }
                    _ => {}
                }
            }
            *line += usize::from(byte == b'\n');
            used += 1;
            if done {
                break;
            }
        }
        length += used;
        if length <= limit {
            bytes.extend_from_slice(&available[..used]);
        } else {
            bytes = Vec::new();
        }
        input.consume(used);
        if done {
            return Ok(Some((bytes, length)));
        }
    }
}

/// Passes over blanks, counting lines; the byte that comes next stays.
fn next_byte_after_blanks(input: &mut Input, path: &Path, line: &mut usize) -> Result<Option<u8>> {
    loop {
        let available = input.fill_buf().map_err(|e| input::read_error(path, Some(*line), e))?;
        if available.is_empty() {
            return Ok(None);
        }
        let blanks = available.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        *line += available[..blanks].iter().filter(|&&byte| byte == b'\n').count();
        let next = available.get(blanks).copied();
        input.consume(blanks);
        if next.is_some() {
            return Ok(next);
        }
    }
}
