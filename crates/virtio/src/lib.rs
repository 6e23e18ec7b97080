//! pyrite-virtio
