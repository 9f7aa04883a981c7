//! A line of `/proc/PID/maps`: whatever it holds, it is a mapping or none, and what it says comes
//! out.
#![no_main]
#![allow(dead_code, reason = "the parser's file has more than the parser")]

#[path = "../../crates/mmu-source/src/process/maps.rs"]
mod maps;

type Pid = i32;

mod ranges {
    pub(crate) fn page_down(address: u64) -> u64 {
        address & !(mmu_notifier::PAGE_SIZE - 1)
    }
}

use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| {
    let Some(mapping) = maps::parse(line) else { return };
    let range = String::from_utf8_lossy(line).split(' ').next().map(str::to_lowercase).expect("it has a first column");
    let (start, end) = range.split_once('-').expect("it was parsed");
    let number = |text: &str| format!("{:0>16}", text.trim_start_matches('+').trim_start_matches('0'));
    assert_eq!((number(start), number(end)), (format!("{:016x}", mapping.start), format!("{:016x}", mapping.end)));
});
