//! After a change, the device reads the stale page without a source, and the new page with a
//! source.

use crate::memory::{
    Lab, PAGE, Source, advise, map, map_file, map_over, move_over, peek, poke, unmap, with_child,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::in_child;

/// A change of memory. The first byte is `b'o'` before the change and `b'n'` afterwards.
struct Change {
    name: &'static str,
    /// Whether the change goes through this process's libc. Only then does `hook` see it.
    by_libc: bool,
    /// Makes two pages that hold `b'o'`. The closure changes them.
    make: fn() -> (usize, Act),
}

type Act = Box<dyn FnOnce()>;

const OLD: u8 = b'o';
const NEW: u8 = b'n';
const PAGES: usize = 2;

const CHANGES: &[Change] = &[
    Change {
        name: "`munmap`, then `mmap` at the same address",
        by_libc: true,
        make: || {
            let address = old();
            (
                address,
                Box::new(move || {
                    unmap(address, PAGES);
                    map_over(address, PAGES);
                    poke(address, NEW);
                }),
            )
        },
    },
    Change {
        name: "`mmap` with `MAP_FIXED`",
        by_libc: true,
        make: || {
            let address = old();
            (
                address,
                Box::new(move || {
                    map_over(address, PAGES);
                    poke(address, NEW);
                }),
            )
        },
    },
    Change {
        name: "`madvise(MADV_DONTNEED)`",
        by_libc: true,
        make: || {
            let address = old();
            (
                address,
                Box::new(move || {
                    advise(address, PAGES, libc::MADV_DONTNEED);
                    poke(address, NEW);
                }),
            )
        },
    },
    Change {
        name: "`madvise(MADV_REMOVE)`",
        by_libc: true,
        make: || {
            let (_, address) = shared();
            (
                address,
                Box::new(move || {
                    advise(address, PAGES, libc::MADV_REMOVE);
                    poke(address, NEW);
                }),
            )
        },
    },
    Change {
        name: "`mremap` over it",
        by_libc: true,
        make: || {
            let address = old();
            (
                address,
                Box::new(move || {
                    let other = map(PAGES);
                    poke(other, NEW);
                    move_over(other, address, PAGES);
                }),
            )
        },
    },
    Change {
        name: "`ftruncate` by another process",
        by_libc: false,
        make: || {
            let (file, address) = shared();
            (
                address,
                Box::new(move || {
                    assert!(in_child(|| ftruncate(&file, 0).is_ok()));
                    ftruncate(&file, (PAGES * PAGE) as u64).unwrap();
                    poke(address, NEW);
                }),
            )
        },
    },
    Change {
        name: "`fallocate(PUNCH_HOLE)` of the file",
        by_libc: false,
        make: || {
            let (file, address) = shared();
            (
                address,
                Box::new(move || {
                    let how = rustix::fs::FallocateFlags::PUNCH_HOLE
                        | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&file, how, 0, (PAGES * PAGE) as u64).unwrap();
                    poke(address, NEW);
                }),
            )
        },
    },
    Change {
        name: "`fork`, then a write",
        by_libc: false,
        make: || {
            let address = old();
            (address, Box::new(move || with_child(|| poke(address, NEW))))
        },
    },
];

fn old() -> usize {
    let address = map(PAGES);
    poke(address, OLD);
    address
}

fn shared() -> (File, usize) {
    let file = File::from(memfd_create("stale", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, (PAGES * PAGE) as u64).unwrap();
    let address = map_file(&file, PAGES);
    poke(address, OLD);
    (file, address)
}

/// Returns which page the device reads after `change`, with a region that was cached before the
/// change.
/// Since Linux 7.0 the kernel can skip the program of the source `kernel`. The source reports that
/// as a loss within a second, and the card reads once more then.
fn outcome(source: Source, change: &Change) -> Option<&'static str> {
    let mut lab = Lab::new(source)?;
    let (address, act) = (change.make)();
    assert_eq!(
        lab.first_byte(address, PAGES).unwrap(),
        OLD,
        "{}",
        change.name
    );
    let lost = lab.cache.stats().lost;
    act();
    assert_eq!(peek(address), NEW, "{}", change.name);
    let mut found = lab.first_byte(address, PAGES).unwrap();
    let may_skip = || mmu_source::kernel::probe().unwrap().may_skip;
    if found == OLD && source == Source::Kernel && may_skip() {
        let deadline = Instant::now() + Duration::from_secs(30);
        while lab.cache.stats().lost == lost {
            assert!(Instant::now() < deadline, "stale, and no loss is reported");
            std::thread::sleep(Duration::from_millis(10));
        }
        found = lab.first_byte(address, PAGES).unwrap();
    }
    Some(match found {
        NEW => "new",
        OLD => "**stale**",
        other => panic!("{}: {other}", change.name),
    })
}

#[test]
fn without_a_source_the_card_reads_stale_pages_and_with_the_kernel_source_never() {
    let mut table =
        "| change | no source | `hook` | `kernel` |\n| --- | --- | --- | --- |\n".to_owned();
    for change in CHANGES {
        let Some(none) = outcome(Source::Nothing, change) else {
            return;
        };
        let (Some(hook), Some(kernel)) = (
            outcome(Source::Hook, change),
            outcome(Source::Kernel, change),
        ) else {
            return;
        };
        table += &format!("| {} | {none} | {hook} | {kernel} |\n", change.name);
        assert_eq!(kernel, "new", "{table}");
        assert!(hook == "new" || !change.by_libc, "{table}");
        // Since Linux 5.12, copy on write after a fork leaves the pinned page with the parent.
        assert!(
            none == "**stale**" || change.name.contains("fork"),
            "{table}"
        );
    }
    let readme =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(
        readme.contains(&table),
        "the README's table differs from this one:\n{table}"
    );
}
