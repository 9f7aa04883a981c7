//! The C interface, from C: programs that are compiled here and run.

mod abi;
mod examples;
mod headers;
mod history;
mod hostile;
mod mmun;
mod prototypes;
mod scenarios;
mod support;
