//! A task, where it is stopped, and how it ended, as the kernel reports them.

/// A process or thread identifier, as the tracer's pid namespace numbers it.
pub type Pid = i32;

/// A task: one thread of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Task {
    /// The process, which is the thread group.
    pub pid: Pid,
    /// The thread.
    pub tid: Pid,
}

/// Where a stopped task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registers {
    /// The instruction pointer. At a system call it stands behind the instruction that makes it.
    pub ip: u64,
    /// The stack pointer.
    pub sp: u64,
    /// The frame pointer, where the program keeps one.
    pub bp: u64,
    /// The address that the running function returns to, on processors that keep it in a register
    /// (aarch64) and as long as the function leaves it there.
    pub link: Option<u64>,
    /// Which bits of a return address are the address. With pointer authentication, the other bits
    /// hold the signature.
    pub code_mask: u64,
    /// The task runs 32-bit code.
    pub is_32bit: bool,
}

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    /// It exited with this status, 0 to 255.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}
