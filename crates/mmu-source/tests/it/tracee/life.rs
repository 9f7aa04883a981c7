//! Tasks that fork, clone, exec, stop and die.

use std::env;
use std::io::{BufRead, stdin};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;

use libc::{PROT_READ, PROT_WRITE};

use crate::machine::FORK;
use crate::sys::{self, call, map, munmap, page_size, touch};

const RW: i32 = PROT_READ | PROT_WRITE;

/// Forks by each call that can. Each child unmaps a page of its copy.
pub(crate) fn fork_once() {
    let arena = map(4 * page_size(), RW);
    let fixed = map(2 * page_size(), PROT_READ);
    touch(arena, 4 * page_size());
    println!("arena {arena:#x} {:#x}", arena + 4 * page_size());
    println!("read-only {fixed:#x} {:#x}", fixed + 2 * page_size());
    let signal = libc::SIGCHLD as u64;
    let made = |name: &str, child: u64| {
        if child == 0 {
            call(
                libc::SYS_exit_group,
                &[munmap(arena + page_size(), page_size()) as u64],
            );
        }
        println!("child {child} {} {name}", sys::wait(child as i32, 0));
    };
    #[cfg(target_arch = "x86_64")]
    made("fork", call(libc::SYS_fork, &[]) as u64);
    made("clone", call(libc::SYS_clone, &[signal, 0, 0, 0, 0]) as u64);
    // The kernel reports this call as a `vfork`.
    made(
        "clone",
        call(
            libc::SYS_clone,
            &[signal | libc::CLONE_VFORK as u64, 0, 0, 0, 0],
        ) as u64,
    );
    // Flags, three addresses, the signal, and three words for a stack and thread-local storage.
    let args = [0, 0, 0, 0, signal, 0, 0, 0];
    made(
        "clone3",
        call(
            libc::SYS_clone3,
            &[sys::address(&args), size_of_val(&args) as u64],
        ) as u64,
    );
}

/// Many processes that fork at the same time. Every grandchild unmaps memory.
pub(crate) fn storm(processes: u64) {
    let (read, write) = gate();
    let arena = map(4 * page_size(), RW);
    touch(arena, 4 * page_size());
    let in_child = || {
        call(libc::SYS_close, &[write]);
        // The read returns when the parent opens the gate for all.
        let mut byte = 0_u8;
        call(libc::SYS_read, &[read, sys::address_mut(&mut byte), 1]);
        let grandchild = sys::fork(|| munmap(arena, page_size()) as i32);
        sys::wait(grandchild, 0) | munmap(arena + page_size(), page_size()) as i32
    };
    let children: Vec<i32> = (0..processes).map(|_| sys::fork(in_child)).collect();
    call(libc::SYS_close, &[write]);
    let failed = children
        .into_iter()
        .filter(|child| sys::wait(*child, 0) != 0)
        .count();
    println!("failed {failed}");
}

/// Threads that all map and unmap, each a known number of times.
pub(crate) fn threads(count: u64, rounds: u64) {
    let barrier = Barrier::new(count as usize);
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                barrier.wait();
                for _ in 0..rounds {
                    // Longer than the signal stack that Rust unmaps at the end of a thread, whose
                    // size depends on the kernel.
                    let at = map(37 * page_size(), RW);
                    touch(at, 37 * page_size());
                    assert_eq!(munmap(at, 37 * page_size()), 0);
                }
            });
        }
    });
}

/// Replaces itself by another program.
pub(crate) fn exec() {
    println!("{}", itself(&["exit", "7"]).exec());
}

/// A thread that is not the leader replaces the process by another program, while further threads
/// wait.
pub(crate) fn thread_exec() {
    let (running, all) = mpsc::channel();
    for _ in 0..3 {
        let running = running.clone();
        thread::spawn(move || {
            running.send(()).expect("the leader waits");
            loop {
                thread::park();
            }
        });
    }
    for _ in 0..3 {
        all.recv().expect("three threads run");
    }
    let failed = thread::spawn(|| itself(&["exit", "8"]).exec()).join();
    println!("{failed:?}");
}

/// Starts another program as most programs do: by a child that shares the memory until it runs
/// `execve`.
pub(crate) fn spawn() {
    let status = itself(&["exit", "9"]).status().expect("it starts itself");
    println!("{status}");
}

fn itself(args: &[&str]) -> Command {
    let mut command = Command::new(env::current_exe().expect("the program has a path"));
    command.args(args);
    command
}

/// Pages out memory of a child, and asks the kernel to release all of the child's memory. The
/// kernel refuses that while the child lives.
pub(crate) fn calls_on_a_child() {
    let arena = map(4 * page_size(), RW);
    touch(arena, 4 * page_size());
    let (read, write) = gate();
    let child = sys::fork(|| {
        call(libc::SYS_close, &[write]);
        let mut byte = 0_u8;
        call(libc::SYS_read, &[read, sys::address_mut(&mut byte), 1]) as i32
    });
    let pidfd = call(libc::SYS_pidfd_open, &[child as u64, 0]) as u64;
    let vector = [arena, 2 * page_size()];
    let result = call(
        libc::SYS_process_madvise,
        &[
            pidfd,
            sys::address(&vector),
            1,
            libc::MADV_PAGEOUT as u64,
            0,
        ],
    );
    println!("child {child}");
    println!("range {arena:#x} {:#x} {result}", arena + 2 * page_size());
    println!("released {}", call(libc::SYS_process_mrelease, &[pidfd, 0]));
    call(libc::SYS_close, &[write]);
    assert_eq!(sys::wait(child, 0), 0);
}

/// A child stops itself. The parent sees that, continues the child and sees it end.
pub(crate) fn job_control() {
    let (read, write) = gate();
    let child = sys::fork(|| {
        call(libc::SYS_close, &[write]);
        let pid = call(libc::SYS_getpid, &[]) as u64;
        call(libc::SYS_kill, &[pid, libc::SIGSTOP as u64]);
        let at = map(page_size(), RW);
        // The child must not end before the parent has seen it continue.
        let mut byte = 0_u8;
        call(libc::SYS_read, &[read, sys::address_mut(&mut byte), 1]);
        munmap(at, page_size()) as i32 + 5
    });
    let status = sys::wait(child, libc::WUNTRACED);
    println!(
        "stopped {} by {}",
        libc::WIFSTOPPED(status),
        libc::WSTOPSIG(status)
    );
    call(libc::SYS_kill, &[child as u64, libc::SIGCONT as u64]);
    let status = sys::wait(child, libc::WCONTINUED);
    println!("continued {}", libc::WIFCONTINUED(status));
    call(libc::SYS_close, &[write]);
    let status = sys::wait(child, 0);
    println!("exited {}", libc::WEXITSTATUS(status));
}

/// A pipe that children block on until every writer has closed it.
fn gate() -> (u64, u64) {
    let mut fds = [0_i32; 2];
    assert_eq!(call(libc::SYS_pipe2, &[sys::address_mut(&mut fds), 0]), 0);
    (fds[0] as u64, fds[1] as u64)
}

static SIGNALS: AtomicI32 = AtomicI32::new(0);

extern "C" fn count(signal: i32) {
    SIGNALS.fetch_add(signal, Ordering::Relaxed);
}

/// Sends itself a real-time signal many times, and unmaps memory in between.
///
/// Run as root, it first becomes a user of its own, because the kernel counts the queued signals of
/// all processes of a user.
pub(crate) fn real_time_signals(times: u64) {
    let signal = libc::SIGRTMIN() + 5;
    let handler: extern "C" fn(i32) = count;
    // SAFETY: the handler adds to an atomic and does nothing else.
    unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    let pid = u64::from(std::process::id());
    let user = 0x5000_0000 + pid;
    call(libc::SYS_setresuid, &[user; 3]);
    for _ in 0..times {
        let at = map(page_size(), RW);
        if call(libc::SYS_tgkill, &[pid, pid, signal as u64]) == -i64::from(libc::EAGAIN) {
            println!("no more signals can be queued for this user");
            return;
        }
        munmap(at, page_size());
    }
    println!("{}", SIGNALS.load(Ordering::Relaxed) / signal);
}

/// Asks to be traced although it is traced already, and lets a child ask too. Also asks to trace a
/// process that does not exist.
pub(crate) fn traceme() {
    println!(
        "self {}",
        call(
            libc::SYS_ptrace,
            &[u64::from(libc::PTRACE_TRACEME), 0, 0, 0]
        )
    );
    let child = sys::fork(|| {
        call(
            libc::SYS_ptrace,
            &[u64::from(libc::PTRACE_TRACEME), 0, 0, 0],
        ) as i32
            & 0x7f
    });
    println!("child {}", libc::WEXITSTATUS(sys::wait(child, 0)));
    let seized = call(
        libc::SYS_ptrace,
        &[u64::from(libc::PTRACE_SEIZE), 1 << 30, 0, 0],
    );
    println!("nobody {seized}");
}

/// Follows orders line by line. On `go`, every thread unmaps a page. On `fork`, a child does so. On
/// `exec`, a new thread runs another program. `quit` ends the process.
pub(crate) fn serve(threads: u64) {
    let (done, results) = mpsc::channel();
    let workers: Vec<mpsc::Sender<()>> = (0..threads)
        .map(|_| {
            let (go, told) = mpsc::channel();
            let done = done.clone();
            thread::spawn(move || {
                while let Ok(()) = told.recv() {
                    let at = map(page_size(), RW);
                    touch(at, page_size());
                    done.send((at, munmap(at, page_size())))
                        .expect("the leader waits");
                }
            });
            go
        })
        .collect();
    println!("ready");
    for line in stdin().lock().lines() {
        match line.expect("a line").as_str() {
            "go" => {
                for worker in &workers {
                    worker.send(()).expect("the worker waits");
                }
                let ranges: Vec<(u64, i64)> = workers
                    .iter()
                    .map(|_| results.recv().expect("a result"))
                    .collect();
                let failed = ranges.iter().filter(|(_, result)| *result != 0).count();
                let list: Vec<String> = ranges.iter().map(|(at, _)| format!("{at:#x}")).collect();
                println!("did {failed} {}", list.join(" "));
            }
            "fork" => {
                let at = map(page_size(), RW);
                let child = sys::fork(|| munmap(at, page_size()) as i32);
                println!("forked {}", sys::wait(child, 0));
            }
            "exec" => drop(thread::spawn(|| itself(&["exit", "8"]).exec()).join()),
            _ => return,
        }
    }
}

/// Threads that fork as fast as they can, in a process that kills itself meanwhile.
pub(crate) fn forks_and_dies(forks: u64) {
    static FORKED: AtomicI32 = AtomicI32::new(0);
    for _ in 0..4 {
        thread::spawn(|| {
            loop {
                // The child makes one system call and ends.
                let pid = call(FORK, &[libc::SIGCHLD as u64, 0, 0, 0, 0]);
                if pid == 0 {
                    call(libc::SYS_exit_group, &[0]);
                }
                FORKED.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while (FORKED.load(Ordering::Relaxed) as u64) < forks {
        thread::yield_now();
    }
    call(
        libc::SYS_kill,
        &[u64::from(std::process::id()), libc::SIGKILL as u64],
    );
}

/// Children that make threads as fast as they can. Each child is killed while it does so.
pub(crate) fn killed_cloning(children: u64) {
    let made = sys::mmap(0, page_size(), RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: the mapping is never unmapped, is zeroed and page-aligned, and is only used as this
    // atomic.
    let made = unsafe { AtomicI32::from_ptr(std::ptr::with_exposed_provenance_mut(made as usize)) };
    for number in 0..children as i32 {
        made.store(0, Ordering::Relaxed);
        let child = sys::fork(|| {
            loop {
                let _ = thread::Builder::new()
                    .stack_size(1 << 16)
                    .spawn(thread::park);
                made.fetch_add(1, Ordering::Relaxed);
            }
        });
        while made.load(Ordering::Relaxed) < 1 + number % 8 {
            thread::yield_now();
        }
        call(libc::SYS_kill, &[child as u64, libc::SIGKILL as u64]);
        sys::wait(child, 0);
    }
}

/// Threads that fork until standard input ends.
pub(crate) fn fork_loop(threads: u64) {
    for _ in 0..threads {
        thread::spawn(|| {
            loop {
                let child = sys::fork(|| 0);
                assert_eq!(sys::wait(child, 0), 0, "a child lives on and ends");
            }
        });
    }
    println!("ready");
    stdin().lock().lines().for_each(drop);
}

/// Dies of an access to unmapped memory.
pub(crate) fn segfault() {
    // SAFETY: none. The kernel ends the program here, which is the purpose.
    unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
}
