//! Saved form of a function's configuration space.

use minicbor::{Decode, Encode};

/// What [`super::ConfigSpace::save`] gives; embed it in the function's own saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ConfigSaved {
    /// The 256 bytes of conventional configuration space. Only writable bits are restored.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
    /// The function asserts its INTx pin.
    #[n(1)]
    pub intx_level: bool,
    /// MSI-X table, 16 bytes per vector.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub msix_table: Vec<u8>,
    /// MSI-X pending bits.
    #[n(3)]
    pub msix_pending: Vec<u64>,
    /// MSI pending bits.
    #[n(4)]
    pub msi_pending: u32,
}
