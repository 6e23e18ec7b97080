//! Data on their way through the data register.

use minicbor::{Decode, Encode};

use crate::storage::ata::{Pending, TaskFile};

/// Bytes of the medium that are still to be moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Span {
    #[n(0)]
    pub offset: u64,
    #[n(1)]
    pub len: u64,
    /// Written blocks go to the medium before the command is done.
    #[n(2)]
    pub fua: bool,
}

/// Where a command stands.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum Phase {
    /// There is none.
    #[n(0)]
    Idle,
    /// A back end works on it.
    #[n(1)]
    Busy,
    /// The drive waits for a command packet.
    #[n(2)]
    Packet(#[n(0)] PacketWait),
    /// The host reads data.
    #[n(3)]
    In(#[n(0)] Data),
    /// The host writes data.
    #[n(4)]
    Out(#[n(0)] Data),
    /// The drive waits for the bus master.
    #[n(5)]
    Dma(#[n(0)] DmaWait),
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct PacketWait {
    #[n(0)]
    pub task: TaskFile,
    #[n(1)]
    pub dma: bool,
    #[cbor(n(2), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
    #[n(3)]
    pub pending: Pending,
}

/// One DRQ block after another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Data {
    /// What the host reads or has written of this piece.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
    /// Bytes of this piece in all, when the host writes.
    #[n(1)]
    pub piece: u32,
    /// Read so far.
    #[n(2)]
    pub pos: u32,
    /// End of this DRQ block.
    #[n(3)]
    pub block_end: u32,
    /// Bytes of a DRQ block at most.
    #[n(4)]
    pub block: u32,
    /// What follows this piece, on the medium.
    #[n(5)]
    pub rest: Span,
    /// Place of this piece on the medium, when the host writes; `None`: parameters.
    #[n(6)]
    pub place: Option<u64>,
    #[n(7)]
    pub pending: Pending,
    /// For packets: the number of bytes is told before each block.
    #[n(8)]
    pub packet: bool,
    /// Command that parameters belong to.
    #[n(9)]
    pub task: TaskFile,
    #[cbor(n(10), with = "minicbor::bytes")]
    pub cdb: Vec<u8>,
}

/// What the bus master is to move.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct DmaWait {
    #[n(0)]
    pub task: TaskFile,
    /// Command packet, if it is one.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub cdb: Vec<u8>,
    /// Bytes for the host, if they are ready.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub reply: Vec<u8>,
    #[n(3)]
    pub pending: Pending,
}
