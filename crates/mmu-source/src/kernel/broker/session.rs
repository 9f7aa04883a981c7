//! The broker's session with one client.
//!
//! The broker serves each client on a thread of its own. So a client that hangs, floods, or sends a
//! descriptor that takes long to close does not delay other clients.
//!
//! The session holds the client's machines open as long as the programs know an address in them.
//! Otherwise a program could read memory that was freed and reused, or take a new address space for
//! one that has ended. Once the client has closed the connection, the session makes the programs
//! forget these addresses. Not earlier, whatever fails: the program of a client that lives would
//! then take each change for another address space's, and the client would not be told.

use super::super::layout::RING;
use super::super::missing;
use super::super::program::Audience;
use super::super::programs::{Programs, SharedMaps, load_resolver};
use super::super::resolver::{Offsets, Role};
use super::super::sys::{self, Object};
use super::message::{Refusal, Reply, Request};
use super::places::Ticket;
use super::ready::Ready;
use super::socket::{self, Packet};
use crate::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// How long the broker waits for a client to join, or to accept an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What all sessions share.
#[derive(Debug)]
pub(super) struct Means {
    /// A machine of the broker itself. A client's descriptor must have the same file operations.
    pub(super) machine: OwnedFd,
    pub(super) offsets: Offsets,
    /// The prepared set for the next client.
    pub(super) ready: Ready<Outfit>,
}

/// The maps and the programs of one client.
pub(super) type Outfit = (SharedMaps, Programs);

/// Serves a client until it disconnects.
pub(super) fn serve(socket: &OwnedFd, means: &Means, ticket: &mut Ticket) {
    let refuse = |refusal| {
        let _ = socket::send(socket, &Reply::Refused(refusal).bytes(), &[]);
    };
    match join(socket, means, ticket) {
        Ok(Some(mut session)) => {
            if let Err(refusal) = session.run(socket) {
                refuse(refusal);
            }
            crate::wait::until_closed(socket.as_fd());
        }
        Ok(None) => {}
        Err(refusal) => refuse(refusal),
    }
}

/// Checks that clients can be served. Keeps the maps and programs that it makes for the first
/// client.
pub(super) fn rehearse(means: &Means) -> Result<(), Error> {
    let (maps, programs) = make(means).map_err(|error| missing::bpf_missing(&error))?;
    // The link is dropped at once. So the program is detached before it knows an address space, and
    // records nothing about other processes.
    programs
        .attach()
        .map_err(|error| missing::tracepoint_missing(&error))?;
    if !programs.show(means.machine.as_fd(), Role::Space) {
        return Err(missing::description_missing());
    }
    if programs.forget_all() {
        means.ready.put((maps, programs));
    }
    Ok(())
}

struct Session {
    programs: Programs,
    /// Open as long as the session lasts, so that no other address space gets the same address.
    a: OwnedFd,
    b: Option<OwnedFd>,
}

fn failed(error: &io::Error) -> Refusal {
    Refusal::Failed(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Waits for the client's first request, and sends the client its maps and its link. Returns `None`
/// if the client has gone.
fn join(socket: &OwnedFd, means: &Means, ticket: &mut Ticket) -> Result<Option<Session>, Refusal> {
    socket::be_patient(socket, Some(PATIENCE)).map_err(|error| failed(&error))?;
    let Some((request, packet)) = receive(socket)? else {
        return Ok(None);
    };
    let a = match (request, packet.take()) {
        (Request::Join, Some([a])) => a,
        _ => return Err(Refusal::Nonsense),
    };
    let made = means.ready.take().map_or_else(|| make(means), Ok);
    let (maps, programs) = made.map_err(|error| failed(&error))?;
    // A descriptor is a machine only if its file operations are those of the broker's own machine.
    if !programs.show(means.machine.as_fd(), Role::Space) {
        return Err(Refusal::Failed(libc::ENOSYS));
    }
    if !programs.show(a.as_fd(), Role::Space) {
        return Err(Refusal::Nonsense);
    }
    let session = Session {
        programs,
        a,
        b: None,
    };
    ticket.given = session.objects(&maps).map_err(|error| failed(&error))?;
    let link = session.programs.attach().map_err(|error| failed(&error))?;
    // From here on the broker waits for the client's requests without a time limit.
    socket::wait_for_requests(socket).map_err(|error| failed(&error))?;
    let given = [&maps.header, &maps.sum, &maps.own, &maps.ring, &link]
        .map(|descriptor| descriptor.as_fd());
    if socket::send(socket, &Reply::Done(0).bytes(), &given).is_err() {
        return Ok(None);
    }
    Ok(Some(session))
}

pub(super) fn make(means: &Means) -> io::Result<Outfit> {
    let (maps, mut programs) = Programs::make(RING, Audience::Client)?;
    let resolver = load_resolver(&programs.private()?, means.offsets)?;
    programs.set_resolver(resolver);
    Ok((maps, programs))
}

/// Receives the next request. Returns `None` if the connection has ended or failed.
fn receive(socket: &OwnedFd) -> Result<Option<(Request, Packet)>, Refusal> {
    let Ok(Some(packet)) = socket::receive(socket) else {
        return Ok(None);
    };
    match Request::parse(packet.bytes()) {
        // Without a free descriptor, the kernel delivers fewer than the client has sent.
        Some(request) if packet.descriptors.len() <= request.descriptors() => {
            Ok(Some((request, packet)))
        }
        _ => Err(Refusal::Nonsense),
    }
}

impl Session {
    /// Returns the objects that the client can keep.
    fn objects(&self, maps: &SharedMaps) -> io::Result<Vec<Object>> {
        let mut objects = vec![Object::Program(self.programs.number()?)];
        for map in [&maps.header, &maps.sum, &maps.own, &maps.ring] {
            objects.push(Object::Map(sys::number(map.as_fd())?));
        }
        Ok(objects)
    }

    /// Serves requests until the connection ends or a request fails.
    fn run(&mut self, socket: &OwnedFd) -> Result<(), Refusal> {
        while let Some((request, packet)) = receive(socket)? {
            let value = match (request, packet.take()) {
                (Request::Count, b) => u64::from(b.is_some_and(|[b]| self.count(b))),
                (Request::Forget, _) => {
                    let is_forgotten = self.programs.forget_b();
                    if is_forgotten {
                        self.b = None;
                    }
                    u64::from(is_forgotten)
                }
                (Request::Missed, _) => self
                    .programs
                    .missed_runs()
                    .map_err(|error| failed(&error))?,
                _ => return Err(Refusal::Nonsense),
            };
            if socket::send(socket, &Reply::Done(value).bytes(), &[]).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Makes the program read the count of machine `b`, and holds `b` open. Returns whether the
    /// count was found.
    fn count(&mut self, b: OwnedFd) -> bool {
        let is_found = self.programs.show(b.as_fd(), Role::B);
        if is_found {
            self.b = Some(b);
        }
        is_found
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The programs must forget the machines before the fields are dropped, because the fields
        // hold the machines open.
        if !self.programs.forget_all() {
            // The programs still read the machines' memory. So the machines must stay open as long
            // as the broker runs.
            std::mem::forget((self.b.take(), self.a.try_clone()));
        }
    }
}
