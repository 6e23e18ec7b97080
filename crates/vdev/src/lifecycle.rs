//! What the state driver asks of every unit of a machine.

use pyrite_state::{Inspect, Section, StateError};

/// A unit of the machine: started, paused, reset, saved and restored by the single state driver.
///
/// There are no default bodies: a unit that cannot be saved must say so and why.
///
/// Order: `save` only while paused and drained. `restore` only before the first `start`, on a unit
/// built from the same configuration. `reset` while paused.
pub trait Lifecycle: Send {
    /// Name within the machine, e.g. `uart0`. Constant.
    fn unit(&self) -> &str;
    /// Begins or goes on working (worker threads, host I/O).
    fn start(&mut self);
    /// Stops taking new work. Work in flight may still finish; see `drained`.
    fn pause(&mut self);
    /// True when paused and nothing is in flight.
    fn drained(&mut self) -> bool;
    /// Power-on state, as after the machine's reset line.
    fn reset(&mut self);
    /// The unit's state. Implementations destructure their state struct exhaustively.
    fn save(&mut self) -> Result<Section, StateError>;
    /// Takes a saved state over. On error the unit is in its power-on state.
    fn restore(&mut self, section: &Section) -> Result<(), StateError>;
    /// What a person may see of it.
    fn inspect(&self) -> Inspect;
}
