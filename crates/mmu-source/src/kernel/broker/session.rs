//! What a broker does for one client.
//!
//! Each client has a thread of its own in the broker: one that hangs, floods, or hands over a
//! descriptor that takes for ever to close holds up no other client.
//!
//! The client's machines are held open here as long as the programs have an address in them: memory
//! that was freed and has become something else is never read, and an address space that has ended
//! is never taken for another one. When the connection ends, the programs forget both.

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

/// How long a client may take to join, and to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What all sessions share.
#[derive(Debug)]
pub(super) struct Means {
    /// A machine of the broker's, to know others by.
    pub(super) machine: OwnedFd,
    pub(super) offsets: Offsets,
    /// What the next client is given.
    pub(super) ready: Ready<Outfit>,
}

/// The maps and the programs of one client.
pub(super) type Outfit = (SharedMaps, Programs);

/// Serves a client until it goes.
pub(super) fn serve(socket: &OwnedFd, means: &Means, ticket: &mut Ticket) {
    let refused = match join(socket, means, ticket) {
        Ok(Some(mut session)) => session.run(socket).err(),
        Ok(None) => None,
        Err(refusal) => Some(refusal),
    };
    if let Some(refusal) = refused {
        let _ = socket::send(socket, &Reply::Refused(refusal).bytes(), &[]);
    }
}

/// Tells whether clients could be served. What that takes is kept for the first client.
pub(super) fn rehearse(means: &Means) -> Result<(), Error> {
    let (maps, programs) = make(means).map_err(|error| missing::bpf_missing(&error))?;
    // Detached at once, before the program knows an address space: it leaves no trace of others.
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
    /// Held so that the address space does not become another one.
    a: OwnedFd,
    b: Option<OwnedFd>,
}

fn failed(error: &io::Error) -> Refusal {
    Refusal::Failed(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Waits for the client's first request and makes what it is given; `None` if it has gone.
fn join(socket: &OwnedFd, means: &Means, ticket: &mut Ticket) -> Result<Option<Session>, Refusal> {
    let be_patient =
        |patience| socket::be_patient(socket, patience).map_err(|error| failed(&error));
    be_patient(Some(PATIENCE))?;
    let Some((request, packet)) = receive(socket)? else {
        return Ok(None);
    };
    let a = match (request, packet.take()) {
        (Request::Join, Some([a])) => a,
        _ => return Err(Refusal::Nonsense),
    };
    let made = means.ready.take().map_or_else(|| make(means), Ok);
    let (maps, programs) = made.map_err(|error| failed(&error))?;
    // Only what has the operations of our own machine is one.
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
    let given = [&maps.header, &maps.sum, &maps.own, &maps.ring, &link]
        .map(|descriptor| descriptor.as_fd());
    if socket::send(socket, &Reply::Done(0).bytes(), &given).is_err() {
        return Ok(None);
    }
    // From here on it may be silent for as long as it likes.
    socket::be_patient(socket, None).map_err(|error| failed(&error))?;
    Ok(Some(session))
}

pub(super) fn make(means: &Means) -> io::Result<Outfit> {
    let (maps, mut programs) = Programs::make(RING, Audience::Client)?;
    let resolver = load_resolver(&programs.private()?, means.offsets)?;
    programs.set_resolver(resolver);
    Ok((maps, programs))
}

/// The next request; `None` if there is none any more.
fn receive(socket: &OwnedFd) -> Result<Option<(Request, Packet)>, Refusal> {
    let Ok(Some(packet)) = socket::receive(socket) else {
        return Ok(None);
    };
    match Request::parse(packet.bytes()) {
        Some(request) if request.descriptors() == packet.descriptors.len() => {
            Ok(Some((request, packet)))
        }
        _ => Err(Refusal::Nonsense),
    }
}

impl Session {
    /// What the client can hold on to.
    fn objects(&self, maps: &SharedMaps) -> io::Result<Vec<Object>> {
        let mut objects = vec![Object::Program(self.programs.number()?)];
        for map in [&maps.header, &maps.sum, &maps.own, &maps.ring] {
            objects.push(Object::Map(sys::number(map.as_fd())?));
        }
        Ok(objects)
    }

    fn run(&mut self, socket: &OwnedFd) -> Result<(), Refusal> {
        while let Some((request, packet)) = receive(socket)? {
            let value = match (request, packet.take()) {
                (Request::Count, Some([b])) => u64::from(self.count(b)),
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
            socket::be_patient(socket, Some(PATIENCE)).map_err(|error| failed(&error))?;
            if socket::send(socket, &Reply::Done(value).bytes(), &[]).is_err() {
                return Ok(());
            }
            socket::be_patient(socket, None).map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// Has the program read the count of this machine.
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
        // Before the machines are closed, which are fields of this.
        if !self.programs.forget_all() {
            // The programs go on reading: so what they read has to stay, as long as the broker
            // does.
            std::mem::forget((self.b.take(), self.a.try_clone()));
        }
    }
}
