//! Processor time of running processes, from /proc.

use std::fs;
use std::time::Duration;

/// The process and all that descend from it.
pub fn family(root: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        if let Some(parent) = parent(&stat) {
            parents.push((pid, parent));
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while let Some(&pid) = found.get(at) {
        at += 1;
        for (child, _) in parents.iter().filter(|(_, p)| *p == pid) {
            if !found.contains(child) {
                found.push(*child);
            }
        }
    }
    found
}

/// Parent in a line of /proc/PID/stat (proc_pid_stat(5)); the name may hold anything.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// A tick of /proc: USER_HZ is 100 on x86.
const NS_PER_TICK: u64 = 10_000_000;

/// cutime and cstime in a line of /proc/PID/stat: fields 16 and 17.
fn ended_children_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    // The first field after the name is number 3.
    let mut fields = rest.split_whitespace().skip(13);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Time that all threads of `pids` ran, and children of theirs that have ended. A thread that has ended is
/// not counted.
pub fn cpu_time(pids: &[u32]) -> Duration {
    let mut sum = 0;
    for pid in pids {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            // First field: nanoseconds on a CPU.
            let ran = text
                .split_whitespace()
                .next()
                .and_then(|n| n.parse::<u64>().ok());
            sum += ran.unwrap_or(0);
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        sum += ended_children_ticks(&stat).unwrap_or(0) * NS_PER_TICK;
    }
    Duration::from_nanos(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_found_behind_any_name() {
        assert_eq!(parent("12 (a) b (c) S 7 12 12 0"), Some(7));
        assert_eq!(parent("nothing"), None);
        let line = "12 (a) b) R 1 12 12 0 -1 4194304 10 20 0 0 5 6 70 8 20 0 1 0 100";
        assert_eq!(ended_children_ticks(line), Some(78));
    }

    #[test]
    fn own_time_passes_and_children_are_of_the_family() {
        let me = std::process::id();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep");
        assert!(family(me).contains(&child.id()));
        child.kill().expect("kill");
        child.wait().expect("wait");
        let before = cpu_time(&[me]);
        let until = std::time::Instant::now() + Duration::from_millis(200);
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_millis(1));
        assert!(cpu_time(&[me]) > before);
    }
}
