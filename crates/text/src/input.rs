//! A data file as bytes: unpacked, in lines of bounded length, decoded.
use crate::{
    Error, Result,
    source::{self, Compression, DataFile, EXPANSION, EXPANSION_FREE},
};
use encoding_rs::{DecoderResult, UTF_8, UTF_16BE, UTF_16LE, WINDOWS_1252};
use std::{
    borrow::Cow,
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// What the bytes of a text mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// UTF-8; anything else is an error.
    #[default]
    Utf8,
    /// Line by line: UTF-8 where that fits, otherwise Windows-1252.
    Auto,
    /// Another encoding of the WHATWG's Encoding Standard.
    Other(&'static encoding_rs::Encoding),
}

impl Encoding {
    /// "utf-8", "auto", or a label of the Encoding Standard such as "windows-1252" or "shift_jis".
    ///
    /// # Errors
    /// A label that is not known.
    pub fn parse(label: &str) -> Result<Self> {
        if label.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        match encoding_rs::Encoding::for_label(label.as_bytes()) {
            Some(encoding) if encoding == UTF_8 => Ok(Self::Utf8),
            Some(encoding) => Ok(Self::Other(encoding)),
            None => Err(Error::Input(format!(
                "encoding is {label:?}; it must be \"utf-8\", \"auto\" (UTF-8, and Windows-1252 in lines where that does not \
                 fit) or the name of an encoding, such as \"windows-1252\""
            ))),
        }
    }

    /// The text of `bytes`, which are whole lines or parts of one.
    pub(crate) fn decode(self, bytes: &[u8]) -> Result<Cow<'_, str>, String> {
        let invalid = match std::str::from_utf8(bytes) {
            Ok(text) if matches!(self, Self::Utf8 | Self::Auto) => return Ok(Cow::Borrowed(text)),
            Ok(_) => 0,
            Err(error) => error.valid_up_to(),
        };
        match self {
            Self::Utf8 => Err(format!(
                "byte {invalid} is not valid UTF-8; save the file as UTF-8, or name its encoding (encoding = \
                 \"windows-1252\"; \"auto\" for files that mix it with UTF-8)"
            )),
            Self::Auto => Ok(bytes
                .split_inclusive(|&byte| byte == b'\n')
                .map(|line| match std::str::from_utf8(line) {
                    Ok(text) => Cow::Borrowed(text),
                    Err(_) => WINDOWS_1252.decode_without_bom_handling(line).0,
                })
                .collect::<String>()
                .into()),
            Self::Other(encoding) => encoding
                .decode_without_bom_handling_and_without_replacement(bytes)
                .ok_or_else(|| format!("the text is not valid {}; name another encoding", encoding.name())),
        }
    }
}

/// The bytes of one file, unpacked; what is not a superset of ASCII (UTF-16, by its byte order mark or by name) as
/// UTF-8.
pub(crate) struct Input {
    reader: Box<dyn BufRead + Send>,
    /// What the bytes of `reader` mean.
    pub(crate) encoding: Encoding,
}

/// Opens a file. `read` counts the bytes of the file itself as they are read.
pub(crate) fn open(data: &DataFile, encoding: Encoding, read: &Arc<AtomicU64>) -> Result<Input> {
    let path = data.shown();
    let cannot = |error| Error::io("cannot read", path, error);
    let file = File::open(data.path()).map_err(cannot)?;
    let before = read.load(Ordering::Relaxed);
    let counted = BufReader::with_capacity(256 << 10, Counted { inner: file, read: Arc::clone(read) });
    let counted: Box<dyn BufRead + Send> = match data.member() {
        None => Box::new(counted),
        Some(member) => Box::new(BufReader::with_capacity(256 << 10, member.open(counted).map_err(cannot)?)),
    };
    let unpacked: Box<dyn Read + Send> = match source::kind(path)?.1 {
        Compression::None => return decoded(counted, encoding).map_err(|e| read_error(path, None, e)),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(counted)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(counted).map_err(cannot)?),
    };
    let bounded = Bounded { inner: unpacked, produced: 0, read: Arc::clone(read), before };
    decoded(BufReader::with_capacity(256 << 10, bounded), encoding).map_err(|e| read_error(path, None, e))
}

/// The error of reading `path` at `line`: what is wrong inside the file is the user's to repair.
pub(crate) fn read_error(path: &Path, line: Option<usize>, error: io::Error) -> Error {
    use io::ErrorKind::{InvalidData, InvalidInput, NotFound, PermissionDenied, UnexpectedEof};
    let place = line.map_or_else(|| path.display().to_string(), |line| format!("{}, line {line}", path.display()));
    match error.kind() {
        InvalidData | InvalidInput | UnexpectedEof => {
            Error::Input(format!("{place}: the file is damaged or cut off: {error}"))
        }
        NotFound | PermissionDenied => Error::io("cannot read", path, error),
        // zstd names no kind.
        _ if error.raw_os_error().is_none() => Error::Input(format!("{place}: {error}")),
        _ => Error::Io { what: format!("cannot read {place}"), source: error },
    }
}

fn decoded(mut reader: impl BufRead + Send + 'static, encoding: Encoding) -> io::Result<Input> {
    // A byte order mark is at most three bytes, and a first read gives at least as many where the file has them.
    let start = reader.fill_buf()?;
    let (found, length) = encoding_rs::Encoding::for_bom(start).map_or((None, 0), |(found, n)| (Some(found), n));
    reader.consume(length);
    let encoding = match found {
        Some(found) if found == UTF_8 && encoding == Encoding::Auto => Encoding::Auto,
        Some(found) if found == UTF_8 => Encoding::Utf8,
        Some(found) => Encoding::Other(found),
        None => encoding,
    };
    Ok(match encoding {
        Encoding::Other(wide) if wide == UTF_16LE || wide == UTF_16BE || !wide.is_ascii_compatible() => {
            let decoder = wide.new_decoder_without_bom_handling();
            let narrow = Narrow { inner: reader, decoder, name: wide.name(), text: Vec::new(), at: 0, ended: false };
            Input { reader: Box::new(BufReader::new(narrow)), encoding: Encoding::Utf8 }
        }
        encoding => Input { reader: Box::new(reader), encoding },
    })
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
    }
}

/// One line: without its end, or how long it is when that is more than the limit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// It is in the buffer.
    Whole,
    /// It was passed over.
    TooLong(usize),
}

/// Reads one line into `buffer`, never holding more than `limit` bytes of it. `None` at the end.
pub(crate) fn read_line(input: &mut impl BufRead, limit: usize, buffer: &mut Vec<u8>) -> io::Result<Option<Line>> {
    buffer.clear();
    let mut length = 0;
    loop {
        let available = input.fill_buf()?;
        if available.is_empty() {
            if length == 0 {
                return Ok(None);
            }
            break;
        }
        let end = memchr::memchr(b'\n', available);
        let part = &available[..end.unwrap_or(available.len())];
        length += part.len();
        if length <= limit {
            buffer.extend_from_slice(part);
        }
        let used = end.map_or(available.len(), |end| end + 1);
        input.consume(used);
        if end.is_some() {
            break;
        }
    }
    if length > limit {
        *buffer = Vec::new();
        return Ok(Some(Line::TooLong(length)));
    }
    if buffer.last() == Some(&b'\r') {
        buffer.pop();
    }
    Ok(Some(Line::Whole))
}

/// What is said of a row that is longer than `max_row_bytes`.
pub(crate) fn too_long(bytes: usize, limit: usize) -> String {
    format!("the row has {bytes} bytes, more than max_row_bytes = {limit}; split it, or raise max_row_bytes")
}

impl Seek for Counted {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.inner.seek(position)
    }
}

/// Counts what is read of the file.
struct Counted {
    inner: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Stops a packed file that grows beyond reason.
struct Bounded {
    inner: Box<dyn Read + Send>,
    produced: u64,
    read: Arc<AtomicU64>,
    before: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.produced += count as u64;
        let packed = self.read.load(Ordering::Relaxed) - self.before;
        if self.produced > EXPANSION_FREE && self.produced > packed.saturating_mul(EXPANSION) {
            return Err(io::Error::other(format!(
                "{packed} packed bytes gave more than {EXPANSION} times as many, as a decompression bomb does; unpack the file \
                 and give the result if it is what you want"
            )));
        }
        Ok(count)
    }
}

/// UTF-8 out of a wide encoding.
struct Narrow<R> {
    inner: R,
    decoder: encoding_rs::Decoder,
    name: &'static str,
    text: Vec<u8>,
    at: usize,
    ended: bool,
}

impl<R: BufRead> Read for Narrow<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.text.len() {
            if self.ended {
                return Ok(0);
            }
            let bytes = self.inner.fill_buf()?;
            self.ended = bytes.is_empty();
            self.text.resize(8 + bytes.len() * 3, 0);
            let (result, used, written) =
                self.decoder.decode_to_utf8_without_replacement(bytes, &mut self.text, self.ended);
            if let DecoderResult::Malformed(..) = result {
                let what = format!("the text is not valid {}", self.name);
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            self.inner.consume(used);
            self.text.truncate(written);
            self.at = 0;
        }
        let count = buffer.len().min(self.text.len() - self.at);
        buffer[..count].copy_from_slice(&self.text[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn opened(name: &str, bytes: &[u8], encoding: Encoding) -> Result<Input> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        open(&path.into(), encoding, &Arc::default())
    }

    fn all(name: &str, bytes: &[u8]) -> String {
        let mut text = String::new();
        opened(name, bytes, Encoding::Utf8).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn packed_files_are_unpacked_part_after_part() {
        assert_eq!(all("a.txt.gz", &[gzip(b"one\n"), gzip(b"two")].concat()), "one\ntwo");
        let part = |text: &str| zstd::encode_all(text.as_bytes(), 3).unwrap();
        assert_eq!(all("a.txt.zst", &[part("one\n"), part("two")].concat()), "one\ntwo");
        assert_eq!(all("a.txt", b"one"), "one");
    }

    #[test]
    fn a_bomb_is_stopped() {
        for (name, packed) in [
            ("a.txt.gz", gzip(&vec![0; 300 << 20])),
            ("a.txt.zst", zstd::encode_all(&vec![0; 300 << 20][..], 3).unwrap()),
        ] {
            let error = io::copy(&mut opened(name, &packed, Encoding::Utf8).unwrap(), &mut io::sink()).unwrap_err();
            assert!(error.to_string().contains("decompression bomb"), "{error}");
            assert!(matches!(read_error(Path::new(name), Some(1), error), Error::Input(_)));
        }
    }

    #[test]
    fn damage_is_the_files_fault() {
        for (name, packed) in
            [("a.txt.gz", gzip(b"one two three")), ("a.txt.zst", zstd::encode_all(&b"one two"[..], 3).unwrap())]
        {
            let cut = &packed[..packed.len() - 5];
            let error = match opened(name, cut, Encoding::Utf8) {
                Ok(mut input) => {
                    read_error(Path::new(name), Some(3), io::copy(&mut input, &mut io::sink()).unwrap_err())
                }
                Err(error) => error,
            };
            assert!(matches!(&error, Error::Input(text) if text.contains("a.txt")), "{error:?}");
        }
    }

    #[test]
    fn wide_encodings_are_told_by_their_mark() {
        let text = "ä\n🙂";
        let little: Vec<u8> = [0xff, 0xfe].into_iter().chain(text.encode_utf16().flat_map(u16::to_le_bytes)).collect();
        let big: Vec<u8> = [0xfe, 0xff].into_iter().chain(text.encode_utf16().flat_map(u16::to_be_bytes)).collect();
        assert_eq!((all("a.txt", &little), all("a.txt", &big)), (text.into(), text.into()));
        assert_eq!(all("a.txt", "\u{feff}x".as_bytes()), "x");
        let mut odd = opened("a.txt", &little[..little.len() - 2], Encoding::Utf8).unwrap();
        assert!(odd.read_to_end(&mut Vec::new()).unwrap_err().to_string().contains("not valid UTF-16LE"));
    }

    #[test]
    fn encodings_decode_or_say_what_to_do() {
        let decode = |label: &str, bytes: &[u8]| Encoding::parse(label).unwrap().decode(bytes).map(Cow::into_owned);
        assert_eq!(decode("utf-8", "ä".as_bytes()), Ok("ä".into()));
        assert!(decode("UTF-8", b"ab\xe4").unwrap_err().starts_with("byte 2 is not valid UTF-8"));
        assert_eq!(decode("auto", b"\xe4\n\xc3\xa4\n\x80"), Ok("ä\nä\n€".into()));
        assert_eq!(decode("latin1", b"\xe4"), Ok("ä".into()));
        assert!(decode("shift_jis", b"\xff\xff").is_err());
        assert!(Encoding::parse("klingon").unwrap_err().to_string().contains("\"klingon\""));
    }

    #[test]
    fn long_lines_are_passed_over() {
        let mut input = &b"one\r\n123456789\n\nend"[..];
        let mut buffer = Vec::new();
        let mut seen = Vec::new();
        while let Some(line) = read_line(&mut input, 5, &mut buffer).unwrap() {
            seen.push((line, String::from_utf8(buffer.clone()).unwrap()));
        }
        let whole = |text: &str| (Line::Whole, text.to_owned());
        assert_eq!(seen, [whole("one"), (Line::TooLong(9), String::new()), whole(""), whole("end")]);
    }
}
