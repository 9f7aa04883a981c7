//! The client's side: how a process without the privileges gets the source from a broker.

use super::super::program;
use super::super::programs::SharedMaps;
use super::super::sys;
use super::message::{Reply, Request};
use super::socket::{self, Packet};
use super::{SOCKET, VARIABLE, check};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long the client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to a broker that serves this process.
///
/// The connection stays open as long as the source exists, because the broker treats the end of the
/// connection as the end of the client.
#[derive(Debug)]
pub(in super::super) struct Session {
    socket: OwnedFd,
    /// Whether a request has failed: the broker refused, did not answer, or answered nonsense. Then
    /// the client sends no more requests, because it would take a late answer for the answer to the
    /// next request.
    is_silent: AtomicBool,
}

/// What a client needs for its source: its machine, and the objects that the broker sent.
#[derive(Debug)]
pub(in super::super) struct Joined {
    pub(in super::super) maps: SharedMaps,
    pub(in super::super) session: Session,
    pub(in super::super) kvm: OwnedFd,
    /// The machine that the client sent to the broker.
    pub(in super::super) a: OwnedFd,
    /// The link that keeps the client's program at the tracepoint.
    pub(in super::super) link: OwnedFd,
}

/// The path where the client looks for a broker.
pub(in super::super) fn path() -> PathBuf {
    path_of(std::env::var_os(VARIABLE).filter(|_| !super::sys::is_privileged_by_exec()))
}

fn path_of(variable: Option<OsString>) -> PathBuf {
    variable
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| SOCKET.into())
        .into()
}

/// How the reason begins if no process listens at the path.
pub(in super::super) const NONE: &str = "none listens there";

/// Asks a broker to serve this process. Returns the reason if that fails, and `None` if there is no
/// broker.
pub(in super::super) fn join() -> Option<Result<Joined, String>> {
    let path = path();
    let socket = match socket::connect_to(&path, PATIENCE) {
        Ok(socket) => socket,
        Err(error) => {
            // Report the error if the path was given, or if a broker has left its socket behind.
            let is_none = error.kind() == io::ErrorKind::NotFound && path == Path::new(SOCKET);
            let why = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    format!("{NONE} ({error})")
                }
                _ => error.to_string(),
            };
            return (!is_none).then(|| Err(why));
        }
    };
    Some(with(socket))
}

pub(super) fn with(socket: OwnedFd) -> Result<Joined, String> {
    let in_words = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => format!("it did not answer within {} s", PATIENCE.as_secs()),
        _ => error.to_string(),
    };
    // The broker decides which changes this process learns of. So the client accepts only a broker
    // that runs as root or as the client's own user.
    let server = socket::peer(&socket).map_err(in_words)?;
    if server.user != 0 && server.user != super::sys::effective_user() {
        return Err(format!(
            "user {} listens there, who is neither root nor this user",
            server.user
        ));
    }
    let kind = "what came is not what a broker sends";
    let (version, greeting) = receive(&socket).map_err(in_words)??;
    if version != program::fingerprint(socket.as_fd()) {
        return Err(
            "it is of another version than this program: start one of the same version".to_owned(),
        );
    }
    let [kvm] = greeting.take().ok_or(kind)?;
    if !check::is_kvm(&kvm).map_err(in_words)? {
        return Err(kind.to_owned());
    }
    let a = sys::create_vm(kvm.as_fd()).map_err(in_words)?;
    socket::send(&socket, &Request::Join.bytes(), &[a.as_fd()]).map_err(in_words)?;
    let (_, given) = receive(&socket).map_err(in_words)??;
    let [header, sum, own, ring, link] = given.take().ok_or(kind)?;
    let maps = SharedMaps {
        header,
        sum,
        own,
        ring,
    };
    if !check::are_maps(&maps).map_err(in_words)? || !check::is_link(&link).map_err(in_words)? {
        return Err(kind.to_owned());
    }
    let session = Session {
        socket,
        is_silent: AtomicBool::new(false),
    };
    Ok(Joined {
        maps,
        session,
        kvm,
        a,
        link,
    })
}

/// Receives the broker's next answer, or its refusal in words.
fn receive(socket: &OwnedFd) -> io::Result<Result<(u64, Packet), String>> {
    let Some(packet) = socket::receive(socket)? else {
        return Err(io::ErrorKind::ConnectionReset.into());
    };
    Ok(match Reply::parse(packet.bytes()) {
        Some(Reply::Done(value)) => Ok((value, packet)),
        Some(Reply::Refused(refusal)) => Err(refusal.to_string()),
        None => Err("it does not speak as a broker does".to_owned()),
    })
}

impl Session {
    /// Tells whether the client sends no more requests to this broker.
    pub(in super::super) fn is_silent(&self) -> bool {
        self.is_silent.load(Ordering::Relaxed)
    }

    /// Sends a request, with a descriptor if `with` has one, and returns the number in the answer.
    /// Returns `None` if this request fails or an earlier one has failed.
    pub(in super::super) fn ask(
        &self,
        request: Request,
        with: Option<BorrowedFd<'_>>,
    ) -> Option<u64> {
        if self.is_silent() {
            return None;
        }
        let sent = socket::send(&self.socket, &request.bytes(), with.as_slice());
        let value = sent
            .and_then(|()| receive(&self.socket))
            .ok()
            .and_then(Result::ok)
            .map(|(value, _)| value);
        if value.is_none() {
            self.is_silent.store(true, Ordering::Relaxed);
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_names_no_broker() {
        assert_eq!(path_of(None), PathBuf::from(SOCKET));
        assert_eq!(path_of(Some(OsString::new())), PathBuf::from(SOCKET));
        assert_eq!(path_of(Some("/x".into())), PathBuf::from("/x"));
    }
}
