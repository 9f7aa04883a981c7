//! Four patterns of the kernel's drivers, ported.
//!
//! | pattern | drivers | what it needs |
//! | --- | --- | --- |
//! | register while the mapping is made | sgx, nouveau | [`Registration::new_locked`] |
//! | split an interval under the write lock | kfd_svm, gntdev | [`IntervalNotifier::insert_locked`], `range` |
//! | register, put, and unload when all is freed | arm-smmu-v3, intel svm | [`Subsystem::register`], `synchronize` |
//! | many buffers under one lock of the driver | amdgpu, i915, radeon, xe | [`IntervalNotifier::check_retry`] |
//!
//! No callback here uses the heap, and no thread uses the heap while it holds a lock that a
//! callback takes. So each pattern is safe under every event source.

use mmu_notifier::lockdep::CheckedAlloc;
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser, Notifier,
    Registration, Subsystem, Va, VaRange, WouldDeadlock,
};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Ends the program if a callback uses the heap.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

const PAGE: u64 = 4096;

fn pages(first: u64, count: u64) -> VaRange {
    VaRange::covering(Va::new(0x4000_0000 + first * PAGE), count * PAGE)
        .expect("a range of whole pages")
}

/// An enclave maps pages of a device. From the first mapping on, the enclave's driver must know
/// when the address space ends.
#[derive(Default)]
struct Enclave {
    is_lost: AtomicBool,
}

impl Notifier for Enclave {
    fn release(&self, _mm: &Mm) {
        self.is_lost.store(true, Ordering::Release);
    }
}

/// Maps the enclave, and registers it under the same hold of the write lock. So no thread that
/// takes the lock sees a mapping without its notifier.
fn map_enclave(mm: &MmWithUser) -> Result<Registration<Enclave>, WouldDeadlock> {
    let mut locked = mm.mmap_write_lock()?;
    // The mapping itself is made here.
    Ok(Registration::new_locked(&mut locked, Enclave::default())?)
}

/// A range of shared virtual memory with attributes of its own, and whether the device maps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Svm {
    is_read_only: bool,
    is_mapped: bool,
}

impl IntervalOps for Svm {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        self.is_mapped = false;
        None
    }
}

/// Splits a range at `at`, and makes the upper part read-only. The old interval is removed before
/// the two new ones are inserted, and the write lock excludes other changes of attributes
/// meanwhile. The device maps neither part until it faults again.
fn split(
    mm: &MmWithUser,
    whole: IntervalNotifier<Svm>,
    at: Va,
) -> Result<[IntervalNotifier<Svm>; 2], WouldDeadlock> {
    let mut locked = mm.mmap_write_lock()?;
    let range = whole.range();
    let end = range
        .end()
        .expect("it ends below the top of the address space");
    let parts = [(range.start(), at, false), (at, end, true)];
    let state = whole.remove()?;
    let insert = |(start, end, is_read_only)| {
        let part = VaRange::new(start, end).expect("the cut is inside of the range");
        let state = Svm {
            is_read_only: state.is_read_only || is_read_only,
            is_mapped: false,
        };
        Ok::<_, WouldDeadlock>(IntervalNotifier::insert_locked(&mut locked, part, state)?)
    };
    let [low, high] = parts.map(insert);
    Ok([low?, high?])
}

/// The state that an IOMMU keeps for one address space whose page table it walks.
struct Domain {
    flushes: AtomicU64,
    /// The object that the driver must not free before the last domain is gone.
    unit: Arc<AtomicU64>,
}

impl Notifier for Domain {
    fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.unit.fetch_sub(1, Ordering::Release);
    }
}

static DOMAINS: Subsystem<Domain, Infallible, ()> = Subsystem::without_alloc();

/// Binds address spaces, and unloads the driver. No put waits for a free. One `synchronize` waits
/// for the frees of all domains. Returns how many flushes there were, and how many domains are
/// left.
fn bind_and_unload(spaces: &[MmWithUser]) -> Result<(u64, u64), WouldDeadlock> {
    let (unit, mut flushes) = (Arc::new(AtomicU64::new(0)), 0);
    for mm in spaces {
        unit.fetch_add(1, Ordering::Relaxed);
        let domain = Domain {
            flushes: AtomicU64::new(0),
            unit: Arc::clone(&unit),
        };
        let domain = DOMAINS.register(mm, domain)?;
        drop(mm.invalidate(pages(0, 1), Event::Clear));
        flushes += domain.flushes.load(Ordering::Relaxed);
        domain.put();
    }
    DOMAINS.synchronize()?;
    Ok((flushes, unit.load(Ordering::Acquire)))
}

/// Which buffers a submission may use, under the driver's one lock. The table has a fixed size.
type Usable = Arc<Mutex<[bool; 8]>>;

struct UserBuffer {
    number: usize,
    usable: Usable,
}

impl IntervalOps for UserBuffer {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        self.usable.lock().expect("no holder panics")[self.number] = false;
        None
    }
}

/// Submits work on all buffers. Looks up each buffer without a lock, and then checks all of them
/// under the lock that their callbacks take. If any buffer has changed meanwhile, starts again.
/// Returns how many tries it took.
fn submit(buffers: &[IntervalNotifier<UserBuffer>], usable: &Usable) -> u32 {
    let mut tries = 0;
    loop {
        tries += 1;
        // As many sequences as the driver's table has entries.
        let mut seqs = [None; 8];
        for (seq, buffer) in seqs.iter_mut().zip(buffers) {
            *seq = Some(buffer.read_begin());
            // A driver pins or looks up the pages here, which may take long.
        }
        let mut table = usable.lock().expect("no holder panics");
        let changed = |(buffer, seq): (&IntervalNotifier<UserBuffer>, _)| buffer.check_retry(seq);
        if !buffers.iter().zip(seqs.into_iter().flatten()).any(changed) {
            table[..buffers.len()].fill(true);
            return tries;
        }
    }
}

fn main() -> Result<(), WouldDeadlock> {
    // Register while the mapping is made. Then the address space ends, and the driver puts.
    let mm = MmWithUser::new();
    let enclave = map_enclave(&mm)?;
    drop(mm);
    assert!(
        enclave.is_lost.load(Ordering::Acquire),
        "the enclave was told before the memory went"
    );
    enclave.put();

    // Split an interval under the write lock. The interval is the first of its address space.
    let mm = MmWithUser::new();
    let whole = {
        let mut locked = mm.mmap_write_lock()?;
        IntervalNotifier::insert_locked(
            &mut locked,
            pages(0, 16),
            Svm {
                is_read_only: false,
                is_mapped: true,
            },
        )?
    };
    let parts = split(&mm, whole, pages(4, 1).start())?;
    assert_eq!(
        parts.each_ref().map(IntervalNotifier::range),
        [pages(0, 4), pages(4, 12)]
    );
    for part in &parts {
        let seq = part.read_begin();
        part.try_install(seq, |svm| svm.is_mapped = true)
            .expect("nothing changes here");
    }
    drop(mm.invalidate(pages(3, 1), Event::Unmap));
    let states = parts.map(|part| part.remove());
    let [low, high] = states;
    assert_eq!(
        (low?.is_mapped, high?),
        (
            false,
            Svm {
                is_read_only: true,
                is_mapped: true
            }
        )
    );

    // Register, put, unload.
    let spaces = [MmWithUser::new(), MmWithUser::new(), MmWithUser::new()];
    assert_eq!(
        bind_and_unload(&spaces)?,
        (3, 0),
        "each was told, and all are freed"
    );

    // Many buffers under one lock, while another thread invalidates their pages.
    let usable = Usable::default();
    let insert = |number| {
        let buffer = UserBuffer {
            number,
            usable: Arc::clone(&usable),
        };
        IntervalNotifier::insert(&mm, pages(number as u64, 1), buffer)
    };
    let buffers = (0..8).map(insert).collect::<Result<Vec<_>, _>>()?;
    thread::scope(|scope| {
        let changer = scope.spawn(|| {
            (0..1_000).for_each(|at| drop(mm.invalidate(pages(at % 8, 1), Event::Unmap)))
        });
        while !changer.is_finished() {
            submit(&buffers, &usable);
        }
    });
    submit(&buffers, &usable);
    assert_eq!(*usable.lock().expect("no holder panics"), [true; 8]);
    drop(mm.invalidate(pages(5, 1), Event::Unmap));
    assert!(
        !usable.lock().expect("no holder panics")[5],
        "what has changed is not used"
    );
    buffers
        .into_iter()
        .try_for_each(|buffer| buffer.remove().map(drop))?;
    println!("four patterns");
    Ok(())
}

#[cfg(test)]
#[test]
fn runs() {
    main().expect("no thread here waits for itself");
}
