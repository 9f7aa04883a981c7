//! A task, its registers, and how it ended, as the kernel reports them.

/// The identifier of a process or thread in the tracer's pid namespace.
pub type Pid = i32;

/// A task: one thread of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Task {
    /// The process, which is the thread group.
    pub pid: Pid,
    /// The thread.
    pub tid: Pid,
}

/// The registers of a stopped task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registers {
    /// The instruction pointer. At a system call it points behind the instruction that makes the
    /// call.
    pub ip: u64,
    /// The stack pointer.
    pub sp: u64,
    /// The frame pointer, if the program maintains one.
    pub bp: u64,
    /// The return address of the running function, on processors that keep it in a register
    /// (aarch64) as long as the function leaves it there.
    pub link: Option<u64>,
    /// Which bits of a return address form the address. With pointer authentication the other bits
    /// hold the signature.
    pub code_mask: u64,
    /// Whether the task runs 32-bit code.
    pub is_32bit: bool,
}

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    /// The task exited with this status, 0 to 255.
    Code(i32),
    /// This signal ended the task.
    Signal(i32),
}
