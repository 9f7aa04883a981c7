//! Capability probes.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, thread};

/// A capability of the machine that a test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cap {
    /// A process may trace its own children.
    Ptrace,
    /// A seccomp filter may stop system calls for a tracer.
    SeccompTrace,
    /// 32-bit x86 system calls.
    I386Calls,
    /// The system calls that move pages between NUMA nodes; one node is enough.
    Numa,
    /// This process may use BPF, on a kernel that the source `kernel` supports.
    Bpf,
    /// Virtual machines of KVM.
    Kvm,
    /// An io_uring whose table of buffers can be made empty.
    IoUring,
    /// userfaultfd with asynchronous write protection.
    Userfaultfd,
    /// An RDMA device, and the library `libibverbs`.
    Rdma,
    /// The emulator's teaching device behind an IOMMU, bound to `vfio-pci`.
    Vfio,
    /// This process is root, and so can become another user.
    Root,
    /// This process may make a mount namespace. That needs CAP_SYS_ADMIN, which root in a container
    /// may lack.
    MountNamespace,
    /// The program of this name, in `PATH`.
    Program(&'static str),
    /// The module of this name, in Debian's own Python.
    PythonModule(&'static str),
    /// The library of this file name, in the folder where Debian's packages install libraries.
    Library(&'static str),
    /// UCX 1.12 or later, whose caches the tests can use.
    Ucx,
    /// libfabric 1.17 or 2.1, the versions whose cache has a layout that the tests know.
    Libfabric,
    /// libfabric's provider of this name finds a device.
    Provider(&'static str),
}

/// The interpreter whose modules come from Debian's packages.
pub const PYTHON: &str = "/usr/bin/python3";

/// Returns whether the machine has `cap`.
///
/// If not, prints `SKIP test: reason`, with the name of the test that runs in this thread.
///
/// # Panics
/// If the machine lacks `cap` and the environment has `MMUN_REQUIRE=all`. `MMUN_WITHOUT` lists
/// exceptions (for example `kvm rdma`), because no package can install virtualisation, a device or
/// another kernel.
pub fn require(cap: Cap) -> bool {
    let Err(reason) = probe(cap) else { return true };
    lacks(&format!("{cap:?}"), &reason);
    false
}

/// Prints that the test that runs in this thread is skipped, because the machine lacks `cap`. If
/// `cap` is required, panics as [`require`] does.
pub(crate) fn lacks(cap: &str, reason: &str) {
    let current = thread::current();
    let name = current.name().unwrap_or("a test");
    let is_required = env::var_os("MMUN_REQUIRE").is_some_and(|value| value == "all");
    let without = env::var("MMUN_WITHOUT").unwrap_or_default();
    let is_excused = without.split(' ').any(|word| word == cap.to_lowercase());
    assert!(!is_required || is_excused, "{name} needs {cap}: {reason}");
    println!("SKIP {name}: {reason}");
}

/// Tells whether this is the machine of `cargo xtask guest`, which has every capability that a test
/// can require.
pub fn is_guest() -> bool {
    fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == "mmun.guest"))
}

/// Returns the number of rounds for a test that hunts a race: `full`, or a tenth of `full` in the
/// machine of `cargo xtask guest`, where software emulation makes a round some twenty times slower.
pub fn rounds(full: usize) -> usize {
    if is_guest() { full.div_ceil(10) } else { full }
}

/// Returns whether an optional program is in `PATH`. If not, prints `SKIP test: reason`, even with
/// `MMUN_REQUIRE=all`.
pub fn has_optional_program(name: &str) -> bool {
    let is_there = has_program(name);
    if !is_there {
        println!(
            "SKIP {}: {name} is not installed",
            thread::current().name().unwrap_or("a test")
        );
    }
    is_there
}

fn has_program(name: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(name).is_file()))
}

fn probe(cap: Cap) -> Result<(), String> {
    match cap {
        // SAFETY: `geteuid` takes no argument and cannot fail.
        Cap::Root => match unsafe { libc::geteuid() } {
            0 => Ok(()),
            user => Err(format!("user {user} is not root")),
        },
        Cap::MountNamespace => {
            mount_namespace().map_err(|error| format!("no mount namespace can be made: {error}"))
        }
        Cap::Ptrace => ptrace().map_err(|error| format!("ptrace is refused: {error}")),
        Cap::SeccompTrace => match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
            Ok(actions) if actions.split_whitespace().any(|action| action == "trace") => Ok(()),
            Ok(actions) => Err(format!(
                "seccomp has no action trace, only {}",
                actions.trim()
            )),
            Err(error) => Err(format!("no seccomp: {error}")),
        },
        Cap::I386Calls => i386_getpid(),
        Cap::Program(name) => {
            if has_program(name) {
                Ok(())
            } else {
                Err(format!("{name} is not installed"))
            }
        }
        Cap::PythonModule(name) => {
            let program = format!("import {name}");
            match Command::new(PYTHON)
                .args(["-c", &program])
                .stderr(Stdio::null())
                .status()
            {
                Ok(status) if status.success() => Ok(()),
                Ok(_) => Err(format!("{PYTHON} has no module {name}")),
                Err(error) => Err(format!("{PYTHON}: {error}")),
            }
        }
        Cap::Library(name) => {
            let folder = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
            match Path::new(&folder).join(name).exists() {
                true => Ok(()),
                false => Err(format!("{folder} has no {name}")),
            }
        }
        Cap::Ucx => version("ucx_info", "-v", |version| version >= (1, 12)),
        Cap::Libfabric => version("fi_info", "--version", |version| {
            [(1, 17), (2, 1)].contains(&version)
        }),
        Cap::Provider(name) => match Command::new("fi_info").args(["-p", name]).output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(_) => Err(format!("libfabric's provider {name} finds no device")),
            Err(error) => Err(format!("fi_info: {error}")),
        },
        Cap::Bpf => bpf().map_err(|error| format!("BPF: {error}")),
        Cap::Kvm => match fs::File::options().read(true).write(true).open("/dev/kvm") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("/dev/kvm: {error}")),
        },
        Cap::IoUring => io_uring().map_err(|error| format!("io_uring: {error}")),
        Cap::Userfaultfd => userfaultfd().map_err(|error| format!("userfaultfd: {error}")),
        Cap::Rdma => rdma(),
        Cap::Vfio => edu().map(drop),
        Cap::Numa => match fs::metadata("/sys/devices/system/node/node0") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("no NUMA support: {error}")),
        },
    }
}

/// Makes a mount namespace in a new thread, and changes the propagation of its mounts.
fn mount_namespace() -> io::Result<()> {
    let thread = thread::spawn(|| {
        let (none, private) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
        // SAFETY: the call takes an integer, and changes only this thread.
        let parted = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
        let changed = parted
            // SAFETY: the target is a C string. For a change of propagation, the other pointers may
            // be null.
            && unsafe { libc::mount(none, c"/".as_ptr(), none, private, none.cast()) } == 0;
        if changed {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    });
    thread.join().expect("it makes two calls")
}

/// Checks the first version, major and minor, in the output of a program with `option`.
fn version(
    program: &str,
    option: &str,
    is_known: impl Fn((u32, u32)) -> bool,
) -> Result<(), String> {
    let output = Command::new(program).arg(option).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |word: &str| {
        let mut parts = word.split('.').map(|part| part.parse().ok());
        Some((parts.next()??, parts.next()??))
    };
    match said.split_whitespace().find_map(number) {
        Some(version) if is_known(version) => Ok(()),
        Some((major, minor)) => Err(format!(
            "{program} is of version {major}.{minor}, which the tests do not know"
        )),
        None => Err(format!("{program} {option} prints no version")),
    }
}

fn rdma() -> Result<(), String> {
    let devices = fs::read_dir("/sys/class/infiniband")
        .map_err(|error| format!("/sys/class/infiniband: {error}"))?;
    if devices.count() == 0 {
        return Err(
            "no RDMA device; 'rdma link add rxe0 type rxe netdev NAME' makes one in software"
                .to_owned(),
        );
    }
    // SAFETY: the name is a C string, and the library's constructors only initialise the library.
    let library = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        Err("libibverbs is not installed".to_owned())
    } else {
        Ok(())
    }
}

/// Finds QEMU's device `edu` among the devices that are bound to `vfio-pci`. Returns its folder in
/// sysfs.
///
/// # Errors
/// The reason why the device cannot be used, as a text for the user.
pub fn edu() -> Result<PathBuf, String> {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/vfio/vfio")
        .map_err(|error| format!("/dev/vfio/vfio: {error}"))?;
    let bound = "/sys/bus/pci/drivers/vfio-pci";
    let devices = fs::read_dir(bound).map_err(|error| format!("{bound}: {error}"))?;
    let is = |folder: &Path, name, value| {
        fs::read_to_string(folder.join(name)).is_ok_and(|text| text.trim() == value)
    };
    let mut folders = devices.filter_map(|entry| Some(entry.ok()?.path()));
    folders
        .find(|folder| is(folder, "vendor", "0x1234") && is(folder, "device", "0x11e8"))
        .ok_or_else(|| {
            "QEMU's device edu is not bound to vfio-pci: 'cargo xtask guest' has it".to_owned()
        })
}

/// Makes a BPF array of one value. Before Linux 5.12, or 5.18 on aarch64, fails, because BPF there
/// is too old for the source `kernel`.
fn bpf() -> io::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    let enough = if cfg!(target_arch = "aarch64") {
        18
    } else {
        12
    };
    if matches!((numbers.next(), numbers.next()), (Some(5), Some(minor)) if minor < enough) {
        return Err(io::Error::other(format!(
            "Linux 5.{enough} is needed, and this is {}",
            release.trim()
        )));
    }
    let attributes = [2_u32, 4, 8, 1, 0, 0];
    // SAFETY: the call reads as many bytes as its last argument, the size of `attributes`.
    let map = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            0,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    close(map)
}

/// Makes a ring of one entry with an empty table of one buffer.
fn io_uring() -> io::Result<()> {
    const REGISTER_BUFFERS2: libc::c_long = 15;
    let mut params = [0_u64; 15];
    // SAFETY: the call fills in a `struct io_uring_params`, which has 120 bytes, as `params` has.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    // One buffer without memory.
    let table = [1_u32, 1, 0, 0, 0, 0, 0, 0];
    // SAFETY: the call reads a `struct io_uring_rsrc_register`, which has 32 bytes, as `table` has.
    // The kernel refuses a descriptor of -1.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring,
            REGISTER_BUFFERS2,
            &raw const table,
            size_of_val(&table),
        )
    };
    let error = io::Error::last_os_error();
    close(ring)?;
    match (answer, error.raw_os_error()) {
        (0, _) => Ok(()),
        (_, Some(libc::EINVAL)) => Err(io::Error::other(
            "no empty tables of buffers, which need Linux 5.19",
        )),
        _ => Err(error),
    }
}

/// Requests asynchronous write protection, which exists since Linux 6.7.
fn userfaultfd() -> io::Result<()> {
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    // The fields of `struct uffdio_api`: the version, the features, and the ioctls.
    let mut api = [0xaa_u64, 1 << 15, 0];
    // SAFETY: the call takes an integer, and returns a descriptor.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    // SAFETY: the call reads and writes a `struct uffdio_api`, which has 24 bytes, as `api` has.
    // The kernel refuses a descriptor of -1.
    let answer = unsafe { libc::ioctl(descriptor as i32, UFFDIO_API, api.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    close(descriptor)?;
    match (answer, error.raw_os_error()) {
        (0, _) => Ok(()),
        (_, Some(libc::EINVAL)) => Err(io::Error::other(
            "no asynchronous write protection, which needs Linux 6.7",
        )),
        _ => Err(error),
    }
}

fn close(descriptor: libc::c_long) -> io::Result<()> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { libc::close(descriptor as i32) };
    Ok(())
}

/// Seizes a child with ptrace, and kills it.
fn ptrace() -> io::Result<()> {
    let mut child = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let pid = child.id() as libc::pid_t;
    // SAFETY: the request takes integers.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0_usize, 0_usize) };
    let result = if seized == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    };
    child.kill()?;
    child.wait()?;
    result
}

/// Makes a 32-bit system call in a child. If the kernel has no 32-bit system calls, `int 0x80`
/// kills the child.
#[cfg(target_arch = "x86_64")]
fn i386_getpid() -> Result<(), String> {
    // SAFETY: the child of `fork` makes two system calls and ends.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            let pid: i64;
            // SAFETY: the 32-bit system call 20, `getpid`, reads and writes no memory. The 64-bit
            // kernel preserves all registers except r8 to r11, which are declared as clobbered.
            unsafe {
                std::arch::asm!("int 0x80", inlateout("rax") 20_i64 => pid,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(pid <= 0)) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: the call writes to an integer, which is a local variable.
            let reaped = unsafe { libc::waitpid(pid, &mut status, 0) };
            if reaped == pid && status == 0 {
                Ok(())
            } else {
                Err("no 32-bit system calls".to_owned())
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn i386_getpid() -> Result<(), String> {
    Err("not an x86-64 machine".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_answers_the_same_twice() {
        assert_eq!(probe(Cap::Ptrace), probe(Cap::Ptrace));
        assert_eq!(probe(Cap::I386Calls).is_ok(), probe(Cap::I386Calls).is_ok());
    }
}
