//! A kernel that refuses system calls.

/// Has the kernel answer these system calls of this thread, and of the threads and processes that
/// it starts from now on, with the error `errno`.
///
/// # Panics
/// If the kernel takes no filter.
pub fn refuse_calls(numbers: &[i64], errno: i32) {
    let statement = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for number in numbers {
        let is_it = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let refuse = libc::SECCOMP_RET_ERRNO | errno as u32;
        program.extend([
            statement(is_it, *number as u32, 1),
            statement(libc::BPF_RET | libc::BPF_K, refuse, 0),
        ]);
    }
    program.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ALLOW,
        0,
    ));
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
