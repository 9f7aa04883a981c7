//! Does the source `kernel` meet its bars? Some bars compare it with an idle virtual machine.
//!
//! `cargo run --release -p bench --bin kernel [ROUNDS [PART]]`, where PART is `fill`, `crowd`,
//! `watch`, `on`, `start` or `flood`. Run it as root: `start` and `flood` start processes of
//! another user.
#![allow(missing_docs, reason = "a bench")]

#[path = "../../../stress/src/kernel/slow.rs"]
mod slow;

use mmu_notifier::{Va, VaRange};
use mmu_source::kernel::{Kernel, broker};
use regcache::{Counting, Device, Options};
use slow::Slow;
use std::ffi::c_void;
use std::hint::black_box;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

fn map(bytes: usize) -> *mut c_void {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let at = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at
}

fn unmap(at: *mut c_void) {
    // SAFETY: the page comes from `map`, and no code uses it any more.
    unsafe { libc::munmap(at, PAGE) };
}

fn touch(at: *mut c_void) {
    // SAFETY: the page comes from `map`, so it is writable, and no reference points to it.
    unsafe { at.cast::<u8>().write_volatile(1) };
}

fn discard(at: *mut c_void) {
    // SAFETY: the page comes from `map`, and no code reads its content.
    assert_eq!(unsafe { libc::madvise(at, PAGE, libc::MADV_DONTNEED) }, 0);
}

fn change() {
    let at = map(PAGE);
    touch(at);
    unmap(at);
}

fn range(at: *mut c_void, bytes: usize) -> VaRange {
    VaRange::covering(Va::new(at.addr() as u64), bytes as u64).expect("a range")
}

fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(0x5000_0000_0000 + number * 0x13_000), 1).expect("a page")
}

fn timed(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_nanos() as f64
}

/// Returns the quantile of `rank` in 1,000.
fn of_1000(values: &mut [f64], rank: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * rank / 1000).min(values.len() - 1)]
}

fn median(values: &[f64]) -> f64 {
    of_1000(&mut values.to_vec(), 500)
}

fn row(name: &str, unit: &str, values: &mut [f64], bar: &str) {
    let [half, most, worst] = [500, 990, 1000].map(|rank| of_1000(values, rank));
    println!("{name:<52} p50 {half:>8.2}  p99 {most:>8.2}  worst {worst:>9.2} {unit:<3} {bar}");
}

fn fills(rounds: usize) {
    let kernel = Kernel::start().expect("KVM and BPF");
    let own = map(PAGE);
    let armed = kernel.arm(range(own, PAGE)).expect("armed");
    let change_own = || {
        touch(own);
        discard(own);
    };
    let begin = |change: &dyn Fn()| -> Vec<f64> {
        let once = |_| {
            change();
            timed(|| _ = armed.read_begin().expect("a count")) / 1000.0
        };
        (0..rounds * 2_000).map(once).collect()
    };
    row(
        "read_begin() after a change of the range",
        "us",
        &mut begin(&change_own),
        "p50 <= 6",
    );
    row(
        "read_begin() after a change elsewhere",
        "us",
        &mut begin(&change),
        "p50 <= 6",
    );
    let device = Device::new(
        Counting::default(),
        Options::new().kernel(Arc::clone(&kernel)),
    );
    let cache = device
        .open(&mmu_source::current())
        .expect("outside of brackets");
    let mut missed: Vec<f64> = (0..rounds as u64 * 2_000)
        .map(|number| {
            change();
            let wanted = page(1 + number % 60_000);
            let taken = timed(|| drop(cache.get(wanted).expect("a place"))) / 1000.0;
            if number % 60_000 == 59_999 {
                cache.flush();
            }
            taken
        })
        .collect();
    row(
        "regcache: a miss after a foreign munmap",
        "us",
        &mut missed,
        "p50 <= 4, p99 <= 500",
    );
    let uevents = Uevents::listen();
    let before = kernel.waits();
    for _ in 0..1000 {
        change_own();
        _ = armed.read_begin().expect("a count");
    }
    let after = kernel.waits();
    println!(
        "1,000 fills: {} waits, {} machines, {} uevents; <= 10",
        after.0 - before.0,
        after.1 - before.1,
        uevents.map_or_else(|| "?".to_owned(), |uevents| uevents.count().to_string()),
    );
}

/// A socket for the kernel's messages about devices. The kernel sends two messages for each virtual
/// machine.
struct Uevents(OwnedFd);

impl Uevents {
    fn listen() -> Option<Self> {
        const NETLINK_KOBJECT_UEVENT: i32 = 15;
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the call takes integers, and returns a descriptor or -1.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, NETLINK_KOBJECT_UEVENT) };
        if socket < 0 {
            return None;
        }
        // SAFETY: the struct consists of integers, for which zeroes are valid.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        (address.nl_family, address.nl_groups) = (libc::AF_NETLINK as u16, 1);
        let length = size_of_val(&address) as u32;
        // SAFETY: the descriptor is new and has no other owner.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: the address is a local variable of that length.
        unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        Some(Self(socket))
    }

    /// Returns the number of messages about virtual machines of this process.
    fn count(&self) -> usize {
        let own = format!("PID={}", std::process::id());
        let mut buffer = [0_u8; 8192];
        let mut messages = 0;
        std::thread::sleep(Duration::from_millis(300));
        loop {
            // SAFETY: the call writes to a local variable of that length.
            let got = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            let Ok(got) = usize::try_from(got) else {
                return messages;
            };
            messages += usize::from(
                buffer[..got]
                    .split(|byte| *byte == 0)
                    .any(|word| word == own.as_bytes()),
            );
        }
    }
}

/// 8 threads wait as fills do, while 8 other threads map and unmap. In the first run each range is
/// armed once, before the fills. In the second run the range is armed for each fill.
fn crowd(rounds: usize) {
    for rearm in [false, true] {
        let kernel = Kernel::start().expect("KVM and BPF");
        let (stop, fills) = (AtomicBool::new(false), AtomicU64::new(0));
        let worst = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (kernel, stop, fills, worst) = (&kernel, &stop, &fills, &worst);
                scope.spawn(move || {
                    let mut armed = kernel.arm(page(number)).expect("armed");
                    while !stop.load(Ordering::Relaxed) {
                        let taken = timed(|| {
                            if rearm {
                                armed = kernel.arm(page(number)).expect("a count");
                            }
                            _ = armed.read_begin().expect("a count");
                        });
                        worst.fetch_max(taken as u64, Ordering::Relaxed);
                        fills.fetch_add(1, Ordering::Relaxed);
                    }
                });
                scope.spawn(move || {
                    // One changing thread in four changes armed memory.
                    let own = map(PAGE);
                    let _armed =
                        (number % 4 == 0).then(|| kernel.arm(range(own, PAGE)).expect("armed"));
                    while !stop.load(Ordering::Relaxed) {
                        change();
                        touch(own);
                        discard(own);
                    }
                });
            }
            std::thread::sleep(Duration::from_secs(rounds as u64));
            stop.store(true, Ordering::Relaxed);
        });
        let (waits, machines) = kernel.waits();
        let (fills, worst) = (fills.into_inner(), worst.into_inner() / 1_000_000);
        println!(
            "8 fill{}, 8 map: {fills} fills, {waits} waits, {machines} machines, one in {:.0} waits; worst {worst} ms; >= 100, <= 300 ms",
            if rearm { " and arm" } else { "" },
            waits as f64 / machines.max(1) as f64
        );
    }
}

fn watches(rounds: usize) {
    let kernel = Kernel::start().expect("KVM and BPF");
    let memory = map(2 * PAGE);
    let other = memory.wrapping_byte_add(PAGE);
    let watch = kernel.watch(range(memory, PAGE)).expect("a watch");
    let armed = kernel.arm(range(other, PAGE)).expect("armed");
    const TIMES: u32 = 1_000_000;
    let mut quiet: Vec<f64> = (0..rounds)
        .map(|_| {
            timed(|| (0..TIMES).for_each(|_| _ = black_box(watch.is_valid()))) / f64::from(TIMES)
        })
        .collect();
    row("Watch check, nothing happened", "ns", &mut quiet, "<= 2");
    let clock = median(
        &(0..10_000)
            .map(|_| timed(|| _ = black_box(watch.is_valid())))
            .collect::<Vec<_>>(),
    );
    for events in [1, 16] {
        let mut after: Vec<f64> = (0..rounds * 500)
            .map(|_| {
                touch(other);
                (0..events).for_each(|_| discard(other));
                (timed(|| _ = black_box(watch.is_valid())) - clock) / f64::from(events)
            })
            .collect();
        row(
            &format!("Watch check after {events} events elsewhere, each"),
            "ns",
            &mut after,
            "<= 60",
        );
    }
    assert!(watch.is_valid());
    drop(armed);
    let munmap = |look: bool| {
        let at = map(PAGE);
        touch(at);
        let armed = look.then(|| kernel.arm(range(at, PAGE)).expect("armed"));
        let taken = timed(|| {
            unmap(at);
            if look {
                _ = black_box(kernel.settle().expect("no fork"));
            }
        });
        drop(armed);
        taken
    };
    let mut columns: [Vec<f64>; 2] = Default::default();
    for _ in 0..rounds * 500 {
        columns[0].push(munmap(false));
        columns[1].push(munmap(true));
    }
    let [bare, armed] = columns.map(|column| median(&column));
    println!(
        "munmap of an armed page and the look: {armed:.0} ns, not armed {bare:.0}, {:.0} more; <= 1000",
        armed - bare
    );
}

/// Measures six cases, interleaved: without the source, an idle machine, an idle machine with an
/// empty BPF program, the source with nothing armed, with 10 other ranges armed, and just after
/// arming.
fn on(rounds: usize) {
    const NAMES: [&str; 6] = [
        "bare",
        "bare machine",
        "and an empty program",
        "on, nothing armed",
        "on, 10 others armed",
        "on, 10 just armed",
    ];
    // A cycle is the best of several batches, which excludes the time of other programs.
    let piece = || timed(|| (0..500).for_each(|_| change())) / 500.0;
    let cycle = || (0..12).map(|_| piece()).fold(f64::MAX, f64::min);
    let pause = || std::thread::sleep(Duration::from_millis(100));
    let mut columns: [Vec<f64>; 6] = Default::default();
    for _ in 0..3 * rounds {
        pause();
        columns[0].push(cycle());
        let machine = Machine::make();
        pause();
        columns[1].push(cycle());
        let program = Slow::not_at_all().expect("the right to load BPF programs");
        pause();
        columns[2].push(cycle());
        drop((program, machine));
        pause();
        let kernel = Kernel::start().expect("KVM and BPF");
        pause();
        columns[3].push(cycle());
        let armed: Vec<_> = (0..10)
            .map(|number| kernel.arm(page(number)).expect("armed"))
            .collect();
        columns[5].push(piece());
        pause();
        columns[4].push(cycle());
        drop((armed, kernel));
    }
    let ratios = |column: usize, of: usize| {
        let ratios: Vec<f64> = columns[column]
            .iter()
            .zip(&columns[of])
            .map(|(one, bare)| one / bare)
            .collect();
        let spread = [100, 900].map(|rank| of_1000(&mut ratios.clone(), rank));
        (median(&ratios), spread)
    };
    for (number, name) in NAMES.iter().enumerate() {
        let (ratio, [low, high]) = ratios(number, 1);
        println!(
            "mmap, touch, munmap, {name:<24} {:>8.1} ns  {ratio:.3} of the bare machine, {low:.3}..{high:.3}, {:.3} of the empty program",
            median(&columns[number]),
            ratios(number, 2).0
        );
    }
    println!("  bars: 1.02 and 1.03 of the bare machine");
}

/// An idle virtual machine.
struct Machine(#[expect(dead_code, reason = "it is only kept open")] OwnedFd);

impl Machine {
    fn make() -> Self {
        const KVM_CREATE_VM: u64 = 0xae01;
        let kvm = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("/dev/kvm");
        // SAFETY: the call takes an integer, and returns a descriptor or -1.
        let machine = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0_usize) };
        assert!(machine >= 0);
        // SAFETY: the descriptor is new and has no other owner.
        Self(unsafe { OwnedFd::from_raw_fd(machine) })
    }
}

/// Times starts of the source, first with the rights of this process, and then as an ordinary user
/// through a broker.
fn starts(rounds: usize) {
    timed_starts(rounds, "start()");
    let socket = std::env::temp_dir().join(format!("mmun-bench-{}", std::process::id()));
    let options = broker::Options {
        group: Some("nogroup".to_owned()),
        max_clients: 8,
    };
    let served = match broker::Broker::bind(&socket, &options) {
        Ok(served) => served,
        Err(error) => return println!("SKIP start() through a broker: {error}"),
    };
    std::thread::spawn(move || served.serve(|_| ()));
    let own = std::env::current_exe().expect("this program");
    let mut client = std::process::Command::new(own);
    client
        .args([&rounds.to_string(), "client"])
        .env(broker::VARIABLE, &socket)
        .uid(65534)
        .gid(65534);
    if !client.status().is_ok_and(|status| status.success()) {
        println!("SKIP start() through a broker: the client failed");
    }
    let _ = std::fs::remove_file(socket);
}

fn timed_starts(rounds: usize, label: &str) {
    let mut taken = Vec::new();
    for _ in 0..rounds * 5 {
        let mut kernel = None;
        taken.push(timed(|| kernel = Some(Kernel::start().expect("KVM and BPF"))) / 1e6);
        drop(kernel);
        // If the program were attached again at once, the kernel would wait for a grace period of
        // the tracepoint.
        std::thread::sleep(Duration::from_millis(150));
    }
    row(label, "ms", &mut taken, "p50 <= 5");
}

/// Measures hits per second in three cases: alone, while a process of another user discards 20 TiB
/// in a loop, and while that process does so and has a virtual machine.
fn flood(rounds: usize) {
    const REGIONS: u64 = 1000;
    let kernel = Kernel::start().expect("KVM and BPF");
    let device = Device::new(
        Counting::default(),
        Options::new().kernel(Arc::clone(&kernel)),
    );
    let cache = device
        .open(&mmu_source::current())
        .expect("outside of brackets");
    let hits = || {
        let (end, mut hits) = (Instant::now() + Duration::from_millis(700), 0_u64);
        while Instant::now() < end {
            for number in 0..REGIONS {
                drop(black_box(cache.get(page(number)).expect("a place")));
            }
            hits += REGIONS;
        }
        hits as f64 / 0.7e6
    };
    let mut columns: [Vec<f64>; 3] = Default::default();
    hits();
    for _ in 0..rounds {
        for (column, kind) in columns
            .iter_mut()
            .zip([None, Some("idle"), Some("machine")])
        {
            let attacker = kind.map(|kind| {
                let own = std::env::current_exe().expect("this program");
                std::process::Command::new(own)
                    .args(["0", "attack", kind])
                    .spawn()
                    .expect("this program")
            });
            std::thread::sleep(Duration::from_millis(if kind.is_some() { 300 } else { 50 }));
            column.push(hits());
            if let Some(mut attacker) = attacker {
                attacker
                    .kill()
                    .and_then(|()| attacker.wait())
                    .expect("it runs");
            }
        }
    }
    let [alone, idle, flooded] = &columns;
    let ratio = |of: &Vec<f64>| {
        median(
            &flooded
                .iter()
                .zip(of)
                .map(|(one, other)| one / other)
                .collect::<Vec<_>>(),
        )
    };
    println!(
        "hits: {:.1} M/s alone, {:.1} beside the same process without a machine, {:.1} under flood: {:.3} and {:.3}; >= 0.9; {kernel:?}",
        median(alone),
        median(idle),
        median(flooded),
        ratio(alone),
        ratio(idle)
    );
}

fn attack(with_machine: bool) {
    const LENGTH: usize = 20 << 40;
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("/dev/kvm");
    // SAFETY: the call takes integers.
    unsafe { libc::setresuid(65534, 65534, 65534) };
    // SAFETY: the call takes an integer. The new descriptor stays open until the process ends.
    assert!(!with_machine || unsafe { libc::ioctl(kvm.as_raw_fd(), 0xae01, 0_usize) } >= 0);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let at = unsafe { libc::mmap(ptr::null_mut(), LENGTH, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    loop {
        // SAFETY: the mapping has no access rights, so no code uses its content.
        unsafe { libc::madvise(at, LENGTH, libc::MADV_DONTNEED) };
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments
        .next()
        .map_or(5, |rounds| rounds.parse().expect("a number of rounds"));
    let part = arguments.next();
    if part.as_deref() == Some("attack") {
        return attack(arguments.next().as_deref() == Some("machine"));
    }
    if part.as_deref() == Some("client") {
        return timed_starts(rounds, "start() through a broker");
    }
    if let Err(error) = Kernel::start() {
        return println!("SKIP kernel: {error}");
    }
    type Part = (&'static str, fn(usize));
    let parts: [Part; 6] = [
        ("fill", fills),
        ("crowd", crowd),
        ("watch", watches),
        ("on", on),
        ("start", starts),
        ("flood", flood),
    ];
    for (name, run) in parts {
        if part.as_ref().is_none_or(|part| part == name) {
            run(rounds);
        }
    }
}
