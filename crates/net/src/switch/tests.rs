use super::*;
use crate::offload::{complete, sample_segment};
use crate::testing::Collector;

const PATIENCE: Duration = Duration::from_secs(20);

fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Running {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    fn start(path: PathBuf) -> Running {
        let switch = Switch::listen(&path).unwrap();
        let stop = switch.stop();
        let thread = Some(std::thread::spawn(move || switch.run()));
        Running { path, stop, thread }
    }
    fn new(name: &str) -> Running {
        let name = format!("pyrite-switch-{name}-{}", std::process::id());
        Running::start(std::env::temp_dir().join(name))
    }
    fn machine(&self) -> (SwitchCable, Arc<Collector>) {
        let cable = SwitchCable::connect(&self.path).unwrap();
        let sink = Arc::new(Collector::default());
        cable.attach(sink.clone());
        (cable, sink)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap();
        let _ = std::fs::remove_file(&self.path);
    }
}

fn frame(to: u8, from: u8, n: u8) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    f.resize(60, n);
    f
}

const ALL: [u8; 6] = [0xff; 6];

#[test]
fn frames_go_where_their_address_was_seen() {
    let switch = Running::new("learns");
    let [(a, at_a), (b, at_b), (_c, at_c)] = [(); 3].map(|()| switch.machine());
    // Not known yet: to all others.
    a.transmit(&frame(2, 1, 0));
    until("flooded", || {
        at_b.frames().len() == 1 && at_c.frames().len() == 1
    });
    b.transmit(&frame(1, 2, 1));
    until("answered", || at_a.frames().len() == 1);
    a.transmit(&frame(2, 1, 2));
    until("forwarded", || at_b.frames().len() == 2);
    let mut broadcast = frame(0, 1, 3);
    broadcast[..6].copy_from_slice(&ALL);
    a.transmit(&broadcast);
    until("broadcast", || {
        at_c.frames().len() == 2 && at_b.frames().len() == 3
    });
    // The third has seen neither the answer nor what was for the second.
    assert_eq!(at_c.frames(), [frame(2, 1, 0), broadcast]);
    assert_eq!(at_a.frames(), [frame(1, 2, 1)], "nothing comes back");
}

#[test]
fn segments_pass_and_are_completed_for_those_who_need_it() {
    let switch = Running::new("segments");
    let [(a, _), (_b, at_b)] = [(); 2].map(|()| switch.machine());
    let (segment, offload) = sample_segment(false, &[5; 50_000]);
    a.transmit_offloaded(&segment, &offload);
    until("all of it", || at_b.frames().len() == 50);
    let mut expected = Vec::new();
    complete(&segment, &offload, &mut |f| expected.push(f.to_vec()));
    assert_eq!(at_b.frames(), expected);
}

#[test]
fn machines_outlive_each_other_and_the_switch() {
    let switch = Running::new("survive");
    let (a, at_a) = switch.machine();
    let (b, _) = switch.machine();
    let (c, at_c) = switch.machine();
    b.transmit(&frame(9, 2, 0));
    until("flooded", || at_a.frames().len() == 1);
    drop(b);
    a.transmit(&frame(3, 1, 1));
    until("two are left", || at_c.frames().contains(&frame(3, 1, 1)));
    let path = switch.path.clone();
    drop(switch);
    let _next = Running::start(path);
    // They find the next one by themselves.
    until("again", || {
        c.transmit(&frame(1, 3, 2));
        std::thread::sleep(Duration::from_millis(20));
        at_a.frames().contains(&frame(1, 3, 2))
    });
}

#[test]
fn a_machine_that_takes_nothing_loses_only_its_own() {
    let switch = Running::new("slow");
    let [(a, _), (_slow, at_slow), (_c, at_c)] = [(); 3].map(|()| switch.machine());
    at_slow.refuse(true);
    let mut broadcast = vec![0; 1500];
    broadcast[..6].copy_from_slice(&ALL);
    broadcast[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    for n in 0..8000_u32 {
        broadcast[20..24].copy_from_slice(&n.to_le_bytes());
        a.transmit(&broadcast);
        // Not faster than the third can take them.
        if n % 100 == 99 {
            until("third", || at_c.frames().len() == n as usize + 1);
        }
    }
    assert_eq!(at_slow.frames().len(), 0);
}

#[test]
fn strangers_are_shown_out() {
    let switch = Running::new("strangers");
    let (a, at_a) = switch.machine();
    let stranger = sys::connect_packets(&switch.path).unwrap();
    let mut message = vec![0; vnet::BYTES];
    message.extend_from_slice(&frame(1, 7, 7));
    sys::write(stranger.as_fd(), &[], &message).unwrap();
    until("shown out", || {
        matches!(sys::read(stranger.as_fd(), &mut [0; 10]), Ok(0))
    });
    // Too short, a group address as the source, a header of nonsense: nobody is harmed.
    let odd = sys::connect_packets(&switch.path).unwrap();
    sys::write(odd.as_fd(), &[], HELLO).unwrap();
    let mut group = message.clone();
    group[vnet::BYTES + 6] = 1;
    let mut nonsense = message.clone();
    nonsense[..vnet::BYTES].fill(0xff);
    for m in [&message[..5], &message[..20], &group, &nonsense, &message] {
        sys::write(odd.as_fd(), &[], m).unwrap();
    }
    until("the good one", || at_a.frames().len() == 1);
    assert_eq!(at_a.frames(), [frame(1, 7, 7)]);
    drop(a);
}

#[test]
fn addresses_of_one_machine_are_limited() {
    let switch = Running::new("flood");
    let [(a, _), (b, _), (_c, at_c)] = [(); 3].map(|()| switch.machine());
    b.transmit(&frame(1, 200, 0));
    until("first", || at_c.frames().len() == 1);
    for n in 0..2000_u16 {
        let mut f = frame(99, 0, 0);
        f[8..10].copy_from_slice(&n.to_be_bytes());
        a.transmit(&f);
        if n % 100 == 99 {
            until("flooded", || at_c.frames().len() == usize::from(n) + 2);
        }
    }
    // The second's address is still known: the third does not see this one.
    a.transmit(&frame(200, 1, 5));
    a.transmit(&frame(98, 1, 6));
    until("last", || at_c.frames().contains(&frame(98, 1, 6)));
    assert!(!at_c.frames().contains(&frame(200, 1, 5)));
}
