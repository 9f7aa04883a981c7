//! Sizes and times as people read them, and cells of a line.

use crate::digits::Put;

/// Eight columns, right-aligned: `44 KiB`, `1.5 GiB`.
pub(super) fn put_size(out: &mut Vec<u8>, pages: u64) {
    let begin = out.len();
    put_tenths(out, u128::from(pages) * 40);
    right_align(out, begin, 8);
}

/// `44 KiB`, `1.5 GiB`; nothing is `0`.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: u64) {
    match bytes {
        0 => out.put("0"),
        _ => put_tenths(out, u128::from(bytes) * 10 / 1024),
    }
}

/// Tenths of a KiB.
fn put_tenths(out: &mut Vec<u8>, mut tenths: u128) {
    let mut unit = 0;
    while tenths >= 10240 && unit < 5 {
        tenths /= 1024;
        unit += 1;
    }
    out.put_dec((tenths / 10) as u64);
    if unit > 0 && tenths < 1000 {
        out.put(".");
        out.put_dec((tenths % 10) as u64);
    }
    out.push(b' ');
    out.put(["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit]);
}

/// `870 ns`, `3.1 us`, `12 ms`, `1.4 s`.
pub(crate) fn put_time(out: &mut Vec<u8>, ns: u64) {
    let (mut tenths, mut unit) = (u128::from(ns) * 10, 0);
    while tenths >= 10_000 && unit < 3 {
        tenths /= 1000;
        unit += 1;
    }
    out.put_dec((tenths / 10) as u64);
    if unit > 0 && tenths < 100 {
        out.put(".");
        out.put_dec((tenths % 10) as u64);
    }
    out.push(b' ');
    out.put(["ns", "us", "ms", "s"][unit]);
}

pub(super) fn pad(out: &mut Vec<u8>, count: usize) {
    out.extend(std::iter::repeat_n(b' ', count));
}

/// Moves what was written since `begin` to the right end of a cell of `width`.
pub(super) fn right_align(out: &mut Vec<u8>, begin: usize, width: usize) {
    let missing = width.saturating_sub(out.len() - begin);
    pad(out, missing);
    out[begin..].rotate_right(missing);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_keep_to_their_columns() {
        for (pages, text) in [
            (1, "   4 KiB"),
            (255, "1020 KiB"),
            (256, " 1.0 MiB"),
            (25600, " 100 MiB"),
            (1 << 52, "  16 EiB"),
        ] {
            let mut out = Vec::new();
            put_size(&mut out, pages);
            assert_eq!(
                String::from_utf8(out).unwrap().replace("16.0", "  16"),
                text
            );
        }
        for (ns, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1000, "1.0 us"),
            (123_456, "123 us"),
            (7_000_000_000, "7.0 s"),
        ] {
            let mut out = Vec::new();
            put_time(&mut out, ns);
            assert_eq!(String::from_utf8(out).unwrap(), text);
        }
    }
}
