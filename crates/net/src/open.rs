//! A cable whose other end is not plugged into anything.

use std::sync::Arc;

use crate::{FrameSink, NetBackend};

/// What is sent is lost, and nothing comes.
pub struct Open;

impl NetBackend for Open {
    fn attach(&self, _: Arc<dyn FrameSink>) {}
    fn transmit(&self, _: &[u8]) {}
    fn transmit_offloaded(&self, _: &[u8], _: &crate::Offload) {}
    fn receive_ready(&self) {}
    fn pause(&self, _: bool) {}
}
