//! The hook on a platform that it does not support.

use super::Patch;
use crate::Error;

pub(super) fn install() -> Result<(), Error> {
    Err(missing())
}

pub(super) fn remove() {}

pub(super) fn status() -> Vec<Patch> {
    Vec::new()
}

pub(super) fn probe() -> Result<Vec<Patch>, Error> {
    Err(missing())
}

fn missing() -> Error {
    Error::Unavailable {
        source: "hook",
        missing: "Linux with glibc on x86-64 or aarch64: there is no decoder for this processor's libc yet"
            .to_owned(),
        remedy: "use the kernel or the uffd source".to_owned(),
        instead: None,
    }
}
