//! Measures how much the cache saves, for this crate's `README.md`. Counts are asserted. Times are
//! only printed, because under emulation only their ratios are meaningful.
//!
//! # Safety
//! The parent traces its only child. Its ptrace requests get integers, and pointers to local
//! variables with their lengths.
#![expect(unsafe_code, reason = "counts the system calls of a child")]

use crate::endpoint::open;
use crate::memory::{Lab, PAGE, Source, advise, child, is_child, map, poke, range};
use mmu_source::kernel::Kernel;
use regcache::{Options, Registrar};
use regcache_rdma::{Access, OnDemand, Region};
use std::hint::black_box;
use std::ptr::{null_mut, without_provenance_mut};
use std::time::{Duration, Instant};
use testkit::{Cap, require};

const REQUESTS: usize = 1000;
const BUFFERS: usize = 16;
/// The maximum number of rounds. The test repeats a round if the kernel itself changed memory
/// during the round, which happens to about one round in some hundred.
const ROUNDS: usize = 100;
const ACCESS: Access = Access::LocalWrite.or(Access::RemoteRead);

/// Separates the parts of a child's run with a system call that no other code makes.
fn mark() {
    // SAFETY: the system call takes an integer and has no effect.
    unsafe { libc::syscall(libc::SYS_getsid, 0) };
}

/// Leases the buffers in turn. Every request is a hit if the buffers are registered already.
fn hits(lab: &Lab, buffers: &[usize], pages: usize) {
    for number in 0..REQUESTS {
        let lease = lab
            .cache
            .get(range(buffers[number % BUFFERS], pages))
            .unwrap();
        black_box(lease.handle().rkey());
    }
}

/// Makes the same requests without a cache: each request registers and deregisters its buffer.
fn registrations(lab: &Lab, buffers: &[usize], pages: usize) {
    let registrar = lab.device.registrar();
    for number in 0..REQUESTS {
        let region = registrar.register(range(buffers[number % BUFFERS], pages));
        registrar.deregister(
            region
                .inspect(|region| _ = black_box(Region::rkey(region)))
                .unwrap(),
        );
    }
}

/// Runs `act` in a traced child. Returns the number of system calls before the first mark, between
/// each two marks, and after the last mark.
fn calls_between_marks(act: impl FnOnce()) -> Vec<u64> {
    // SAFETY: this process has one thread besides libtest's, which only waits.
    let child = unsafe { libc::fork() };
    assert_ne!(child, -1);
    if child == 0 {
        // SAFETY: this request takes no argument.
        unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, null_mut::<()>(), null_mut::<()>()) };
        // SAFETY: the call takes an integer. The parent continues this process.
        unsafe { libc::raise(libc::SIGSTOP) };
        let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).is_ok();
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!passed)) };
    }
    let none = null_mut::<libc::c_void>();
    let mut counts = vec![0];
    let mut status = 0;
    // SAFETY: the call writes to an integer, which is a local variable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    let options = without_provenance_mut::<libc::c_void>(
        (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as usize,
    );
    // SAFETY: this request takes integers.
    let asked = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, child, none, options) };
    assert_eq!(asked, 0);
    let mut signal = 0_i32;
    loop {
        let handed = without_provenance_mut::<libc::c_void>(signal as usize);
        // SAFETY: this request takes integers.
        let continued = unsafe { libc::ptrace(libc::PTRACE_SYSCALL, child, none, handed) };
        assert_eq!(continued, 0);
        // SAFETY: the call writes to an integer, which is a local variable.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0);
            return counts;
        }
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
        signal = match libc::WSTOPSIG(status) {
            stop if stop == libc::SIGTRAP | 0x80 => 0,
            other => {
                signal = other;
                continue;
            }
        };
        // SAFETY: the struct consists of integers, for which zeroes are valid.
        let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
        let size = without_provenance_mut::<libc::c_void>(size_of_val(&info));
        // SAFETY: the request writes at most `size` bytes, which is the size of `info`.
        let got =
            unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, child, size, &raw mut info) };
        assert!(got > 0);
        if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
            // SAFETY: at the entry of a system call, the kernel fills in the field `entry`.
            let number = unsafe { info.u.entry.nr };
            if number == libc::SYS_getsid as u64 {
                counts.push(0);
            } else {
                *counts.last_mut().expect("there is one") += 1;
            }
        }
    }
}

fn buffers(pages: usize) -> Vec<usize> {
    (0..BUFFERS).map(|_| map(pages)).collect()
}

#[test]
fn a_thousand_requests_are_sixteen_registrations_and_no_system_call() {
    if !require(Cap::Rdma) || !require(Cap::Kvm) || !require(Cap::Bpf) {
        return;
    }
    if !is_child() {
        let test = "figures::a_thousand_requests_are_sixteen_registrations_and_no_system_call";
        assert!(child(test).status().unwrap().success());
        return;
    }
    let pages = 16;
    let counts = calls_between_marks(|| {
        let lab = Lab::new(Source::Kernel).unwrap();
        let kernel = Kernel::start().unwrap();
        let buffers = buffers(pages);
        hits(&lab, &buffers, pages);
        let stats = lab.cache.stats();
        let again = stats.registered - BUFFERS as u64;
        assert!(again <= stats.invalidated + stats.collisions, "{stats}");
        // Meanwhile the kernel may move a page of this process to another node or into a huge page.
        // A round with such a change does not count.
        let is_quiet = || {
            let generation = kernel.generation();
            hits(&lab, &buffers, pages);
            let registered = lab.cache.stats().registered;
            mark();
            hits(&lab, &buffers, pages);
            mark();
            let is_quiet = kernel.generation() == generation;
            if is_quiet {
                assert_eq!(lab.cache.stats().registered, registered);
            }
            is_quiet
        };
        assert!(
            (0..ROUNDS).any(|_| is_quiet()),
            "the kernel moves pages all the time"
        );
        mark();
        registrations(&lab, &buffers, pages);
        mark();
    });
    let [.., of_cache, _, of_verbs, _] = counts[..] else {
        panic!("{counts:?}");
    };
    println!(
        "| {REQUESTS} requests | registrations | system calls |\n| --- | --- | --- |\n\
         | through the cache | {BUFFERS}, then none | {of_cache} |\n\
         | `ibv_reg_mr` each time | {REQUESTS} | {of_verbs} |"
    );
    assert_eq!(of_cache, 0, "{counts:?}");
    assert!(of_verbs >= 2 * REQUESTS as u64, "{counts:?}");
}

/// Returns the time of the fastest of nine runs, in microseconds.
fn best(run: impl FnMut() -> Duration) -> f64 {
    let times = std::iter::repeat_with(run).take(9);
    times.min().expect("there are nine").as_secs_f64() * 1e6
}

fn timed(act: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    act();
    begin.elapsed()
}

#[test]
fn how_long_hits_registrations_and_reads_take() {
    let Some(lab) = Lab::new(Source::Kernel) else {
        return;
    };
    let kernel = Kernel::start().unwrap();
    println!(
        "| region | hit | `ibv_reg_mr` each time | of it | changes meanwhile |\n\
         | --- | --- | --- | --- | --- |"
    );
    for kibibytes in [4, 64, 1024] {
        let pages = kibibytes * 1024 / PAGE;
        let buffers = buffers(pages);
        let each = 1.0 / REQUESTS as f64;
        let generation = kernel.generation();
        let hit = best(|| timed(|| hits(&lab, &buffers, pages))) * each;
        let changes = kernel.generation() - generation;
        let registrar = lab.device.registrar();
        let registered = best(|| {
            timed(|| {
                for buffer in &buffers {
                    registrar.deregister(registrar.register(range(*buffer, pages)).unwrap());
                }
            })
        }) / BUFFERS as f64;
        println!(
            "| {kibibytes} KiB | {hit:.2} us | {registered:.1} us | 1/{:.0} | {changes} |",
            registered / hit
        );
    }
    drop(lab);
    if OnDemand::of(&open().unwrap()).unwrap().is_none() {
        println!("the device has no on-demand paging (rxe has it from Linux 6.18 on)");
        return;
    }
    println!("| READ of a byte of 64 KiB | same pages | pages that are new |\n| --- | --- | --- |");
    for (name, source, access) in [
        ("the cache, source `kernel`", Source::Kernel, ACCESS),
        (
            "on-demand paging",
            Source::Nothing,
            ACCESS | Access::OnDemand,
        ),
    ] {
        let mut lab = Lab::with(source, access, Options::new()).unwrap();
        let (address, pages) = (map(16), 16);
        let mut value = 0_u8;
        let mut read = |is_changed: bool| {
            best(|| {
                if is_changed {
                    advise(address, pages, libc::MADV_DONTNEED);
                }
                value = value.wrapping_add(1);
                poke(address, value);
                timed(|| assert_eq!(lab.first_byte(address, pages).unwrap(), value))
            })
        };
        read(true);
        let (same, new) = (read(false), read(true));
        println!("| {name} | {same:.0} us | {new:.0} us |");
    }
}
