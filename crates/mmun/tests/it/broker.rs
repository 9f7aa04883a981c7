//! `mmun broker`: real processes of another user, through a real socket.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use testkit::{Cap, require};

use crate::support::{Public, parse, text, within};

/// An ordinary user, and its group.
const NOBODY: u32 = 65534;

fn can_run() -> bool {
    require(Cap::Root) && require(Cap::Kvm) && require(Cap::Bpf)
}

fn new_socket() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "mmun-cli-broker-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Relaxed)
    );
    std::env::temp_dir().join(name)
}

fn nobodys_group() -> String {
    let groups = fs::read_to_string("/etc/group").unwrap();
    let group = groups
        .lines()
        .find(|line| line.split(':').nth(2) == Some("65534"))
        .expect("the user `nobody` has a group");
    group.split(':').next().unwrap().to_owned()
}

/// A broker that serves the group of `nobody`, until it is dropped.
struct Broker {
    child: Child,
    socket: PathBuf,
}

impl Broker {
    fn start(options: &[&str]) -> Self {
        let socket = new_socket();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mmun"));
        command
            .arg("broker")
            .arg("--socket")
            .arg(&socket)
            .args(["--group", &nobodys_group()])
            .args(options);
        let child = command.spawn().unwrap();
        let broker = Self { child, socket };
        wait_for_a_place(&broker.socket);
        broker
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// A program run by an ordinary user, without any capability.
fn client(program: &Path, socket: &Path, user: u32) -> Command {
    let mut command = Command::new(program);
    command
        .env("MMUN_BROKER", socket)
        .env_remove("NO_COLOR")
        .uid(user)
        .gid(user);
    // The standard library drops root's groups when it changes the user.
    let no_new_privileges = || {
        // SAFETY: `prctl` takes integers only for this option.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes system calls only.
    unsafe { command.pre_exec(no_new_privileges) };
    command
}

fn run(socket: &Path, user: u32, args: &[&str]) -> Output {
    let copy = Public::new();
    let mut command = client(&copy.mmun(), socket, user);
    command.args(args);
    within("a client of the broker", move || command.output().unwrap())
}

/// What the source `kernel` lacks, according to `doctor`; `None` if it is usable.
fn lack(socket: &Path, user: u32) -> Option<String> {
    let output = run(socket, user, &["doctor", "--json"]);
    let rows = parse(text(&output.stdout));
    let row = rows
        .iter()
        .find(|row| row["source"] == "kernel")
        .expect("it is a source");
    assert_eq!(row["usable"] == true, row["missing"].is_null(), "{row}");
    row["missing"].as_str().map(str::to_owned)
}

/// Waits until the broker serves.
fn wait_for_a_place(socket: &Path) {
    let begun = Instant::now();
    while let Some(lack) = lack(socket, NOBODY) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{lack}");
    }
}

#[test]
fn coverage_through_a_broker_misses_nothing_as_nobody() {
    if !can_run() {
        return;
    }
    let broker = Broker::start(&[]);
    let output = run(
        &broker.socket,
        NOBODY,
        &["coverage", "--json", "--source", "kernel"],
    );
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let rows = parse(text(&output.stdout));
    let changed: Vec<_> = rows.iter().filter(|row| row["changed"] == true).collect();
    assert!(changed.len() >= 30, "{}", text(&output.stderr));
    for row in changed {
        assert_eq!(row["seen"], "before", "{row}");
    }
}

#[test]
fn a_user_outside_the_group_is_refused() {
    if !can_run() {
        return;
    }
    let broker = Broker::start(&[]);
    const STRANGER: u32 = 61_234;
    let lack_of_right = lack(&broker.socket, STRANGER).expect("the socket is not its own");
    assert!(
        lack_of_right.contains("Permission denied"),
        "{lack_of_right}"
    );
    // Even if the socket lets every user in.
    fs::set_permissions(&broker.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let refusal = lack(&broker.socket, STRANGER).expect("it is no member");
    assert!(
        refusal.contains("does not serve this user") && refusal.contains("--group"),
        "{refusal}"
    );
    assert_eq!(lack(&broker.socket, NOBODY), None);
}

#[test]
fn a_signal_that_ends_the_broker_removes_its_socket_and_no_other_file() {
    if !can_run() {
        return;
    }
    for is_replaced in [false, true] {
        let mut broker = Broker::start(&[]);
        if is_replaced {
            fs::remove_file(&broker.socket).unwrap();
            fs::write(&broker.socket, "another program's").unwrap();
        }
        let pid = rustix::process::Pid::from_child(&broker.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = broker.child.wait().unwrap();
        assert_eq!(status.signal(), Some(15), "{status}");
        assert_eq!(broker.socket.exists(), is_replaced);
    }
}

#[test]
fn wrong_arguments_are_refused_in_one_line() {
    if !require(Cap::Root) {
        return;
    }
    let refused = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mmun"));
        command.arg("broker").args(args);
        let output = within("mmun broker", move || command.output().unwrap());
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        let line = text(&output.stderr).trim_end().to_owned();
        assert!(line.starts_with("mmun: ") && !line.contains('\n'), "{line}");
        line
    };
    assert!(refused(&["--group", "no-such-group"]).contains("no-such-group"));
    assert!(refused(&["--max-clients", "0"]).contains("--max-clients"));
    assert!(refused(&["--socket", "/proc/none/x"]).contains("/proc/none/x"));
}

/// `mmun broker` with `passed` as the only descriptor from a service manager.
fn activated(passed: OwnedFd) -> Command {
    let mut command = Command::new("sh");
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" broker 3<&0 </dev/null";
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_mmun")])
        .stdin(passed);
    command
}

#[test]
fn a_passed_descriptor_of_the_wrong_kind_is_refused_in_one_line() {
    let new = |family, kind| socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
    let passed = [
        ("a file", File::open("/dev/null").unwrap().into()),
        (
            "no listener",
            new(AddressFamily::UNIX, SocketType::SEQPACKET),
        ),
        ("a stream", new(AddressFamily::UNIX, SocketType::STREAM)),
        (
            "a network's",
            TcpListener::bind("127.0.0.1:0").unwrap().into(),
        ),
        ("a connection", UnixStream::pair().unwrap().0.into()),
    ];
    for (what, passed) in passed {
        let mut command = activated(passed);
        let output = within("mmun broker", move || command.output().unwrap());
        let line = text(&output.stderr).trim_end();
        assert_eq!(output.status.code(), Some(2), "{what}: {line}");
        assert!(
            line.contains("LISTEN_FDS") && !line.contains('\n'),
            "{what}: {line}"
        );
    }
}

#[test]
fn a_passed_socket_is_served() {
    if !can_run() {
        return;
    }
    let name = std::env::temp_dir().join(format!("mmun-cli-passed-{}", std::process::id()));
    let listener = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    bind(&listener, &SocketAddrUnix::new(&name).unwrap()).unwrap();
    listen(&listener, 8).unwrap();
    // Root uses the kernel source without a broker. So the client is another user, whom this broker
    // does not serve.
    fs::set_permissions(&name, fs::Permissions::from_mode(0o666)).unwrap();
    let child = activated(listener).spawn().unwrap();
    let broker = Broker {
        child,
        socket: name,
    };
    let lack = lack(&broker.socket, NOBODY).expect("it is no member of a group that is served");
    assert!(lack.contains("does not serve this user"), "{lack}");
}

fn shipped(unit: &str) -> PathBuf {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist");
    dist.join(unit)
}

/// The units as shipped, except for the path of the program.
#[test]
fn systemd_finds_no_fault_with_the_units() {
    if !require(Cap::Program("systemd-analyze")) {
        return;
    }
    let folder = std::env::temp_dir().join(format!("mmun-cli-units-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let units = ["mmun-broker.socket", "mmun-broker.service"].map(|name| {
        let text = fs::read_to_string(shipped(name)).unwrap();
        let own = text.replace("/usr/bin/mmun", env!("CARGO_BIN_EXE_mmun"));
        let unit = folder.join(name);
        fs::write(&unit, own).unwrap();
        unit
    });
    let control = folder.join("control.service");
    fs::write(&control, "[Service]\nExecStart=/bin/sh\n").unwrap();
    let [control, verified] = [vec![control], units.into()].map(|units| {
        let mut command = Command::new("systemd-analyze");
        command.arg("verify").args(&units);
        within("systemd-analyze", move || command.output().unwrap())
    });
    fs::remove_dir_all(folder).unwrap();
    if !control.status.success() {
        let why = text(&control.stderr);
        return println!("SKIP systemd_finds_no_fault_with_the_units: {why}");
    }
    let said = text(&verified.stderr);
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("mmun")).collect();
    assert_eq!(ours, [""; 0]);
    assert!(verified.status.success(), "{said}");
}

/// The broker starts as under `mmun-broker.socket` and `mmun-broker.service`. The first client
/// starts it, with the socket that systemd has opened and with the capabilities of the unit. The
/// broker serves the members of a group.
#[test]
fn the_first_client_starts_the_broker_at_the_socket_of_systemd() {
    if !can_run() || !require(Cap::Program("systemd-socket-activate")) {
        return;
    }
    let unit = fs::read_to_string(shipped("mmun-broker.service")).unwrap();
    let kept = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .expect("the unit keeps few capabilities");
    let kept = kept.to_lowercase().replace("cap_", "+").replace(' ', ",");
    let kept = format!("-all,{kept}");
    let few = ["--no-new-privs", "--bounding-set", &kept];
    let control = Command::new("setpriv").args(few).arg("true").output();
    if !control.is_ok_and(|output| output.status.success()) {
        return println!("SKIP the_first_client_starts_the_broker: setpriv cannot do {few:?}");
    }
    let socket = new_socket();
    let mut command = Command::new("systemd-socket-activate");
    command.args(["--seqpacket", "--listen"]).arg(&socket);
    command.arg("setpriv").args(few);
    command.arg(env!("CARGO_BIN_EXE_mmun"));
    command.args(["broker", "--group", &nobodys_group()]);
    let child = command.spawn().unwrap();
    let broker = Broker { child, socket };
    let begun = Instant::now();
    while !broker.socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no socket");
    }
    // As `SocketGroup=` and `SocketMode=` set them.
    std::os::unix::fs::chown(&broker.socket, None, Some(NOBODY)).unwrap();
    fs::set_permissions(&broker.socket, fs::Permissions::from_mode(0o660)).unwrap();
    let running = format!("/proc/{}/comm", broker.child.id());
    assert_eq!(fs::read_to_string(&running).unwrap(), "systemd-socket-\n");
    wait_for_a_place(&broker.socket);
    assert_eq!(fs::read_to_string(&running).unwrap(), "mmun\n");
    const STRANGER: u32 = 61_234;
    let lack = lack(&broker.socket, STRANGER).expect("the socket is not its own");
    assert!(lack.contains("Permission denied"), "{lack}");
}

#[test]
fn without_a_broker_doctor_says_how_to_start_one() {
    if !require(Cap::Root) || !require(Cap::Bpf) {
        return;
    }
    let output = run(
        Path::new("/nonexistent/socket"),
        NOBODY,
        &["doctor", "--json"],
    );
    let rows = parse(text(&output.stdout));
    let row = rows
        .iter()
        .find(|row| row["source"] == "kernel")
        .expect("it is a source");
    let missing = row["missing"].as_str().expect("it has no right");
    assert!(
        missing.contains("CAP_BPF and CAP_PERFMON")
            && row["remedy"].to_string().contains("broker --group"),
        "{row}"
    );
}
