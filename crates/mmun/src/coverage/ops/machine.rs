//! Operations that need special machines: swap space and memory cgroups, two NUMA nodes, a
//! `khugepaged` that scans often, a page that may be lost, or reserved huge pages.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, MemfdFlags, fadvise, fstat, ftruncate, memfd_create};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::advice::{known, small_pages};
use super::maps::PAGES;
use super::{LIBC, NONE, is_guest, until_changed};
use crate::coverage::files::scratch_file;
use crate::coverage::operation::{Operation, Prepared, Unavailable};
use crate::coverage::page::{Judge, Page};
use crate::coverage::region::{Region, page_size};

const MADV_HWPOISON: i32 = 100;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "reclaim to swap (memory cgroup)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: reclaimed,
    },
    Operation {
        name: "automatic NUMA balancing",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: balanced,
    },
    Operation {
        name: "khugepaged",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let between =
                number("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs")?;
            if between > 1000 {
                return Err(Unavailable(format!(
                    "khugepaged scans every {between} ms; 'echo 50 > \
                     /sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs' would do"
                )));
            }
            let region = small_pages()?;
            Ok(Prepared::new(&region.clone(), 1, move || {
                region.advise(libc::MADV_HUGEPAGE)?;
                until_moved(&region, 1, || Ok(()))
            }))
        },
    },
    Operation {
        name: "madvise (HWPOISON)",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: || {
            if !is_guest()? {
                return Err("it would cost this machine a page until its next boot; run it in `cargo xtask guest`".into());
            }
            known(MADV_HWPOISON, "2.6.32")?;
            // The page is clean, so the kernel can discard it: its file still has the bytes.
            //
            // It must not be part of a large folio. If another user of the folio keeps the kernel
            // from splitting it, the call fails with EHWPOISON (Linux 6.11). The file was written
            // as large folios, so it leaves the page cache first, and is read back page by page.
            // It is smaller than a huge page, so khugepaged does not collapse it.
            const FEW: usize = 16;
            let file = scratch_file(FEW)?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
            let region = Region::private(&file, FEW)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.part(0, 1).advise(MADV_HWPOISON)
            }))
        },
    },
    Operation {
        name: "ftruncate (hugetlbfs)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            if number("/proc/sys/vm/nr_hugepages")? == 0 {
                return Err(
                    "no huge pages are reserved; 'echo 16 > /proc/sys/vm/nr_hugepages' would do"
                        .into(),
                );
            }
            let file = memfd_create("coverage", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)?;
            // The size of the reserved pages, which need not be that of transparent ones.
            let size = fstat(&file)?.st_blksize as usize;
            ftruncate(&file, size as u64)?;
            let file = fs::File::from(file);
            let region = Region::shared(&file, size / page_size())?;
            Ok(Prepared::new(&region, 0, move || Ok(ftruncate(&file, 0)?)))
        },
    },
];

/// Requests reclaim from a cgroup with only this process.
fn reclaimed() -> Result<Prepared, Unavailable> {
    if fs::read_to_string("/proc/swaps")?.lines().count() < 2 {
        return Err("there is no swap space".into());
    }
    let group = Group::join()?;
    if !group.path.join("memory.reclaim").exists() {
        return Err("it needs Linux 5.19 and the memory controller of cgroup v2".into());
    }
    let region = Region::anonymous(8 * PAGES)?;
    Ok(Prepared::new(&region.clone(), 0, move || {
        let file = group.path.join("memory.reclaim");
        until_moved(&region, 0, || match fs::write(&file, "4M") {
            // Not all of the memory could be reclaimed, which is no error.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            done => done,
        })
    }))
}

/// A cgroup with this process. The drop moves the process back and removes the cgroup.
struct Group {
    path: PathBuf,
    before: PathBuf,
}

impl Group {
    fn join() -> Result<Group, Unavailable> {
        let root = Path::new("/sys/fs/cgroup");
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .ok_or("there is no cgroup v2")?;
        let group = Group {
            path: root.join(format!("mmun-coverage-{}", std::process::id())),
            before: root.join(own),
        };
        fs::create_dir(&group.path)
            .map_err(|error| Unavailable(format!("a cgroup: {}", crate::reason(&error))))?;
        fs::write(group.path.join("cgroup.procs"), "0")?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // If this fails, the empty cgroup stays, which is harmless.
        let _ = fs::write(self.before.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.path);
    }
}

/// Uses memory of one node from a processor of another node, until the kernel moves the memory to
/// that other node.
fn balanced() -> Result<Prepared, Unavailable> {
    if !fs::read_to_string("/proc/sys/kernel/numa_balancing").is_ok_and(|mode| mode.trim() != "0") {
        return Err("it is off, or there is one node; 'echo 1 > /proc/sys/kernel/numa_balancing' turns it on".into());
    }
    let processor = |node: &i32| {
        let list =
            fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok()?;
        list.trim().split(['-', ',']).next()?.parse::<usize>().ok()
    };
    let processors: Vec<usize> = (0..64).filter_map(|node| processor(&node)).collect();
    let [first, second, ..] = processors[..] else {
        return Err("there is one node with a processor".into());
    };
    run_on(first)?;
    let region = Region::untouched(PAGES)?;
    region.advise(libc::MADV_NOHUGEPAGE)?;
    region.touch();
    Ok(Prepared::new(&region.clone(), 0, move || {
        run_on(second)?;
        until_moved(&region, 0, || {
            region.touch();
            Ok(())
        })
    }))
}

fn run_on(processor: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor);
    Ok(sched_setaffinity(None, &set)?)
}

/// Repeats `step` until the page's frame changes.
fn until_moved(
    region: &Region,
    page: usize,
    step: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let page = Page::open(pid, region.page(page), Judge::Frame).map_err(io::Error::other)?;
    until_changed(&page, step)
}

fn number(path: &str) -> Result<u64, Unavailable> {
    let text = fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| Unavailable(format!("{path} holds no number")))
}
