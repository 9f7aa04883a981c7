//! The messages between a broker and its clients. Each message has a fixed size and fills one
//! packet.
//!
//! ```text
//!   broker   greeting: done, which version of the program         + /dev/kvm
//!   client   join                                                 + machine A
//!   broker   done                                                 + header, sum, own, ring, link
//!   client   count | forget | missed                              + machine B, for `count`
//!   broker   done, a number
//! ```
//!
//! The broker can replace any of its answers by a refusal, and answers no more after it. If the
//! client has not joined, the broker then closes the connection. If the client has joined, the
//! broker keeps the connection and what the client's program needs until the client closes it.

/// The first bytes of every message.
const MAGIC: [u8; 4] = *b"mmun";

/// A request of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Report the changes of the address space of the machine that comes with this request.
    Join,
    /// Let the program read the count of the machine that comes with this request. If the broker
    /// has no free descriptor for the machine, the count is not found.
    Count,
    /// Let the program read no machine's count any more.
    Forget,
    /// Return how often the kernel skipped the program.
    Missed,
}

/// An answer of a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    /// The request was carried out. The meaning of the number depends on the request.
    Done(u64),
    /// The request was refused, and the broker answers no more requests.
    Refused(Refusal),
}

/// Why a broker refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The user does not belong to the group that the broker serves.
    Stranger,
    /// All places are taken.
    Full,
    /// The user already has its share of the places.
    Share,
    /// The broker failed, with this errno.
    Failed(i32),
    /// The client sent a packet that is not a request, or not one that is allowed at this point.
    Nonsense,
}

impl Request {
    const ALL: [Self; 4] = [Self::Join, Self::Count, Self::Forget, Self::Missed];
    /// The size of a request.
    pub(crate) const BYTES: usize = 8;

    /// Parses a packet. Returns `None` if it is not a request.
    #[must_use]
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; Self::BYTES] = packet.try_into().ok()?;
        let (magic, kind) = packet.split_at(4);
        (magic == MAGIC).then_some(())?;
        Self::ALL
            .into_iter()
            .find(|request| kind == request.kind().to_le_bytes())
    }

    /// Returns the packet of this request.
    #[must_use]
    pub(crate) fn bytes(self) -> [u8; Self::BYTES] {
        let mut packet = [0; Self::BYTES];
        packet[..4].copy_from_slice(&MAGIC);
        packet[4..].copy_from_slice(&self.kind().to_le_bytes());
        packet
    }

    fn kind(self) -> u32 {
        self as u32
    }

    /// Returns how many descriptors accompany this request.
    #[must_use]
    pub(crate) fn descriptors(self) -> usize {
        usize::from(matches!(self, Self::Join | Self::Count))
    }
}

impl Reply {
    /// The size of a reply.
    pub(crate) const BYTES: usize = 16;

    /// Parses a packet. Returns `None` if it is not a reply.
    #[must_use]
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; Self::BYTES] = packet.try_into().ok()?;
        (packet[..4] == MAGIC).then_some(())?;
        let status = u32::from_le_bytes(packet[4..8].try_into().ok()?);
        let value = u64::from_le_bytes(packet[8..].try_into().ok()?);
        let refused = match status {
            0 => return Some(Self::Done(value)),
            1 => Refusal::Stranger,
            2 => Refusal::Full,
            3 => Refusal::Share,
            4 => Refusal::Failed(i32::try_from(value).ok()?),
            5 => Refusal::Nonsense,
            _ => return None,
        };
        // Only `Failed` has a value, so each reply has exactly one encoding.
        (value == 0 || status == 4).then_some(Self::Refused(refused))
    }

    /// Returns the packet of this reply.
    #[must_use]
    pub(crate) fn bytes(self) -> [u8; Self::BYTES] {
        let (status, value) = match self {
            Self::Done(value) => (0_u32, value),
            Self::Refused(Refusal::Stranger) => (1, 0),
            Self::Refused(Refusal::Full) => (2, 0),
            Self::Refused(Refusal::Share) => (3, 0),
            Self::Refused(Refusal::Failed(error)) => (4, u64::from(error.unsigned_abs())),
            Self::Refused(Refusal::Nonsense) => (5, 0),
        };
        let mut packet = [0; Self::BYTES];
        packet[..4].copy_from_slice(&MAGIC);
        packet[4..8].copy_from_slice(&status.to_le_bytes());
        packet[8..].copy_from_slice(&value.to_le_bytes());
        packet
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stranger => {
                f.write_str("it does not serve this user: its --group is another one")
            }
            Self::Full => f.write_str("all its places are taken (--max-clients)"),
            Self::Share => f.write_str("this user has its share of the places (--max-clients)"),
            Self::Failed(error) => write!(f, "{}", std::io::Error::from_raw_os_error(*error)),
            Self::Nonsense => {
                f.write_str("it does not understand this program: another version of mmun")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_parses_as_itself_and_no_other_packet_parses() {
        for request in Request::ALL {
            assert_eq!(Request::parse(&request.bytes()), Some(request));
        }
        let refusals = [
            Refusal::Stranger,
            Refusal::Full,
            Refusal::Share,
            Refusal::Failed(i32::MAX),
            Refusal::Nonsense,
        ];
        for reply in refusals
            .map(Reply::Refused)
            .into_iter()
            .chain([Reply::Done(0), Reply::Done(u64::MAX)])
        {
            let bytes = reply.bytes();
            assert_eq!(Reply::parse(&bytes), Some(reply));
            for length in 0..bytes.len() {
                assert_eq!(Reply::parse(&bytes[..length]), None);
            }
        }
        let mut packet = Request::Join.bytes();
        for byte in 0..=255 {
            packet[4] = byte;
            assert_eq!(Request::parse(&packet).is_some(), byte < 4);
        }
    }
}
