//! A file that a traced program has mapped: whatever its bytes are, it is read, unwound with and
//! asked for names as `mmun trace -k` does it, to an end and within limits.
#![no_main]
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the files of a program, of which a part is run"
)]

#[path = "../../crates/mmun/src"]
mod mmun {
    pub(crate) mod capture;
    pub(crate) mod change;
    pub(crate) mod digits;
    pub(crate) mod events;
    pub(crate) mod intern;
    pub(crate) mod json;
    pub(crate) mod kind;
    pub(crate) mod record;
    pub(crate) mod stacks;
    pub(crate) mod sys;
    pub(crate) mod who;
}

// As these files call one another.
use mmun::{capture, change, digits, events, intern, json, kind, record, stacks, sys, who};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| stacks::corrupt::fuzz(bytes));
