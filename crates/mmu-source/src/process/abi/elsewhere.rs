//! An architecture that the tracer does not support. `Tracer::new` refuses it.

use super::Row;

pub(in super::super) const ARCH_NATIVE: u32 = 0;
pub(in super::super) const ARCH_COMPAT: u32 = 1;
pub(in super::super) const X32_BIT: u64 = 0;
pub(super) const X32_OWN: u64 = 0;
pub(super) const X32_CALLS: &[Row] = &[];
pub(super) const OWN: &[Row] = &[];
pub(in super::super) const COMPAT: &[Row] = &[];
