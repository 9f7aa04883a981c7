//! A kernel that refuses system calls.

use libc::sock_filter;

/// Has the kernel answer these system calls of this thread, and of the threads and processes that
/// it starts from now on, with the error `errno`.
///
/// # Panics
/// If the kernel takes no filter.
pub fn refuse_calls(numbers: &[i64], errno: i32) {
    let mut program = vec![LOAD_NUMBER];
    for number in numbers {
        program.extend([skip_unless(*number, 1), refuse(errno)]);
    }
    program.push(ALLOW);
    install(program);
}

/// As [`refuse_calls`], with `EAGAIN` for each call that would start a thread of the same process:
/// a machine with `RLIMIT_NPROC` or the `pids.max` of a control group reached. Forks are allowed.
///
/// # Panics
/// If the kernel takes no filter.
pub fn refuse_threads() {
    install(vec![
        LOAD_NUMBER,
        // libc takes `clone` instead, whose flags are in a register.
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

/// A jump skips `jf` statements if its condition is false.
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
    // SAFETY: It takes integers.
    let allowed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(allowed, 0);
    // SAFETY: It needs a valid program of that length, which outlives the call.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}
