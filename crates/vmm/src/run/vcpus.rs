//! vCPU threads: each owns its vCPU, runs it when told, and tells why it stopped.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use pyrite_engine::{DebugPlan, EngineError, StopReason, Vcpu, VcpuControl, Vm};
use pyrite_x86::CpuState;

use super::Event;

/// What a vCPU thread is told.
enum Order {
    Run,
    State(Sender<Result<Box<CpuState>, EngineError>>),
    SetState(Box<CpuState>, Sender<Result<(), EngineError>>),
    SetDebug(DebugPlan, Sender<Result<(), EngineError>>),
}

/// The vCPUs of a machine, seen from the state driver.
pub(super) struct Vcpus {
    orders: Vec<Sender<Order>>,
    controls: Vec<Arc<dyn VcpuControl>>,
    /// Told to run and not heard of since.
    running: Vec<bool>,
    /// Stands still while others run.
    held: Vec<bool>,
}

fn gone() -> EngineError {
    EngineError::Internal("a vCPU thread has ended".into())
}

impl Vcpus {
    /// Starts the threads; all vCPUs stand still.
    pub fn spawn(vm: &Arc<dyn Vm>, count: u32, events: &Sender<Event>) -> anyhow::Result<Vcpus> {
        let mut all = Vcpus {
            orders: Vec::new(),
            controls: Vec::new(),
            running: Vec::new(),
            held: Vec::new(),
        };
        for index in 0..count {
            let vcpu = vm.take_vcpu(index)?;
            let (orders, inbox) = channel();
            let events = events.clone();
            std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || serve(index, vcpu, &inbox, &events))?;
            all.orders.push(orders);
            all.controls.push(vm.control(index));
            all.running.push(false);
            all.held.push(false);
        }
        Ok(all)
    }

    /// Lets every vCPU run that is not held.
    pub fn run(&mut self) {
        let vcpus = self.orders.iter().zip(&mut self.running);
        for ((order, running), held) in vcpus.zip(&self.held) {
            if !*running && !*held {
                *running = order.send(Order::Run).is_ok();
            }
        }
    }

    /// Has a stopped vCPU stand still, or not any more, when the others run.
    pub fn hold(&mut self, index: u32, held: bool) {
        if let Some(h) = self.held.get_mut(index as usize) {
            *h = held;
        }
    }

    /// No vCPU is held any more.
    pub fn release_all(&mut self) {
        self.held.fill(false);
    }

    /// Asks every vCPU to stop; each answers with [`Event::VcpuStopped`].
    pub fn ask_to_stop(&self) {
        for (control, running) in self.controls.iter().zip(&self.running) {
            if *running {
                control.stop();
            }
        }
    }

    /// Notes that a vCPU has stopped.
    pub fn stopped(&mut self, index: u32) {
        if let Some(r) = self.running.get_mut(index as usize) {
            *r = false;
        }
    }

    /// True if no vCPU runs.
    pub fn all_stopped(&self) -> bool {
        !self.running.iter().any(|r| *r)
    }

    /// The state of a stopped vCPU.
    pub fn state(&self, index: u32) -> Result<Box<CpuState>, EngineError> {
        let (answer, from) = channel();
        let order = self.orders.get(index as usize).ok_or_else(gone)?;
        order.send(Order::State(answer)).map_err(|_| gone())?;
        from.recv().map_err(|_| gone())?
    }

    /// Replaces the state of a stopped vCPU.
    pub fn set_state(&self, index: u32, state: Box<CpuState>) -> Result<(), EngineError> {
        let (answer, from) = channel();
        let order = self.orders.get(index as usize).ok_or_else(gone)?;
        order
            .send(Order::SetState(state, answer))
            .map_err(|_| gone())?;
        from.recv().map_err(|_| gone())?
    }

    /// What a stopped vCPU stops for when it runs again.
    pub fn set_debug(&self, index: u32, plan: DebugPlan) -> Result<(), EngineError> {
        let (answer, from) = channel();
        let order = self.orders.get(index as usize).ok_or_else(gone)?;
        order
            .send(Order::SetDebug(plan, answer))
            .map_err(|_| gone())?;
        from.recv().map_err(|_| gone())?
    }
}

fn serve(index: u32, mut vcpu: Box<dyn Vcpu>, inbox: &Receiver<Order>, events: &Sender<Event>) {
    while let Ok(order) = inbox.recv() {
        let heard = match order {
            Order::Run => {
                let reason: StopReason = vcpu.run();
                events.send(Event::VcpuStopped { index, reason }).is_ok()
            }
            Order::State(answer) => answer.send(vcpu.state().map(Box::new)).is_ok(),
            Order::SetState(state, answer) => answer.send(vcpu.set_state(&state)).is_ok(),
            Order::SetDebug(plan, answer) => answer.send(vcpu.set_debug(&plan)).is_ok(),
        };
        if !heard {
            return;
        }
    }
}
