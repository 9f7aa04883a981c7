//! An architecture that the tracer does not support. `Tracer::new` refuses it.

use std::io;

use super::super::super::{Pid, Registers};

pub(in super::super::super) fn registers(_: Pid) -> Option<Registers> {
    None
}

pub(in super::super::super) fn skip_call(_: Pid) -> io::Result<Option<()>> {
    Err(io::ErrorKind::Unsupported.into())
}
