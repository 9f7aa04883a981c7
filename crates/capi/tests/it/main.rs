//! Tests the C interface from C: the tests compile programs and run them.

mod abi;
mod examples;
mod headers;
mod history;
mod hostile;
mod linked;
mod mmun;
mod prototypes;
mod scenarios;
mod support;
