//! Brokers and clients over real sockets. The clients send hand-made packets. Some tests need a
//! second address space or another user.

#![allow(
    unsafe_code,
    reason = "becomes another user in a child, and ends processes"
)]

use super::super::layout::header;
use super::super::sys::{self as kernel_sys, Scratch, Shared};
use super::super::{Kernel, broker};
use super::join::with;
use super::message::{Refusal, Reply, Request};
use super::*;
use crate::testkit::{Cap, in_child, require};
use crate::wait::until;
use mmu_notifier::VaRange;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

mod client;

const NOBODY: u32 = 65534;
const SOON: Duration = Duration::from_secs(60);

fn can_run() -> bool {
    require(Cap::Root) && require(Cap::Kvm) && require(Cap::Bpf)
}

fn new_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("mmun-broker-{}-{number}", std::process::id()))
}

/// A path that is removed on drop.
struct At(PathBuf);

impl Drop for At {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Starts a broker for the user of the tests, on a thread that ends with the process.
fn start(max_clients: usize) -> At {
    let path = new_path();
    let broker = Broker::bind(
        &path,
        &Options {
            group: None,
            max_clients,
        },
    )
    .expect("root with KVM and BPF can");
    std::thread::spawn(move || broker.serve(|_| ()));
    At(path)
}

fn connect(at: &At) -> OwnedFd {
    socket::connect_to(&at.0, SOON).expect("a broker listens there")
}

fn reply(socket: &OwnedFd) -> Option<(Reply, Vec<OwnedFd>)> {
    let packet = socket::receive(socket).ok().flatten()?;
    Some((
        Reply::parse(packet.bytes()).expect("a reply"),
        packet.descriptors,
    ))
}

fn ask(socket: &OwnedFd, bytes: &[u8], with: &[BorrowedFd<'_>]) -> Option<Reply> {
    socket::send(socket, bytes, with).ok()?;
    reply(socket).map(|(reply, _)| reply)
}

/// The descriptors of a client that sends hand-made packets.
struct Client {
    socket: OwnedFd,
    kvm: OwnedFd,
    a: OwnedFd,
    given: Vec<OwnedFd>,
}

fn join(at: &At) -> Result<Client, Refusal> {
    let socket = connect(at);
    let (greeting, mut kvm) = reply(&socket).expect("a greeting");
    if let Reply::Refused(refusal) = greeting {
        return Err(refusal);
    }
    let kvm = kvm.pop().expect("the greeting brings the device");
    let a = kernel_sys::create_vm(kvm.as_fd()).expect("it is KVM");
    socket::send(&socket, &Request::Join.bytes(), &[a.as_fd()]).expect("the broker is there");
    match reply(&socket).expect("an answer") {
        (Reply::Done(_), given) => Ok(Client {
            socket,
            kvm,
            a,
            given,
        }),
        (Reply::Refused(refusal), _) => Err(refusal),
    }
}

/// Joins as soon as there is a place: the kernel frees the last client's objects a little after the
/// client.
fn join_soon(at: &At) -> Client {
    let begun = Instant::now();
    loop {
        match join(at) {
            Ok(client) => return client,
            Err(refusal) => assert!(begun.elapsed() < SOON, "{refusal:?}"),
        }
    }
}

impl Client {
    /// Tells whether a change of this process is counted.
    fn is_told(&self) -> bool {
        let header =
            Shared::map(self.given[0].as_fd(), 0, header::BYTES, true).expect("it is a map");
        for word in [header::ON, header::ARMED, header::WIDE] {
            header.u64(word).store(1, Ordering::Relaxed);
        }
        let before = header.u64(header::GENERATION).load(Ordering::Relaxed);
        kernel_sys::ask(&Scratch::map().expect("a page"));
        header.u64(header::GENERATION).load(Ordering::Relaxed) != before
    }
}

#[test]
fn a_client_that_keeps_its_maps_keeps_its_place() {
    if !can_run() {
        return;
    }
    let at = start(1);
    let Client { socket, given, .. } = join(&at).expect("a place");
    assert_eq!(join(&at).err(), Some(Refusal::Full));
    drop(socket);
    // At some time in this loop, the broker sees the end of the connection. The place must stay
    // taken even then, because the client still holds its maps and its link.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(200) {
        assert_eq!(
            join(&at).err(),
            Some(Refusal::Full),
            "the link is still there"
        );
    }
    for kept in given {
        assert_eq!(
            join(&at).err(),
            Some(Refusal::Full),
            "something is still there"
        );
        drop(kept);
    }
    assert!(join_soon(&at).is_told());
}

#[test]
fn the_prepared_set_goes_to_one_client_and_is_replaced() {
    if !can_run() {
        return;
    }
    let path = At(new_path());
    let options = Options {
        group: None,
        max_clients: 8,
    };
    let broker = Broker::bind(&path.0, &options).expect("root with KVM and BPF can");
    let means = Arc::clone(&broker.means);
    let number = |map: &OwnedFd| kernel_sys::number(map.as_fd()).expect("a map has one");
    let ready = || means.ready.look(|(maps, _)| number(&maps.header));
    let first = ready().expect("the rehearsal leaves it for the first client");
    std::thread::spawn(move || broker.serve(|_| ()));
    let mut seen = vec![first];
    for _ in 0..3 {
        let client = join(&path).expect("a place");
        assert_eq!(number(&client.given[0]), seen[seen.len() - 1]);
        assert!(client.is_told());
        until(|| ready().is_some());
        let next = ready().expect("no other client comes");
        assert!(!seen.contains(&next), "one set, one client");
        seen.push(next);
    }
}

#[test]
fn a_client_that_is_killed_leaves_nothing() {
    if !can_run() {
        return;
    }
    let at = start(1);
    let (mut said, mut says) = pipe();
    // SAFETY: the child makes system calls, allocates, and is killed.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let client = join(&at);
        let _ = says.write_all(&[u8::from(client.is_ok())]);
        std::thread::sleep(SOON);
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(1) };
    }
    let mut has_joined = [0];
    said.read_exact(&mut has_joined).expect("the child says so");
    assert_eq!(has_joined, [1]);
    assert_eq!(join(&at).err(), Some(Refusal::Full));
    end(child);
    assert!(join_soon(&at).is_told());
}

#[test]
fn a_client_that_sends_nonsense_or_nothing_harms_only_itself() {
    if !can_run() {
        return;
    }
    let at = start(64);
    let silent: Vec<OwnedFd> = (0..8).map(|_| connect(&at)).collect();
    let null = OwnedFd::from(File::open("/dev/null").expect("it is there"));
    let begun = Instant::now();
    let refused = Some(Reply::Refused(Refusal::Nonsense));
    let packets: [(&[u8], usize); 9] = [
        (b"x", 0),
        (b"mmun", 0),
        (&[0xff; 4096], 0),
        (&Request::Join.bytes(), 0),
        (&Request::Join.bytes(), 1),
        (&Request::Join.bytes(), 200),
        (&Request::Count.bytes(), 1),
        (&Request::Missed.bytes(), 0),
        (&Request::Missed.bytes(), 3),
    ];
    for (bytes, descriptors) in packets {
        let socket = connect(&at);
        reply(&socket).expect("a greeting");
        let descriptors = vec![null.as_fd(); descriptors];
        // `send` cannot send so many descriptors, so another function does.
        let answer = if descriptors.len() > 8 {
            send_many(&socket, bytes, &descriptors);
            reply(&socket).map(|(reply, _)| reply)
        } else {
            ask(&socket, bytes, &descriptors)
        };
        assert_eq!(answer, refused, "{bytes:?}");
        assert!(reply(&socket).is_none(), "the broker closes");
    }
    let client = join(&at).expect("a place");
    assert_eq!(
        ask(&client.socket, &Request::Count.bytes(), &[null.as_fd()]),
        Some(Reply::Done(0))
    );
    assert_eq!(
        ask(
            &client.socket,
            &Request::Count.bytes(),
            &[client.kvm.as_fd()]
        ),
        Some(Reply::Done(0))
    );
    let b = kernel_sys::create_vm(client.kvm.as_fd()).expect("a machine");
    assert_eq!(
        ask(&client.socket, &Request::Count.bytes(), &[b.as_fd()]),
        Some(Reply::Done(1))
    );
    assert_eq!(
        ask(&client.socket, &Request::Forget.bytes(), &[]),
        Some(Reply::Done(1))
    );
    assert!(client.is_told());
    assert_eq!(
        ask(&client.socket, &Request::Join.bytes(), &[client.a.as_fd()]),
        refused,
        "twice"
    );
    assert!(begun.elapsed() < SOON && join(&at).is_ok_and(|client| client.is_told()));
    drop(silent);
}

#[test]
fn a_client_whose_session_fails_still_learns_of_changes() {
    if !can_run() {
        return;
    }
    let at = start(1);
    let client = join(&at).expect("a place");
    // If the broker has no free descriptor, the kernel delivers `Count` without its machine.
    assert_eq!(
        ask(&client.socket, &Request::Count.bytes(), &[]),
        Some(Reply::Done(0))
    );
    assert!(client.is_told());
    assert_eq!(
        ask(&client.socket, b"x", &[]),
        Some(Reply::Refused(Refusal::Nonsense))
    );
    assert!(client.is_told(), "the client lives, and is blind");
    drop(client);
    assert!(join_soon(&at).is_told());
}

#[test]
fn a_machine_of_another_address_space_is_not_used() {
    if !can_run() {
        return;
    }
    let at = start(4);
    let client = join(&at).expect("a place");
    let foreign = foreign_machine();
    assert_eq!(
        ask(&client.socket, &Request::Count.bytes(), &[foreign.as_fd()]),
        Some(Reply::Done(0))
    );
    assert!(client.is_told());
}

#[test]
fn a_client_gets_only_events_of_its_own_address_space() {
    if !can_run() {
        return;
    }
    let at = start(4);
    let page = Scratch::map().expect("a page");
    let ((mut go, mut going), (mut done, mut doing)) = (pipe(), pipe());
    // SAFETY: the child makes system calls, allocates, and is killed.
    let victim = unsafe { libc::fork() };
    if victim == 0 {
        let kvm = kernel_sys::open_kvm().expect("root may");
        let _machine = kernel_sys::create_vm(kvm.as_fd()).expect("a machine");
        while go.read_exact(&mut [0]).is_ok() {
            (0..1000).for_each(|_| kernel_sys::ask(&page));
            let _ = doing.write_all(&[0]);
        }
    }
    // Run in a child, because other tests change this address space at the same time.
    let good = in_child(|| {
        let client = join(&at).expect("a place");
        assert!(client.is_told());
        let header =
            Shared::map(client.given[0].as_fd(), 0, header::BYTES, true).expect("it is a map");
        let words = [
            header::GENERATION,
            header::LOST,
            header::IGNORED,
            header::ANSWERED,
        ];
        let seen = || words.map(|word| header.u64(word).load(Ordering::Relaxed));
        // All addresses are armed in each round, because `is_told` has set `WIDE`. From the second
        // round on there is a machine B. In the last round, the page that the victim changes is
        // also the scratch page: an event at its address is a question to the program.
        let b = kernel_sys::create_vm(client.kvm.as_fd()).expect("a machine");
        for (scratch, with_b) in [(0, false), (0, true), (page.address(), true)] {
            let (request, with) = if with_b {
                (Request::Count, Some(b.as_fd()))
            } else {
                (Request::Forget, None)
            };
            assert_eq!(
                ask(&client.socket, &request.bytes(), with.as_slice()),
                Some(Reply::Done(1))
            );
            header
                .u64(header::SCRATCH)
                .store(scratch, Ordering::Relaxed);
            header.u64(header::ASKED).store(77, Ordering::Relaxed);
            let before = seen();
            going.write_all(&[0]).expect("the victim lives");
            done.read_exact(&mut [0]).expect("the victim lives");
            assert_eq!(
                seen(),
                before,
                "a change of the victim left a trace ({scratch:#x}, {with_b})"
            );
            kernel_sys::ask(&page);
            assert_ne!(seen(), before, "a change of its own left none");
        }
        true
    });
    end(victim);
    assert!(good);
}

fn nobodys_group() -> Option<String> {
    let groups = fs::read_to_string("/etc/group").expect("it is there");
    let group = groups
        .lines()
        .find(|line| line.contains(&format!(":{NOBODY}:")))
        .expect("the user `nobody` has a group");
    group.split(':').next().map(str::to_owned)
}

fn become_nobody() {
    // SAFETY: the list is empty, so the pointer is not read.
    assert_eq!(unsafe { libc::setgroups(0, std::ptr::null()) }, 0);
    // SAFETY: takes integers.
    assert_eq!(unsafe { libc::setresgid(NOBODY, NOBODY, NOBODY) }, 0);
    // SAFETY: takes integers.
    assert_eq!(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }, 0);
}

fn pipe() -> (File, File) {
    let (read, write) = std::io::pipe().expect("a pipe");
    (OwnedFd::from(read).into(), OwnedFd::from(write).into())
}

/// Returns two connected sockets.
fn pair() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("two sockets")
}

fn send_many(socket: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    sendmsg(
        socket,
        &[io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .expect("it is sent");
}

/// Returns a virtual machine made by a child that has ended.
fn foreign_machine() -> OwnedFd {
    let (ours, theirs) = pair();
    assert!(in_child(|| {
        let kvm = kernel_sys::open_kvm().expect("root may");
        let machine = kernel_sys::create_vm(kvm.as_fd()).expect("a machine");
        socket::send(&theirs, b"x", &[machine.as_fd()]).is_ok()
    }));
    let packet = socket::receive(&ours)
        .expect("it was sent")
        .expect("it was sent");
    packet
        .take::<1>()
        .map(|[machine]| machine)
        .expect("one descriptor")
}

fn end(child: libc::pid_t) {
    // SAFETY: takes integers; the process is a child that was not reaped.
    unsafe { libc::kill(child, libc::SIGKILL) };
    // SAFETY: the process is a child that was not reaped. `waitpid` takes a null status pointer.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
}
