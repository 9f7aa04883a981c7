//! Sends and receives packets with descriptors, and identifies the peer.

use super::sys;
use rustix::net::sockopt::{
    Timeout, set_socket_timeout, socket_acceptconn, socket_domain, socket_type,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect,
    listen, recvmsg, sendmsg, socket_with,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Room for more descriptors than any message has, so that a packet with too many is detected.
const DESCRIPTORS: usize = 8;

/// A received packet.
#[derive(Debug)]
pub(super) struct Packet {
    bytes: [u8; 32],
    length: usize,
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Packet {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Returns the descriptors if there are exactly `N`.
    pub(super) fn take<const N: usize>(self) -> Option<[OwnedFd; N]> {
        self.descriptors.try_into().ok()
    }
}

fn new() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Connects to a broker. The connection and each later send or receive wait at most `patience`.
pub(super) fn connect_to(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let socket = new()?;
    be_patient(&socket, Some(patience))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Makes a socket bound to `path`. No client can connect before [`start_listening`].
pub(super) fn bind_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = new()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

pub(super) fn start_listening(socket: &OwnedFd) -> io::Result<()> {
    Ok(listen(socket, 128)?)
}

/// Checks that a socket from another process is a Unix socket that listens for sequenced packets.
pub(super) fn check_listener(socket: &OwnedFd) -> io::Result<()> {
    let is_right = socket_domain(socket)? == AddressFamily::UNIX
        && socket_type(socket)? == SocketType::SEQPACKET;
    if is_right && socket_acceptconn(socket)? {
        return Ok(());
    }
    Err(io::Error::other(
        "it is no Unix socket that listens for sequenced packets (ListenSequentialPacket=)",
    ))
}

/// Limits how long each later send or receive may wait.
pub(super) fn be_patient(socket: &OwnedFd, patience: Option<Duration>) -> io::Result<()> {
    set_socket_timeout(socket, Timeout::Recv, patience)?;
    set_socket_timeout(socket, Timeout::Send, patience)?;
    Ok(())
}

/// Removes the limit of each later receive.
pub(super) fn wait_for_requests(socket: &OwnedFd) -> io::Result<()> {
    Ok(set_socket_timeout(socket, Timeout::Recv, None)?)
}

/// The user and the process at the other end, at the time of its `connect` or `listen`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    pub(super) user: u32,
    pub(super) group: u32,
    /// For messages only, because another process may have the same pid by now. Zero if the process
    /// is outside this pid namespace.
    pub(super) pid: i32,
}

pub(super) fn peer(socket: &OwnedFd) -> io::Result<Peer> {
    let creds = sys::peer_credentials(socket)?;
    Ok(Peer {
        user: creds.uid,
        group: creds.gid,
        pid: creds.pid,
    })
}

/// Sends a packet.
pub(super) fn send(
    socket: &OwnedFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(
            control.push(SendAncillaryMessage::ScmRights(descriptors)),
            "messages have few descriptors"
        );
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

/// Receives a packet. Returns `None` if the peer has closed the connection.
pub(super) fn receive(socket: &OwnedFd) -> io::Result<Option<Packet>> {
    let mut packet = Packet {
        bytes: [0; 32],
        length: 0,
        descriptors: Vec::new(),
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let into = &mut [IoSliceMut::new(&mut packet.bytes)];
        match recvmsg(socket, into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    packet.length = received.bytes;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            packet.descriptors.extend(descriptors);
        }
    }
    Ok((packet.length > 0).then_some(packet))
}
