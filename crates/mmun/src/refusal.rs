//! Why a process cannot be attached to, according to `/proc`.

use std::fs;

use mmu_source::process::Pid;

use crate::who::shown;

/// Returns the reason, or a remedy that usually helps; `None` if `/proc` shows no reason.
pub(crate) fn why(pid: Pid) -> Option<String> {
    let status = fs::read_to_string(shown(pid, "status")?).ok()?;
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let name = |pid: Pid| {
        let name = shown(pid, "comm").and_then(|file| fs::read_to_string(file).ok());
        name.unwrap_or_default()
    };
    found(
        &status,
        rustix::process::geteuid().as_raw(),
        scope.trim(),
        name,
    )
}

fn found(status: &str, own_user: u32, scope: &str, name: impl Fn(Pid) -> String) -> Option<String> {
    let field = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.strip_prefix(':')?.split_whitespace().next()
    };
    let tracer = field("TracerPid").and_then(|pid| pid.parse::<Pid>().ok());
    if let Some(tracer) = tracer.filter(|tracer| *tracer != 0) {
        let name = name(tracer);
        return Some(format!(
            "process {tracer} ({}) traces it already, and a process has one tracer",
            crate::summary::printable(name.trim())
        ));
    }
    if field("VmSize").is_none() {
        return Some("it is a thread of the kernel, which has no address space".into());
    }
    let user = field("Uid").and_then(|user| user.parse::<u32>().ok());
    if let Some(user) = user.filter(|user| own_user != 0 && *user != own_user) {
        return Some(format!(
            "it is of user {user}: tracing it needs CAP_SYS_PTRACE, as root has it"
        ));
    }
    let why = match scope {
        "1" => {
            "a process may be traced by its ancestors only: start it with mmun trace, or trace it as root"
        }
        "2" => "tracing needs CAP_SYS_PTRACE, as root has it",
        "3" => "no process may be attached to until the machine is started anew",
        _ => return None,
    };
    Some(format!("{why} (kernel.yama.ptrace_scope is {scope})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_reason() {
        let why = |text: &str, scope: &str| {
            found(text, 1000, scope, |pid| format!("gdb{pid}\n")).unwrap_or_default()
        };
        let status = |tracer: u32, user: u32| {
            format!("Name:\tcat\nTracerPid:\t{tracer}\nUid:\t{user}\t0\nVmSize:\t8 kB\n")
        };
        for (text, scope, part) in [
            (status(7, 1000), "0", "process 7 (gdb7) traces it already"),
            (status(0, 0), "0", "user 0"),
            (status(0, 1000), "1", "ancestors only"),
            (status(0, 1000), "2", "CAP_SYS_PTRACE"),
            (status(0, 1000), "3", "started anew"),
            ("State:\tS\nUid:\t0\n".into(), "0", "thread of the kernel"),
        ] {
            assert!(
                why(&text, scope).contains(part),
                "{text}: {}",
                why(&text, scope)
            );
        }
        assert_eq!(why(&status(0, 1000), "0"), "");
        // Root may trace the processes of every user.
        assert_eq!(found(&status(0, 7), 0, "", |_| String::new()), None);
    }
}
