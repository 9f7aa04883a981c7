//! `mmun trace`, run as a user runs it.

mod bad_input;
mod detach;
mod manners;
mod records;
mod support;
