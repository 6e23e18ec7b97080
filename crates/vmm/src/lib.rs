//! pyrite-vmm
