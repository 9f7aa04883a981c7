//! The contract of the core. The name of each test begins with the scenario that it checks.

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
