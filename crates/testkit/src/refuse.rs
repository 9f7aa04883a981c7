//! Filters that make the kernel refuse system calls.

use libc::sock_filter;

/// Makes the system calls with these numbers fail with `errno`, in this thread and in the threads
/// and processes that it starts from now on.
///
/// # Panics
/// If the kernel does not accept the filter.
pub fn refuse_calls(numbers: &[i64], errno: i32) {
    let mut program = vec![LOAD_NUMBER];
    for number in numbers {
        program.extend([skip_unless(*number, 1), refuse(errno)]);
    }
    program.push(ALLOW);
    install(program);
}

/// Makes each system call that would start a thread fail with `EAGAIN`, as at the limits
/// `RLIMIT_NPROC` and `pids.max`. Forks are allowed. The filter applies as that of
/// [`refuse_calls`].
///
/// # Panics
/// If the kernel does not accept the filter.
pub fn refuse_threads() {
    install(vec![
        LOAD_NUMBER,
        // A filter cannot read the flags of `clone3`, which are in memory. After `ENOSYS`, libc
        // calls `clone`, whose flags are in a register.
        skip_unless(libc::SYS_clone3, 1),
        refuse(libc::ENOSYS),
        skip_unless(libc::SYS_clone, 3),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 16, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K,
            libc::CLONE_THREAD as u32,
            1,
        ),
        refuse(libc::EAGAIN),
        ALLOW,
    ]);
}

const LOAD_NUMBER: sock_filter = statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0);
const ALLOW: sock_filter = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0);

/// Makes a statement of a filter. If it is a jump, and its condition is false, it skips `jf`
/// statements.
const fn statement(code: u32, k: u32, jf: u8) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    }
}

const fn skip_unless(number: i64, count: u8) -> sock_filter {
    let is_it = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    statement(is_it, number as u32, count)
}

const fn refuse(errno: i32) -> sock_filter {
    let answer = libc::SECCOMP_RET_ERRNO | errno as u32;
    statement(libc::BPF_RET | libc::BPF_K, answer, 0)
}

fn install(mut program: Vec<sock_filter>) {
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: The call takes integers.
    let allowed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(allowed, 0);
    // SAFETY: The call reads a `struct sock_fprog` and its program of `len` statements. Both are
    // variables of this function.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}
