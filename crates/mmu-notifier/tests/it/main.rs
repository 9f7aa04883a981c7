//! The contract of the core, scenario by scenario: each test is named after the one it checks.

mod drills;
mod events;
mod exit;
mod get;
mod interval;
mod invalidate_seq;
#[cfg(debug_assertions)]
mod lockdep;
mod model;
mod put;
mod raw;
mod refusals;
mod register;
mod support;
mod synchronize;
mod two_pass;
