//! The detector in builds without `debug_assertions`: it does nothing.

use std::marker::PhantomData;

#[derive(Debug)]
pub(super) struct Map;

#[derive(Debug)]
pub(crate) struct Held<'a>(PhantomData<&'a Map>);

/// A bracket or callback section of one address space, or a deferred free.
#[derive(Debug)]
pub(crate) struct Section;

impl Map {
    pub(super) const fn new(_name: &'static str) -> Self {
        Self
    }

    #[inline]
    pub(super) fn acquire(&self) -> Held<'_> {
        Held(PhantomData)
    }
}

impl Section {
    #[inline]
    pub(crate) fn enter(_mm: Option<u64>) -> Self {
        Self
    }
}

#[derive(Debug)]
pub(crate) struct Callback;

impl Callback {
    #[inline(always)]
    pub(crate) fn enter(_notifier: fn() -> &'static str, _method: &'static str) -> Self {
        Self
    }
}

#[inline(always)]
pub(super) fn might_allocate(_call: &str) {}

#[inline]
pub(super) fn might_wait(_mm: Option<u64>) {}

#[inline]
pub(super) fn holds_state(_mm: u64) -> Held<'static> {
    Held(PhantomData)
}
