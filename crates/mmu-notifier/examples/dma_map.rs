//! A DMA map: several devices use the memory of one process and share one notifier for its address
//! space.
//!
//! The first device that attaches makes the map, later ones find it, and the last one that detaches
//! frees it. A buffer is pinned once, even if several devices use it. Before its memory changes,
//! the callback removes the buffer from the translation tables of all devices.

use mmu_notifier::lockdep::CheckedAlloc;
use mmu_notifier::{
    Event, InstallError, InvalidateRange, InvalidateSeq, MmWithUser, ShadowOps, Subscription,
    Subsystem, Va, VaRange,
};
use std::io::Error;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const PAGE: u64 = mmu_notifier::PAGE_SIZE;

/// Ends the program if a callback uses the heap, which no callback may do: see `Notifier`.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

/// The index of a device.
type Device = usize;

/// The maximum number of devices and buffers. The map has a fixed size, because a callback must not
/// allocate or free.
const DEVICES: usize = 4;
const BUFFERS: usize = 16;

/// A buffer whose pages are locked in memory from the making of this value to its drop.
struct Pinned {
    range: VaRange,
    /// Its bus address in each device's table, if the buffer is in that table.
    bus_addresses: [Option<u64>; DEVICES],
}

impl Pinned {
    fn new(range: VaRange) -> Result<Self, Error> {
        // SAFETY: `mlock` has no memory-safety precondition: it fails for unmapped addresses.
        match unsafe {
            libc::mlock(
                range.start().get() as *const libc::c_void,
                (range.pages() * PAGE) as usize,
            )
        } {
            0 => Ok(Self {
                range,
                bus_addresses: [None; DEVICES],
            }),
            _ => Err(Error::last_os_error()),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: `munlock` has no memory-safety precondition: it fails for unmapped addresses.
        unsafe {
            libc::munlock(
                self.range.start().get() as *const libc::c_void,
                (self.range.pages() * PAGE) as usize,
            )
        };
    }
}

/// The state that all devices share for one address space.
struct Map {
    buffers: [Option<Pinned>; BUFFERS],
    next_bus_address: u64,
    /// How many entries the callback has removed from devices' tables. Each removal is a command
    /// to a device.
    flushes: Arc<AtomicUsize>,
}

impl ShadowOps for Map {
    fn zap(&mut self, range: &InvalidateRange<'_>) {
        // A device writes to the address in its table, so the callback must remove the entry of a
        // buffer before the buffer is unmapped.
        for place in &mut self.buffers {
            if let Some(buffer) = place.take_if(|buffer| buffer.range.overlaps(range.range())) {
                self.flushes.fetch_add(
                    buffer.bus_addresses.iter().flatten().count(),
                    Ordering::Relaxed,
                );
            }
        }
    }
}

impl Map {
    fn find(&mut self, range: VaRange) -> Option<&mut Pinned> {
        self.buffers
            .iter_mut()
            .flatten()
            .find(|buffer| buffer.range == range)
    }
}

type SharedMap = Subscription<InvalidateSeq<Map>>;

/// Held while a buffer is pinned and installed. `mlock` does not nest: if two devices pinned one
/// buffer at the same time, the `munlock` of the device that is refused would unlock the pages of
/// the other one.
static PINNING: Mutex<()> = Mutex::new(());

/// Gives a device access to a buffer, and returns the bus address. Pins the buffer unless it is
/// pinned already. Two buffers must not share a page.
fn map(shared: &SharedMap, device: Device, range: VaRange) -> Result<u64, Error> {
    loop {
        let known = shared.with_shadow(|map| {
            let next = map.next_bus_address;
            let bus_address = *map.find(range)?.bus_addresses[device].get_or_insert(next);
            if bus_address == next {
                map.next_bus_address += range.pages() * PAGE;
            }
            Some(bus_address)
        });
        if let Some(bus_address) = known {
            return Ok(bus_address);
        }
        let _pinning = PINNING.lock().expect("no holder panics");
        // Another device may have pinned the buffer meanwhile.
        if shared.with_shadow(|map| map.find(range).is_some()) {
            continue;
        }
        let snapshot = shared.snapshot(range);
        let pinned = Pinned::new(range)?;
        let installed = shared.try_install(snapshot, |map| {
            let free = map.buffers.iter_mut().find(|place| place.is_none());
            free.map(|place| *place = Some(pinned)).is_some()
        });
        match installed {
            Ok(false) => return Err(Error::other("all buffers are in use")),
            // Either the buffer is in the map now, or a bracket refused the installation. The next
            // turn of the loop finds out which of the two.
            Ok(true) | Err(InstallError::Retry) => {}
            Err(error) => return Err(Error::other(error)),
        }
    }
}

/// Removes a device from every buffer, and unpins the buffers that no device uses any more. A
/// device must do this before it puts the map, because put calls no callback.
fn detach(shared: SharedMap, device: Device) {
    shared.with_shadow(|map| {
        for place in &mut map.buffers {
            place.take_if(|buffer| {
                buffer.bus_addresses[device] = None;
                buffer.bus_addresses == [None; DEVICES]
            });
        }
    });
    shared.put();
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let flushes = Arc::new(AtomicUsize::new(0));
    let maps_made = AtomicUsize::new(0);
    let dma =
        Subsystem::<InvalidateSeq<Map>, std::convert::Infallible, _>::new(|_: &MmWithUser| {
            maps_made.fetch_add(1, Ordering::Relaxed);
            let map = Map {
                buffers: [const { None }; BUFFERS],
                next_bus_address: 0x1000_0000,
                flushes: Arc::clone(&flushes),
            };
            Ok(InvalidateSeq::new([VaRange::ALL], map))
        });

    let mm = MmWithUser::new();
    let devices = [dma.get(&mm)?, dma.get(&mm)?, dma.get(&mm)?];
    assert_eq!(
        (maps_made.load(Ordering::Relaxed), devices[0].users()),
        (1, 3),
        "one map for all"
    );

    // Two buffers. All devices use the first.
    let memory = anonymous(8 * PAGE)?;
    let first = VaRange::covering(Va::new(memory), 2 * PAGE)?;
    let second = VaRange::covering(Va::new(memory + 4 * PAGE), PAGE)?;
    for (number, device) in devices.iter().enumerate() {
        map(device, number, first)?;
    }
    let bus_address = map(&devices[1], 1, second)?;
    assert_eq!(map(&devices[1], 1, second)?, bus_address, "mapped once");
    let buffers =
        |shared: &SharedMap| shared.with_shadow(|map| map.buffers.iter().flatten().count());
    assert_eq!(buffers(&devices[2]), 2);

    // The process unmaps the first buffer while devices use it. Before `munmap`, the callback
    // removes the buffer from the tables of all devices.
    mm.with_invalidation(first, Event::Unmap, |_| {
        assert_eq!(
            (buffers(&devices[0]), flushes.load(Ordering::Relaxed)),
            (1, 3)
        );
        assert_eq!(
            // SAFETY: No code may use the memory. No device has it any more, and this program never
            // reads or writes it.
            unsafe { libc::munmap(memory as *mut libc::c_void, 2 * PAGE as usize) },
            0
        );
    });
    assert!(
        map(&devices[0], 0, first).is_err(),
        "there is nothing to pin"
    );

    // Devices detach one by one. The last one frees the map.
    for (number, device) in devices.into_iter().enumerate() {
        detach(device, number);
    }
    dma.synchronize()?;
    assert_eq!(mm.mm_count(), 1, "nothing is left of it");
    assert_eq!(
        // SAFETY: No code uses that memory.
        unsafe { libc::munmap((memory + 2 * PAGE) as *mut libc::c_void, 6 * PAGE as usize) },
        0
    );
    println!(
        "{} devices' entries were flushed before their memory went away",
        flushes.load(Ordering::Relaxed)
    );
    Ok(())
}

fn anonymous(length: u64) -> Result<u64, Error> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: The kernel chooses free addresses, because the call names none.
    let start = unsafe { libc::mmap(ptr::null_mut(), length as usize, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        Err(Error::last_os_error())
    } else {
        Ok(start as u64)
    }
}

#[cfg(test)]
#[test]
fn it_runs() {
    main().expect("the example succeeds");
}
