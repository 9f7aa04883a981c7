//! The C interface, from C: programs that are compiled here and run.

mod abi;
mod headers;
mod mmun;
mod scenarios;
mod support;
