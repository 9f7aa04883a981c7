//! A processor whose registers are not known here. `Tracer::new` refuses it.

use std::io;

use super::super::super::{Pid, Registers};

pub(in super::super::super) fn registers(_: Pid) -> Option<Registers> {
    None
}

pub(in super::super::super) fn skip_call(_: Pid) -> io::Result<Option<()>> {
    Err(io::ErrorKind::Unsupported.into())
}
