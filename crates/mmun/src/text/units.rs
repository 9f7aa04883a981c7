//! Formats sizes and times for people, and pads cells.

use crate::digits::Put;

/// Eight columns, right-aligned: `44 KiB`, `1.5 GiB`.
pub(super) fn put_size(out: &mut Vec<u8>, pages: u64) {
    let begin = out.len();
    put_scaled(out, u128::from(pages) * 4096, &SIZES);
    right_align(out, begin, 8);
}

/// `44 KiB`, `1.5 GiB`; zero bytes are `0`.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: u64) {
    match bytes {
        0 => out.put("0"),
        _ => put_scaled(out, bytes.into(), &SIZES),
    }
}

/// `870 ns`, `3.1 us`, `12 ms`, `1.4 s`.
pub(crate) fn put_time(out: &mut Vec<u8>, ns: u64) {
    put_scaled(out, ns.into(), &TIMES);
}

/// The units of a quantity.
struct Units {
    /// The smallest first.
    names: &'static [&'static str],
    /// The smallest unit, in base units.
    first: u128,
    /// The factor between a unit and the next.
    step: u128,
    /// From this value on, no tenths are shown. The smallest unit never has tenths.
    whole_from: u128,
}

const SIZES: Units = Units {
    names: &["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"],
    first: 1024,
    step: 1024,
    whole_from: 100,
};

const TIMES: Units = Units {
    names: &["ns", "us", "ms", "s"],
    first: 1,
    step: 1000,
    whole_from: 10,
};

/// Rounds to the nearest value that can be shown; a value that would round to 1024 KiB is 1.0 MiB.
fn put_scaled(out: &mut Vec<u8>, value: u128, units: &Units) {
    let last = units.names.len() - 1;
    let (mut unit, mut one) = (0, units.first);
    let rounded = |part: u128, one: u128| (value * part + one / 2) / one;
    while unit < last && rounded(1, one) >= units.step {
        one *= units.step;
        unit += 1;
    }
    let tenths = rounded(10, one);
    if unit > 0 && tenths < units.whole_from * 10 {
        out.put_dec((tenths / 10) as u64);
        out.put(".");
        out.put_dec((tenths % 10) as u64);
    } else {
        out.put_dec(rounded(1, one) as u64);
    }
    out.push(b' ');
    out.put(units.names[unit]);
}

pub(super) fn pad(out: &mut Vec<u8>, count: usize) {
    out.extend(std::iter::repeat_n(b' ', count));
}

/// Right-aligns the bytes written since `begin` in a cell of `width`.
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
            (25575, "99.9 MiB"),
            (25600, " 100 MiB"),
            ((1 << 18) - 1, " 1.0 GiB"),
            (383 << 10, " 1.5 GiB"),
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
            (1950, "2.0 us"),
            (9_949, "9.9 us"),
            (9_950, "10 us"),
            (12_750_000, "13 ms"),
            (999_499, "999 us"),
            (999_500, "1.0 ms"),
            (123_456, "123 us"),
            (7_000_000_000, "7.0 s"),
        ] {
            let mut out = Vec::new();
            put_time(&mut out, ns);
            assert_eq!(String::from_utf8(out).unwrap(), text);
        }
    }
}
