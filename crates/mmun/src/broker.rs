//! `mmun broker`: the kernel source for processes that lack the rights.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use mmu_source::kernel::broker::{Broker, Event, Options, SOCKET};

use crate::args::BrokerArgs;
use crate::complain;
use crate::outcome::Outcome;
use crate::sys;

const FAILED: Outcome = Outcome::Exit(2);

pub(crate) fn main(args: BrokerArgs) -> Outcome {
    let options = Options {
        group: args.group,
        max_clients: args.max_clients.into(),
    };
    let made = match Broker::inherited(&options) {
        Ok(Some(broker)) => Ok(broker),
        Ok(None) => {
            make_folder(&args.socket);
            Broker::bind(&args.socket, &options).inspect(|_| sys::remove_at_end(&args.socket))
        }
        Err(error) => Err(error),
    };
    match made {
        Ok(broker) if args.verbose => broker.serve(|event| complain(&line(event))),
        Ok(broker) => broker.serve(|_| ()),
        Err(error) => {
            complain(&format!(
                "broker at {}: {}",
                args.socket.display(),
                crate::explain(&error)
            ));
            FAILED
        }
    }
}

/// Makes the folder of the socket if `socket` is the default path, because a reboot empties `/run`.
/// If that fails, binding the socket reports the error.
fn make_folder(socket: &Path) {
    let folder = Path::new(SOCKET).parent().expect("it is in a folder");
    if socket == Path::new(SOCKET) && fs::create_dir(folder).is_ok() {
        let _ = fs::set_permissions(folder, Permissions::from_mode(0o755));
    }
}

fn line(event: Event) -> String {
    match event {
        Event::Came { user, pid } => format!("process {pid} of user {user} came"),
        Event::Went { user, pid } => format!("process {pid} of user {user} went"),
        Event::Refused { user, pid, why } => {
            format!("process {pid} of user {user} was refused: {why}")
        }
        _ => "something else happened".to_owned(),
    }
}
