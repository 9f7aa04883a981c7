//! A library with the hook is loaded by `dlopen`, while the threads of the process are already
//! running.

use crate::child::alone;
use crate::programs::{Scratch, library};
use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Barrier, Mutex};
use std::{fs, thread};
use testkit::{Cap, require};

const THREADS: usize = 16;
/// More modules than the loader reserves entries for in a thread's table of thread-local blocks.
const MODULES: usize = 40;
const BLOCK: usize = 256 << 10;

fn open(path: &Path) -> *mut c_void {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no zero byte");
    // SAFETY: these are the test's own libraries, whose initialisers have no preconditions.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{}", path.display());
    handle
}

/// Loads libraries with thread-local storage. That makes every thread's table outdated: the next
/// look-up by the loader allocates a longer table.
fn load_others(folder: &Path, names: std::ops::Range<usize>) {
    let library = folder.join("others.so");
    for name in names {
        let copy = folder.join(format!("{name}.so"));
        fs::copy(&library, &copy).expect("a copy in the scratch folder");
        open(&copy);
    }
}

fn compile_other(folder: &Path) {
    let source = folder.join("others.c");
    fs::write(
        &source,
        "__thread char block[64]; char *find(void) { return block; }\n",
    )
    .expect("a file");
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", "-o"])
        .arg(folder.join("others.so"))
        .arg(source);
    assert!(compiler.status().expect("cc runs").success());
}

/// Makes the allocator return the top of the heap to the kernel, with its lock held.
fn trim() {
    // SAFETY: `malloc` has no preconditions.
    let block = unsafe { libc::malloc(BLOCK) };
    assert!(!block.is_null());
    // SAFETY: this function owns the block.
    unsafe { libc::free(block) };
}

#[test]
fn a_threads_first_bracket_is_inside_the_allocator() {
    if !require(Cap::Program("cc")) {
        return;
    }
    alone(
        "late::a_threads_first_bracket_is_inside_the_allocator",
        || {
            let scratch = Scratch::new("late");
            compile_other(&scratch.0);
            // The library is optimised, because in debug builds `lockdep` uses thread-locals of the
            // standard library.
            let library = library(true);
            let report = scratch.0.join("report");
            // SAFETY: no other thread reads or changes the environment.
            unsafe { std::env::set_var("MMUN_PRELOAD_REPORT", &report) };
            for (option, value) in [
                (libc::M_MMAP_THRESHOLD, 1 << 30),
                (libc::M_TRIM_THRESHOLD, 0),
            ] {
                // SAFETY: sets an option.
                assert_eq!(unsafe { libc::mallopt(option, value) }, 1);
            }
            // SAFETY: sets a time limit, because the failure would be a hang.
            unsafe { libc::alarm(120) };
            let (started, loaded) = (Barrier::new(THREADS + 1), Barrier::new(THREADS + 1));
            let (alone, settled) = (Mutex::new(()), Barrier::new(THREADS));
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        trim();
                        started.wait();
                        loaded.wait();
                        // One thread at a time: a block of another thread above this one would
                        // prevent the trim.
                        let turn = alone.lock();
                        trim();
                        drop(turn);
                        settled.wait();
                        (0..100).for_each(|_| trim());
                    });
                }
                started.wait();
                load_others(&scratch.0, 0..MODULES);
                let handle = open(library);
                load_others(&scratch.0, MODULES..2 * MODULES);
                // SAFETY: the test calls no function of the library by name.
                assert_eq!(unsafe { libc::dlclose(handle) }, 0, "and it stays");
                loaded.wait();
            });
            // SAFETY: the child runs its exit handlers, and it has no other thread.
            let status = unsafe { libc::fork() };
            if status == 0 {
                // SAFETY: ends the child through its exit handlers, one of which writes the report.
                unsafe { libc::exit(0) };
            }
            // SAFETY: reaps the child. `waitpid` takes a null status pointer.
            unsafe { libc::waitpid(status, std::ptr::null_mut(), 0) };
            let report = fs::read_to_string(&report).expect("the library has reported");
            let brackets: usize = report
                .split(' ')
                .nth(1)
                .and_then(|count| count.parse().ok())
                .expect("a count");
            assert!(
                report.starts_with("brackets ") && brackets >= THREADS,
                "{report}"
            );
        },
    );
}

/// The functions that may call the loader's function for thread-locals: parts of the standard
/// library that run only during a panic, and the sources `kernel` and `uffd` with their threads and
/// vaults, which run outside of the hook's brackets. On other processors the look-up is not a call
/// of a named function.
#[cfg(target_arch = "x86_64")]
const MAY_LOOK_UP: &[&str] = &[
    "std[",
    "std::",
    "<std",
    "core::ops::function::",
    "mmu_source::kernel",
    "mmu_source::vault",
    "mmu_source::uffd",
    "mmu_source::thread",
];

#[cfg(target_arch = "x86_64")]
#[test]
fn nothing_on_the_way_of_a_bracket_is_looked_up_by_the_loader() {
    if !require(Cap::Program("objdump")) {
        return;
    }
    let mut objdump = Command::new("objdump");
    objdump
        .args(["-d", "--demangle", "--no-show-raw-insn"])
        .arg(library(true));
    let output = objdump.output().expect("objdump runs");
    let code = String::from_utf8_lossy(&output.stdout);
    let (mut function, mut callers) = ("", Vec::new());
    for line in code.lines() {
        if let Some(name) = line
            .strip_suffix(">:")
            .and_then(|line| line.split_once(" <"))
        {
            function = name.1;
        } else if line.contains("__tls_get_addr") {
            callers.push(function);
        }
    }
    assert!(
        code.contains("fs:(") || code.contains("%fs:"),
        "it was disassembled"
    );
    let is_allowed = |name: &&str| {
        name.contains("tls_get_addr") || MAY_LOOK_UP.iter().any(|start| name.starts_with(start))
    };
    callers.retain(|name| !is_allowed(name));
    assert_eq!(callers, [""; 0]);
}
