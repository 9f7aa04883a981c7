//! Names of errors and signals, for messages.

/// The usual errors of memory calls and `fork`, and the error codes by which the kernel restarts a
/// call. `None` for other numbers.
pub(crate) fn errno(number: i64) -> Option<&'static str> {
    const NAMES: &[(i64, &str)] = &[
        (1, "EPERM"),
        (2, "ENOENT"),
        (3, "ESRCH"),
        (4, "EINTR"),
        (5, "EIO"),
        (7, "E2BIG"),
        (8, "ENOEXEC"),
        (9, "EBADF"),
        (11, "EAGAIN"),
        (12, "ENOMEM"),
        (13, "EACCES"),
        (14, "EFAULT"),
        (16, "EBUSY"),
        (17, "EEXIST"),
        (19, "ENODEV"),
        (22, "EINVAL"),
        (23, "ENFILE"),
        (26, "ETXTBSY"),
        (28, "ENOSPC"),
        (38, "ENOSYS"),
        (43, "EIDRM"),
        (75, "EOVERFLOW"),
        (95, "EOPNOTSUPP"),
        (133, "EHWPOISON"),
        (512, "ERESTARTSYS"),
        (513, "ERESTARTNOINTR"),
        (514, "ERESTARTNOHAND"),
    ];
    NAMES
        .iter()
        .find(|(known, _)| *known == number)
        .map(|(_, name)| *name)
}

/// `SIGSEGV`, or `signal 34` for one without a name.
pub(crate) fn signal(number: i32) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    match usize::try_from(number - 1)
        .ok()
        .and_then(|at| NAMES.get(at))
    {
        Some(name) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_those_of_this_platform() {
        assert_eq!(super::signal(libc::SIGSYS), "SIGSYS");
        assert_eq!(super::signal(libc::SIGKILL), "SIGKILL");
        assert_eq!(super::signal(64), "signal 64");
        assert_eq!(super::errno(libc::ENOMEM.into()), Some("ENOMEM"));
        assert_eq!(super::errno(libc::EHWPOISON.into()), Some("EHWPOISON"));
        assert_eq!(super::errno(4000), None);
    }
}
