//! Fuzzes the parser of a line of `/proc/PID/maps`. The parser must return the mapping that the
//! line describes, or `None`.
#![no_main]
#![allow(dead_code, reason = "fields that this target does not read")]

#[path = "../../crates/mmu-source/src/maps/line.rs"]
mod line;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Some(mapping) = line::parse(text) else {
        return;
    };
    let range = String::from_utf8_lossy(text)
        .split(' ')
        .next()
        .map(str::to_lowercase)
        .expect("it has a first column");
    let (start, end) = range.split_once('-').expect("it was parsed");
    let number = |text: &str| {
        format!(
            "{:0>16}",
            text.trim_start_matches('+').trim_start_matches('0')
        )
    };
    assert_eq!(
        (number(start), number(end)),
        (
            format!("{:016x}", mapping.start),
            format!("{:016x}", mapping.end)
        )
    );
});
