//! Plain text: a file, its paragraphs or its lines.
use super::{Raw, RawRow, RawRows, rows};
use crate::{
    Result, TextRows,
    input::{self, Input, Line},
};
use std::{io::Read, path::PathBuf};

pub(super) fn open(path: PathBuf, mut input: Input, unit: TextRows, limit: usize) -> RawRows {
    let encoding = input.encoding;
    let content = move |bytes: &[u8]| match encoding.decode(bytes) {
        Ok(text) => Raw::Text(text.into_owned()),
        Err(what) => Raw::Bad(what),
    };
    let (mut line, mut buffer, mut done) = (0, Vec::new(), false);
    match unit {
        TextRows::File => rows(move || {
            if std::mem::replace(&mut done, true) {
                return Ok(None);
            }
            let cannot = |e| input::read_error(&path, None, e);
            (&mut input).take(limit as u64 + 1).read_to_end(&mut buffer).map_err(cannot)?;
            if buffer.len() > limit {
                let rest = std::io::copy(&mut input, &mut std::io::sink()).map_err(cannot)?;
                let what = input::too_long(buffer.len() + rest as usize, limit);
                buffer = Vec::new();
                return Ok(Some(RawRow::new(1, Raw::Bad(format!("{what}, or set text_rows = \"paragraph\"")))));
            }
            let content = match content(&buffer) {
                Raw::Text(text) if text.trim().is_empty() => return Ok(None),
                Raw::Text(text) if text.contains("\r\n") => Raw::Text(text.replace("\r\n", "\n")),
                other => other,
            };
            Ok(Some(RawRow::new(1, content)))
        }),
        TextRows::Line => rows(move || {
            loop {
                line += 1;
                let found = next_line(&mut input, &path, line, limit, &mut buffer)?;
                return Ok(match found {
                    None => None,
                    Some(Line::TooLong(bytes)) => Some(RawRow::new(line, Raw::Bad(input::too_long(bytes, limit)))),
                    Some(Line::Whole) if buffer.trim_ascii().is_empty() => continue,
                    Some(Line::Whole) => Some(RawRow::new(line, content(&buffer))),
                });
            }
        }),
        TextRows::Paragraph => rows(move || {
            let (mut paragraph, mut first, mut length) = (Vec::new(), 0, 0);
            loop {
                let found = if done { None } else { next_line(&mut input, &path, line + 1, limit, &mut buffer)? };
                let blank = match found {
                    None => {
                        done = true;
                        true
                    }
                    Some(Line::TooLong(bytes)) => {
                        length += bytes;
                        false
                    }
                    Some(Line::Whole) => buffer.trim_ascii().is_empty(),
                };
                line += 1;
                match (blank, first) {
                    (true, 0) if done => return Ok(None),
                    (true, 0) => continue,
                    (true, _) if length > limit => {
                        return Ok(Some(RawRow::new(first, Raw::Bad(input::too_long(length, limit)))));
                    }
                    (true, _) => return Ok(Some(RawRow::new(first, content(&paragraph)))),
                    (false, 0) => first = line,
                    (false, _) => length += 1,
                }
                length += buffer.len();
                if length > limit {
                    paragraph = Vec::new();
                    continue;
                }
                if first != line {
                    paragraph.push(b'\n');
                }
                paragraph.extend_from_slice(&buffer);
            }
        }),
    }
}

fn next_line(
    input: &mut Input,
    path: &std::path::Path,
    line: usize,
    limit: usize,
    buffer: &mut Vec<u8>,
) -> Result<Option<Line>> {
    input::read_line(input, limit, buffer).map_err(|e| input::read_error(path, Some(line), e))
}
