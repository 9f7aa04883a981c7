//! `struct mmun`: the event sources of this process, as one handle.

use crate::args::{self, Growing};
use crate::border::{Uncancelled, export};
use crate::error::{IN_CALLBACK, INHERITED, INVALID, fail, fail_with, line_of_source, of_source};
use crate::fills::Fills;
use libc::{c_char, c_int};
use mmu_notifier::MmWithUser;
use mmu_source::Error;
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

const HOOK: u32 = 1;
const KERNEL: u32 = 2;
const OWN: u32 = 4;

/// `struct mmun_options`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Options {
    size: usize,
    sources: u32,
    required: u32,
}

// SAFETY: The type is `repr(C)`, begins with a `usize` and consists of integers.
unsafe impl Growing for Options {
    const FIRST: usize = 16;
}

const WHY: usize = 256;

/// `struct mmun_status`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Status {
    size: usize,
    sources: u32,
    complete: u32,
    inherited: u32,
    reserved: u32,
    subscriptions: u64,
    watches: u64,
    caches: u64,
    changes: u64,
    lost: u64,
    no_hook: [c_char; WHY],
    no_kernel: [c_char; WHY],
}

// SAFETY: The type is `repr(C)`, begins with a `usize` and consists of integers.
unsafe impl Growing for Status {
    const FIRST: usize = 64 + 2 * WHY;
}

/// `struct mmun`. Each subscription, watch and cache holds a reference to its `Mmun`.
#[derive(Debug)]
pub struct Mmun {
    pub(crate) mm: &'static MmWithUser,
    hook: Result<Option<Hook>, String>,
    pub(crate) kernel: Option<Arc<Kernel>>,
    no_kernel: String,
    own: bool,
    fills: Fills,
    pub(crate) subscriptions: AtomicU64,
    pub(crate) watches: AtomicU64,
    pub(crate) caches: AtomicU64,
}

impl Mmun {
    fn open(sources: u32, required: u32) -> Result<Self, c_int> {
        if (sources | required) & !(HOOK | KERNEL | OWN) != 0 {
            return Err(fail(-libc::EINVAL, c"mmun_open: there is no such source"));
        }
        let wanted = if sources == 0 {
            HOOK | KERNEL | required
        } else {
            sources | required
        };
        let refused = |which: u32, error: &Error| -> Result<String, c_int> {
            // These two errors are the caller's fault, so they are always returned. Any other error
            // means that the source does not work here, even a lack of threads or descriptors.
            let is_fault = matches!(error, Error::AfterFork { .. } | Error::InCallback { .. });
            if required & which != 0 || is_fault {
                Err(of_source(error))
            } else {
                Ok(line_of_source(error))
            }
        };
        mmu_source::prepare().map_err(|error| of_source(&error))?;
        let mm = mmu_source::current_ref();
        let (mut kernel, mut no_kernel) = (None, String::new());
        if wanted & KERNEL != 0 {
            match Kernel::start() {
                Ok(started) => kernel = Some(started),
                Err(error) => no_kernel = refused(KERNEL, &error)?,
            }
        }
        let hook = match (wanted & HOOK != 0).then(Hook::install).transpose() {
            Ok(hook) => Ok(hook),
            Err(error) => Err(refused(HOOK, &error)?),
        };
        let own = wanted & OWN != 0;
        if let (None, Ok(None) | Err(_), false) = (&kernel, &hook, own) {
            let both = [hook.err().unwrap_or_default(), no_kernel].join("; ");
            return Err(fail_with(
                -libc::EOPNOTSUPP,
                both.trim_matches([';', ' ']).to_owned(),
            ));
        }
        Ok(Self {
            mm,
            hook,
            kernel,
            no_kernel,
            own,
            fills: Fills::default(),
            subscriptions: AtomicU64::new(0),
            watches: AtomicU64::new(0),
            caches: AtomicU64::new(0),
        })
    }

    /// Fails in the child of a fork.
    pub(crate) fn check(&self) -> Result<(), c_int> {
        if self.mm.is_inherited() {
            Err(fail(-libc::ESRCH, INHERITED))
        } else {
            Ok(())
        }
    }

    /// Fails if this thread must not wait for callbacks.
    pub(crate) fn may_wait(&self) -> Result<(), c_int> {
        self.check()?;
        if mmu_notifier::raw::would_deadlock(self.mm) {
            Err(fail(-libc::EDEADLK, IN_CALLBACK))
        } else {
            Ok(())
        }
    }

    fn sources(&self) -> u32 {
        let hook = if let Ok(Some(_)) = self.hook { HOOK } else { 0 };
        let kernel = if self.kernel.is_some() { KERNEL } else { 0 };
        hook | kernel | if self.own { OWN } else { 0 }
    }

    fn status(&self) -> Status {
        let is_inherited = self.mm.is_inherited();
        // In the child of a fork, the lock of the source's counters may be locked for ever, by a
        // thread that the child does not have.
        let kernel = self.kernel.as_ref().filter(|_| !is_inherited);
        Status {
            size: 0,
            sources: if is_inherited { 0 } else { self.sources() },
            complete: kernel.is_some().into(),
            inherited: is_inherited.into(),
            reserved: 0,
            subscriptions: self.subscriptions.load(Ordering::Relaxed),
            watches: self.watches.load(Ordering::Relaxed),
            caches: self.caches.load(Ordering::Relaxed),
            changes: kernel.map_or(0, |kernel| kernel.generation() - 1),
            lost: kernel.map_or(0, |kernel| kernel.lost()),
            no_hook: text(self.hook.as_ref().err().map_or("", String::as_str)),
            no_kernel: text(&self.no_kernel),
        }
    }

    fn fill_begin(&self) -> Result<u64, c_int> {
        self.may_wait()?;
        let kernel = self.kernel.as_deref();
        if let Some(kernel) = kernel {
            // The brackets of changes that are known already would advance the sequence.
            let _ = kernel.settle().map_err(|error| of_source(&error))?;
        }
        let seq = self
            .fills
            .begin(self.mm)
            .ok_or_else(|| fail(-libc::EDEADLK, IN_CALLBACK))?;
        // A change whose bracket was opened and closed between these calls did not advance `seq`.
        // It is over after this call.
        if let Some(kernel) = kernel {
            let _ = kernel.read_begin().map_err(|error| of_source(&error))?;
        }
        Ok(seq)
    }

    fn fill_retry(&self, seq: u64) -> bool {
        if seq == 0 || self.mm.is_inherited() {
            return true;
        }
        // The caller's reads through its translation come before the checks.
        fence(Ordering::Acquire);
        // In this order: a change that was counted before the first check has either not been
        // reported yet, or its bracket advanced the sequence before the second check.
        let is_settled = self
            .kernel
            .as_deref()
            .is_none_or(|kernel| kernel.is_settled());
        !is_settled || self.fills.retry(seq)
    }
}

/// Copies a text into a field of a struct, and ends it with a zero byte. Shortens a text that is
/// too long.
fn text(text: &str) -> [c_char; WHY] {
    let mut field = [0; WHY];
    let text = shortened(text, WHY - 1);
    let bytes = text.bytes().map(|byte| byte as c_char);
    field
        .iter_mut()
        .zip(bytes)
        .for_each(|(place, byte)| *place = byte);
    field
}

/// Returns a text of at most `most` bytes. Never cuts a command, because half a command can do harm
/// if it is run: leaves out whole clauses of the reason, and keeps the command at the end if there
/// is room for it.
fn shortened(text: &str, most: usize) -> String {
    const GAP: &str = " ...";
    if text.len() <= most {
        return text.to_owned();
    }
    let (reason, hint) = match text.rfind(" (try: ") {
        Some(at) if text.ends_with(')') && text.len() - at <= most / 2 => text.split_at(at),
        Some(at) => (&text[..at], ""),
        None => (text, ""),
    };
    let room = most - GAP.len() - hint.len();
    let ends_clause = |at: usize| {
        let (before, after) = reason.split_at(at);
        let is_outside = before.matches('(').count() == before.matches(')').count();
        let is_end = ["; ", ": ", ", ", " ("]
            .iter()
            .any(|mark| after.starts_with(mark));
        is_outside && is_end
    };
    let ends = (0..=room).filter(|at| reason.is_char_boundary(*at) && ends_clause(*at));
    let end = match reason.len() <= room {
        true => reason.len(),
        false => ends.max().unwrap_or(0),
    };
    format!("{}{GAP}{hint}", &reason[..end])
}

/// Returns a further reference to the object behind the program's handle.
///
/// # Safety
/// `mmun` must be null or open.
pub(crate) unsafe fn share(mmun: *const Mmun) -> Result<Arc<Mmun>, c_int> {
    if mmun.is_null() {
        return Err(fail(
            -libc::EINVAL,
            c"the first argument, from mmun_open(), is null",
        ));
    }
    // SAFETY: The pointer came from `Arc::into_raw` in `mmun_open`. The caller promises that the
    // handle is open, so its count is not zero.
    unsafe { Arc::increment_strong_count(mmun) };
    // SAFETY: The pointer came from `Arc::into_raw`, and this takes over the count just added.
    Ok(unsafe { Arc::from_raw(mmun) })
}

pub(crate) fn code(result: Result<(), c_int>) -> c_int {
    result.map_or_else(|error| error, |()| 0)
}

export! {
    /// Opens the sources.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_open(options: *const Options, opened: *mut *mut Mmun) -> c_int {
        let _whole = Uncancelled::enter();
        code((|| {
            let read = if options.is_null() { Ok((0, 0)) } else {
                // SAFETY: `options` begins with its size (crate docs, Pointers).
                unsafe { args::read(options) }.map(|options| (options.sources, options.required))
            };
            // SAFETY: `opened` is null or a variable of the caller (crate docs, Pointers).
            let opened = unsafe { args::result(opened) }?;
            let (sources, required) = read?;
            *opened = Arc::into_raw(Arc::new(Mmun::open(sources, required)?)).cast_mut();
            Ok(())
        })())
    }

    /// Closes the handle.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_close(mmun: *mut Mmun) {
        let _whole = Uncancelled::enter();
        if !mmun.is_null() {
            // SAFETY: The pointer came from `Arc::into_raw` in `mmun_open`, and the caller does not
            // use the handle any more (crate docs, Handles).
            drop(unsafe { Arc::from_raw(mmun) });
        }
    }

    /// Reports which sources run, and why the others do not.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_status(mmun: *const Mmun, status: *mut Status) -> c_int {
        // SAFETY: `mmun` is null or open (crate docs, Handles).
        let Some(mmun) = (unsafe { mmun.as_ref() }) else { return fail(-libc::EINVAL, INVALID) };
        // SAFETY: `status` is null or begins with its size, and is writable (crate docs, Pointers).
        code(unsafe { args::write(status, &mmun.status()) })
    }

    /// Runs the callbacks of all changes that began before the call, or waits until another thread
    /// has run them.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_settle(mmun: *const Mmun) -> c_int {
        // SAFETY: `mmun` is null or open (crate docs, Handles).
        let Some(mmun) = (unsafe { mmun.as_ref() }) else { return fail(-libc::EINVAL, INVALID) };
        if let Err(code) = mmun.check() {
            return code;
        }
        match &mmun.kernel {
            Some(kernel) => kernel.settle().map_or_else(|error| of_source(&error), |_| 0),
            None => 0,
        }
    }

    /// Waits until no change is under way, and returns a sequence number for `mmun_fill_retry`.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_fill_begin(mmun: *const Mmun) -> u64 {
        // SAFETY: `mmun` is null or open (crate docs, Handles).
        match unsafe { mmun.as_ref() } {
            Some(mmun) => mmun.fill_begin().unwrap_or(0),
            None => {
                fail(-libc::EINVAL, INVALID);
                0
            }
        }
    }

    /// Returns whether a change has begun since `mmun_fill_begin` returned `seq`.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_fill_retry(mmun: *const Mmun, seq: u64) -> bool {
        // SAFETY: `mmun` is null or open (crate docs, Handles).
        unsafe { mmun.as_ref() }.is_none_or(|mmun| mmun.fill_retry(seq))
    }
}

const _: () =
    assert!(size_of::<Status>() == Status::FIRST && size_of::<Options>() == Options::FIRST);

#[cfg(test)]
mod tests {
    use super::shortened;

    #[test]
    fn a_text_that_is_too_long_loses_clauses_and_keeps_its_command() {
        let lack = "source kernel lacks the right to open /dev/kvm, owner 0, group kvm, mode 0600";
        let more = ": Permission denied (os error 13); the broker at /run/mmun/broker.sock cannot \
                    help: none listens there (Connection refused (os error 111))";
        let hint = " (try: sudo setfacl -m u:$(id -un):rw /dev/kvm)";
        let whole = format!("{lack}{more}{hint}");
        for most in 0..200 {
            let most = most + 60;
            let short = shortened(&whole, most);
            assert!(short.len() <= most, "{short}");
            assert_eq!(short.contains("sudo"), short.ends_with(hint), "{short}");
        }
        assert!(shortened(&whole, 255).starts_with(&format!("{lack}: Permission denied")));
        assert_eq!(shortened(&whole, 400), whole);
        assert_eq!(
            shortened("no command, no end of a clause", 20),
            "no command ..."
        );
        assert_eq!(shortened("äöü (run: rm -r /tmp/x)", 16), "äöü ...");
    }
}

crate::layout::layout! {
    "mmun_options" = Options { size, sources, required }
    "mmun_status" = Status {
        size, sources, complete, inherited, reserved, subscriptions, watches, caches, changes, lost, no_hook,
        no_kernel,
    }
}
