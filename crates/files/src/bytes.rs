//! Sizes in bytes, as people read and write them. Units are decimal: a limit of `4GB` and a peak of `4.00 GB` are the
//! same number.

/// Bytes as people write them: `4GB`, `512 MiB`, `1.5GB`.
///
/// # Errors
/// A message that says what is allowed.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err("write a number and a unit, such as \"4GB\" or \"3500MiB\"".into()),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n.is_finite() => Ok((n * factor) as u64),
        _ => Err("write a number above 0 and a unit, such as \"4GB\" or \"3500MiB\"".into()),
    }
}

/// `bytes` with a unit that suits them.
pub fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_and_written() {
        for (text, bytes) in [("4GB", 4_000_000_000), ("1.5 gb", 1_500_000_000), ("512MiB", 512 << 20), (" 8kB ", 8000)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for text in ["", "4", "GB", "-1GB", "0GB", "4 G B", "1.2.3GB", "NaNGB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        let written = ["17 bytes", "12.3 kB", "5.6 MB", "7.89 GB"];
        assert_eq!([17, 12_340, 5_600_000, 7_890_000_000].map(format_bytes), written);
    }
}
