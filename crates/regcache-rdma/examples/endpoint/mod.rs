//! A reliable connection that reads and writes a peer's memory, for the examples and the tests.
//!
//! # Safety
//! A work request names memory by key and address. The device checks the key and the address
//! against the registered regions, so a wrong value only causes an error in the completion. The
//! callers of [`Endpoint::read`] and [`Endpoint::write`] must make sure that no other code uses the
//! bytes during the transfer.
#![allow(dead_code, reason = "each user needs only some of the functions")]

use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::address::{AddressHandleAttribute, Gid};
use sideway::ibverbs::completion::{
    BasicCompletionQueue, GenericCompletionQueue, PollCompletionQueueError, WorkCompletionStatus,
};
use sideway::ibverbs::device::{DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::{DeviceContext, Mtu};
use sideway::ibverbs::protection_domain::ProtectionDomain;
use sideway::ibverbs::queue_pair::{
    BasicQueuePair, PostSendGuard, QueuePair, QueuePairAttribute, QueuePairState,
    SetScatterGatherEntry, WorkRequestFlags,
};
use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// The device's port.
const PORT: u8 = 1;
/// The entry of the port's GID table for RoCE version 2 over IPv4.
const GID_INDEX: u8 = 1;
/// A completion that takes longer counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens the device whose name is first in alphabetical order.
pub(crate) fn open() -> Result<Arc<DeviceContext>, Failure> {
    let devices = DeviceList::new()?;
    let device = devices.iter().min_by_key(DeviceInfo::name);
    Ok(device
        .ok_or("no RDMA device; 'rdma link add rxe0 type rxe netdev NAME' makes one")?
        .open()?)
}

/// Opens a device by its name.
pub(crate) fn open_named(name: &str) -> Result<Arc<DeviceContext>, Failure> {
    let devices = DeviceList::new()?;
    let device = devices.iter().find(|device| device.name() == name);
    Ok(device
        .ok_or_else(|| format!("no RDMA device {name}"))?
        .open()?)
}

/// A memory address, with the key of its region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// The address of an endpoint: the number of its queue pair, and its GID. Peers exchange their
/// addresses before they connect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) number: u32,
    pub(crate) gid: [u8; 16],
}

/// One end of a reliable connection.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pair: BasicQueuePair,
    completions: Arc<BasicCompletionQueue>,
    gid: Gid,
    next: u64,
}

impl Endpoint {
    pub(crate) fn new(
        context: &Arc<DeviceContext>,
        domain: &Arc<ProtectionDomain>,
    ) -> Result<Self, Failure> {
        let completions = context.create_cq_builder().setup_cqe(16).build()?;
        let queue = GenericCompletionQueue::from(Arc::clone(&completions));
        let mut pair = domain
            .create_qp_builder()
            .setup_send_cq(queue.clone())
            .setup_recv_cq(queue)
            .setup_max_send_wr(16)
            .setup_max_recv_wr(1)
            .build()?;
        let mut state = QueuePairAttribute::new();
        state
            .setup_state(QueuePairState::Init)
            .setup_pkey_index(0)
            .setup_port(PORT)
            .setup_access_flags(
                AccessFlags::LocalWrite | AccessFlags::RemoteWrite | AccessFlags::RemoteRead,
            );
        pair.modify(&state)?;
        let gid = context.query_gid(PORT, GID_INDEX.into())?;
        Ok(Self {
            pair,
            completions,
            gid,
            next: 0,
        })
    }

    pub(crate) fn address(&self) -> Address {
        Address {
            number: self.pair.qp_number(),
            gid: self.gid.raw,
        }
    }

    pub(crate) fn connect(&mut self, peer: Address) -> Result<(), Failure> {
        let mut route = AddressHandleAttribute::new();
        route
            .setup_port(PORT)
            .setup_grh_src_gid_index(GID_INDEX)
            .setup_grh_dest_gid(&Gid { raw: peer.gid })
            .setup_grh_hop_limit(1);
        let mut state = QueuePairAttribute::new();
        state
            .setup_state(QueuePairState::ReadyToReceive)
            .setup_path_mtu(Mtu::Mtu1024)
            .setup_dest_qp_num(peer.number)
            .setup_rq_psn(0)
            .setup_max_dest_read_atomic(1)
            .setup_min_rnr_timer(1)
            .setup_address_vector(&route);
        self.pair.modify(&state)?;
        let mut state = QueuePairAttribute::new();
        state
            .setup_state(QueuePairState::ReadyToSend)
            .setup_sq_psn(0)
            // About one second of retries, then an error. The value 7 would mean endless retries on
            // soft-RoCE, as it does everywhere for `rnr_retry`.
            .setup_timeout(18)
            .setup_retry_cnt(6)
            .setup_rnr_retry(7)
            .setup_max_read_atomic(1);
        Ok(self.pair.modify(&state)?)
    }

    /// Reads `length` bytes from the peer's `from` to `to`, and waits until the device has stored
    /// them.
    ///
    /// # Safety
    /// No code of this process may read or write those bytes of `to` meanwhile.
    #[expect(unsafe_code, reason = "the device writes to memory")]
    pub(crate) unsafe fn read(
        &mut self,
        to: Place,
        from: Place,
        length: u32,
    ) -> Result<(), Failure> {
        self.next += 1;
        let mut post = self.pair.start_post_send();
        let request = post
            .construct_wr(self.next, WorkRequestFlags::Signaled)
            .setup_read(from.key, from.address);
        // SAFETY: the device may write to these bytes, because the caller promises that no code of
        // this process uses them meanwhile.
        unsafe { request.setup_sge(to.key, to.address, length) };
        post.post()?;
        self.wait()
    }

    /// Writes `length` bytes from `from` to the peer's `to`, and waits until the peer's device has
    /// received them.
    ///
    /// # Safety
    /// No code of this process may write those bytes of `from` meanwhile, and the peer must expect
    /// the write at `to`.
    #[expect(unsafe_code, reason = "the device writes to memory")]
    pub(crate) unsafe fn write(
        &mut self,
        from: Place,
        to: Place,
        length: u32,
    ) -> Result<(), Failure> {
        self.next += 1;
        let mut post = self.pair.start_post_send();
        let request = post
            .construct_wr(self.next, WorkRequestFlags::Signaled)
            .setup_write(to.key, to.address);
        // SAFETY: the device may read these bytes, because the caller promises that no code of this
        // process writes to them meanwhile.
        unsafe { request.setup_sge(from.key, from.address, length) };
        post.post()?;
        self.wait()
    }

    fn wait(&self) -> Result<(), Failure> {
        let begin = Instant::now();
        loop {
            match self.completions.start_poll() {
                Err(PollCompletionQueueError::CompletionQueueEmpty) => {
                    if begin.elapsed() > PATIENCE {
                        return Err(format!("no completion within {PATIENCE:?}").into());
                    }
                    thread::yield_now();
                }
                Err(error) => return Err(error.into()),
                Ok(mut completions) => {
                    let Some(completion) = completions.next() else {
                        continue;
                    };
                    return match WorkCompletionStatus::from(completion.status()) {
                        WorkCompletionStatus::Success => Ok(()),
                        status => Err(Refused(status).into()),
                    };
                }
            }
        }
    }
}

/// The error of a work request whose completion reports no success.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) WorkCompletionStatus);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the work request ended with {:?}", self.0)
    }
}

impl Error for Refused {}

/// Two endpoints of one process, connected.
pub(crate) fn connected(
    context: &Arc<DeviceContext>,
    domain: &Arc<ProtectionDomain>,
) -> Result<(Endpoint, Endpoint), Failure> {
    let (mut one, mut two) = (
        Endpoint::new(context, domain)?,
        Endpoint::new(context, domain)?,
    );
    one.connect(two.address())?;
    two.connect(one.address())?;
    Ok((one, two))
}
