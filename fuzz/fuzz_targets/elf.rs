//! Fuzzes the reader of files that a traced program has mapped. Whatever the bytes of such a file
//! are, `mmun trace -k` must be able to read the file, unwind stacks with it and look up names in
//! it. Each step must terminate, and use a limited amount of memory and time.
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

// These files name each other's modules from the root of their crate.
use mmun::{capture, change, digits, events, intern, json, kind, record, stacks, sys, who};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| stacks::corrupt::fuzz(bytes));
