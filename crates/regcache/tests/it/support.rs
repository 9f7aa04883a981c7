//! Helpers that the tests share.

use mmu_notifier::{MmWithUser, Va, VaRange};
use regcache::{Cause, Counting, Device, Options, RegCache, Registrar};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

/// Returns `pages` pages, starting at page number `first`.
pub(crate) fn pages(first: u64, pages: u64) -> VaRange {
    VaRange::covering(Va::new(first << 12), pages << 12).unwrap()
}

pub(crate) fn counting(options: Options) -> (MmWithUser, Device<Counting>, RegCache<Counting>) {
    let (mm, device) = (MmWithUser::new(), Device::new(Counting::default(), options));
    let cache = device.open(&mm).unwrap();
    (mm, device, cache)
}

/// A registrar that records what is registered, and fails on request.
#[derive(Default)]
pub(crate) struct Book {
    pages: Mutex<Pages>,
    pub(crate) in_callbacks: bool,
}

#[derive(Default)]
struct Pages {
    next: u64,
    registered: BTreeMap<u64, VaRange>,
    limit: Option<usize>,
    most: Option<u64>,
    unmapped: Vec<VaRange>,
    during: Option<Box<dyn FnOnce() + Send>>,
    at_end: Option<Box<dyn FnOnce() + Send>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Limit,
    Unmapped,
    Broken,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Refusal {}

impl Book {
    /// Returns the registered ranges in order.
    pub(crate) fn ranges(&self) -> Vec<VaRange> {
        let mut ranges: Vec<_> = self
            .pages
            .lock()
            .unwrap()
            .registered
            .values()
            .copied()
            .collect();
        ranges.sort();
        ranges
    }

    /// From now on, allows at most `limit` registrations.
    pub(crate) fn limit(&self, limit: usize) {
        self.pages.lock().unwrap().limit = Some(limit);
    }

    /// From now on, refuses ranges of more than `pages` pages, with the cause `Other`.
    pub(crate) fn break_over(&self, pages: u64) {
        self.pages.lock().unwrap().most = Some(pages);
    }

    /// From now on, refuses every range that overlaps `range`.
    pub(crate) fn unmap(&self, range: VaRange) {
        self.pages.lock().unwrap().unmapped.push(range);
    }

    /// Runs `f` at the beginning of the next registration.
    pub(crate) fn during_next(&self, f: impl FnOnce() + Send + 'static) {
        self.pages.lock().unwrap().during = Some(Box::new(f));
    }

    /// Runs `f` at the beginning of the next deregistration.
    pub(crate) fn at_next_end(&self, f: impl FnOnce() + Send + 'static) {
        self.pages.lock().unwrap().at_end = Some(Box::new(f));
    }
}

impl Registrar for Book {
    type Handle = u64;
    type Error = Refusal;

    fn register(&self, range: VaRange) -> Result<u64, Refusal> {
        let during = self.pages.lock().unwrap().during.take();
        if let Some(during) = during {
            during();
        }
        let mut pages = self.pages.lock().unwrap();
        if range == super::support::pages(666_666, 1)
            || pages.most.is_some_and(|most| range.pages() > most)
        {
            return Err(Refusal::Broken);
        }
        if pages
            .unmapped
            .iter()
            .any(|unmapped| unmapped.overlaps(range))
        {
            return Err(Refusal::Unmapped);
        }
        if pages
            .limit
            .is_some_and(|limit| pages.registered.len() >= limit)
        {
            return Err(Refusal::Limit);
        }
        pages.next += 1;
        let key = pages.next;
        pages.registered.insert(key, range);
        Ok(key)
    }

    fn deregister(&self, handle: u64) {
        let at_end = self.pages.lock().unwrap().at_end.take();
        if let Some(at_end) = at_end {
            at_end();
        }
        let range = self.pages.lock().unwrap().registered.remove(&handle);
        assert!(range.is_some(), "{handle} is deregistered twice");
    }

    fn cause(&self, error: &Refusal) -> Cause {
        match error {
            Refusal::Limit => Cause::Limit,
            Refusal::Unmapped => Cause::NotMapped,
            Refusal::Broken => Cause::Other,
        }
    }

    fn deregisters_in_callbacks(&self) -> bool {
        self.in_callbacks
    }
}

pub(crate) fn book(options: Options) -> (MmWithUser, Device<Book>, RegCache<Book>) {
    let (mm, device) = (MmWithUser::new(), Device::new(Book::default(), options));
    let cache = device.open(&mm).unwrap();
    (mm, device, cache)
}
