//! The workloads: what runs, how much of it, and what is counted.

/// What a mean is taken over besides everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Floating point, SIMD, bulk copies.
    Simd,
    Crypto,
    /// Language run times that write machine code.
    Jit,
    /// Kernel entries, processes, page tables.
    Kernel,
    /// Everything else.
    User,
}

impl Group {
    pub const ALL: [Group; 5] = [
        Group::Simd,
        Group::Crypto,
        Group::Jit,
        Group::Kernel,
        Group::User,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Group::Simd => "FP/SIMD",
            Group::Crypto => "crypto",
            Group::Jit => "JIT",
            Group::Kernel => "kernel",
            Group::User => "user",
        }
    }

    pub fn of(name: &str) -> Option<Group> {
        Group::ALL.into_iter().find(|g| g.name() == name)
    }
}

/// One workload.
#[derive(Debug)]
pub struct Workload {
    pub name: &'static str,
    pub group: Group,
    /// Unit of the rate that the command prints as `@rate NUMBER`; seconds of its run otherwise.
    pub rate: Option<&'static str>,
    /// Shell command; `@N` is the size.
    pub command: &'static str,
    pub size: &'static str,
    pub quick: &'static str,
}

impl Workload {
    pub fn command(&self, quick: bool) -> String {
        self.command
            .replace("@N", if quick { self.quick } else { self.size })
    }
}

const fn timed(
    name: &'static str,
    group: Group,
    command: &'static str,
    size: &'static str,
    quick: &'static str,
) -> Workload {
    Workload {
        name,
        group,
        rate: None,
        command,
        size,
        quick,
    }
}

const fn rated(
    name: &'static str,
    group: Group,
    unit: &'static str,
    command: &'static str,
    size: &'static str,
    quick: &'static str,
) -> Workload {
    Workload {
        name,
        group,
        rate: Some(unit),
        command,
        size,
        quick,
    }
}

use Group::{Crypto, Jit, Kernel, Simd, User};

/// All of them, in the order in which they run. Sizes: natively a tenth of a second to a second.
pub const ALL: &[Workload] = &[
    timed(
        "gcc",
        User,
        "gcc -O2 -c /tmp/data/functions-@N.c -o f.o",
        "126",
        "12",
    ),
    timed("matrix-sse2", Simd, "matrix-sse2 512 @N", "3", "1"),
    timed("matrix-avx2", Simd, "matrix-avx2 512 @N", "5", "1"),
    timed("memory", User, "memory @N", "1", "1"),
    timed(
        "python",
        User,
        "python3 /tmp/data/bench.py @N 60000",
        "12000",
        "1000",
    ),
    rated(
        "rsa2048-sign",
        Crypto,
        "1/s",
        "openssl speed -mr -elapsed -seconds @N rsa2048 2>/dev/null | \
         sed -n 's/^+F2:[0-9]*:2048:\\([0-9.]*\\):.*/@rate \\1/p'",
        "1",
        "1",
    ),
    rated(
        "sha256",
        Crypto,
        "B/s",
        concat!(
            "openssl speed -mr -elapsed -seconds @N -bytes 16384 -evp sha256 2>/dev/null | ",
            "sed -n 's/^+F:[0-9]*:[^:]*:\\([0-9.]*\\)$/@rate \\1/p'"
        ),
        "1",
        "1",
    ),
    rated(
        "aes-256-gcm",
        Crypto,
        "B/s",
        concat!(
            "openssl speed -mr -elapsed -seconds @N -bytes 16384 -evp aes-256-gcm 2>/dev/null | ",
            "sed -n 's/^+F:[0-9]*:[^:]*:\\([0-9.]*\\)$/@rate \\1/p'"
        ),
        "1",
        "1",
    ),
    rated(
        "chacha20-poly1305",
        Crypto,
        "B/s",
        concat!(
            "openssl speed -mr -elapsed -seconds @N -bytes 16384 -evp chacha20-poly1305 2>/dev/null | ",
            "sed -n 's/^+F:[0-9]*:[^:]*:\\([0-9.]*\\)$/@rate \\1/p'"
        ),
        "1",
        "1",
    ),
    timed(
        "sysbench-cpu",
        User,
        "sysbench cpu --events=@N --time=0 run",
        "2000",
        "100",
    ),
    rated(
        "7zr",
        User,
        "MIPS",
        "7zr b -mmt1 -md@N -mtime=1 1 | sed -n 's/^Tot:.* \\([0-9][0-9]*\\)$/@rate \\1/p'",
        "18",
        "18",
    ),
    timed(
        "sqlite",
        User,
        "sqlite3 :memory: \"\
        create table t(a integer primary key, b text, c integer); \
        insert into t with recursive n(i) as (select 1 union all select i+1 from n where i<@N) \
        select i, printf('row %d', i*7919/10), i*31/7 from n; \
        create index tb on t(b); create index tc on t(c); \
        select count(*), sum(a) from t where b like 'row 9%'; \
        select c/1000, count(*) from t group by c/1000 order by 2 desc limit 3;\"",
        "60000",
        "3000",
    ),
    timed(
        "gzip",
        User,
        "head -c @N /tmp/data/corpus | gzip -6 >c.gz",
        "4194304",
        "262144",
    ),
    timed(
        "zstd",
        User,
        "head -c @N /tmp/data/corpus | zstd -q -6 >c.zst",
        "6291456",
        "262144",
    ),
    timed(
        "xz",
        User,
        "head -c @N /tmp/data/corpus | xz -6 >c.xz",
        "1048576",
        "131072",
    ),
    timed(
        "bash-fork-exec",
        Kernel,
        "bash -c 'for ((i=0;i<@N;i++)); do /bin/true; done'",
        "500",
        "25",
    ),
    timed(
        "bash-loop",
        User,
        "bash -c 'for ((i=0,s=0;i<@N;i++)); do ((s+=i*31,s>65537?s=1:0)); done; echo $s'",
        "200000",
        "10000",
    ),
    timed(
        "dd-bs1",
        Kernel,
        "dd if=/dev/zero of=/dev/null bs=1 count=@N 2>&1",
        "1000000",
        "50000",
    ),
    timed("page-faults", Kernel, "system fault @N", "50", "5"),
    timed("pipe", Kernel, "system pipe @N", "50000", "2500"),
    timed(
        "memcpy-64",
        Simd,
        "system copy 64 @N",
        "30000000",
        "1000000",
    ),
    timed("memcpy-16m", Simd, "system copy 16777216 @N", "80", "10"),
    timed(
        "dd-bs1m",
        Kernel,
        "dd if=/dev/zero of=/dev/null bs=1M count=@N 2>&1",
        "8000",
        "400",
    ),
    timed(
        "tar",
        Kernel,
        "for i in $(seq @N); do tar -cf - -C /tmp/data tree | tar -xf -; done",
        "2",
        "1",
    ),
    timed(
        "perl-regex",
        User,
        "perl /tmp/data/bench.pl @N",
        "60000",
        "3000",
    ),
    timed("node", Jit, "node /tmp/data/bench.js @N", "12", "1"),
    timed("java", Jit, "java -cp /tmp/data Bench @N", "12", "1"),
];

/// The workloads of a comma-separated list.
pub fn named(list: &str) -> Result<Vec<&'static Workload>, String> {
    list.split(',')
        .map(|name| {
            ALL.iter().find(|w| w.name == name).ok_or_else(|| {
                let all: Vec<&str> = ALL.iter().map(|w| w.name).collect();
                format!("no workload {name:?}; there are {}", all.join(", "))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_have_names_sizes_and_one_line() {
        for (n, w) in ALL.iter().enumerate() {
            assert!(
                ALL[..n].iter().all(|other| other.name != w.name),
                "{}",
                w.name
            );
            for quick in [false, true] {
                let command = w.command(quick);
                assert!(
                    !command.contains(['\n', '@']) || w.rate.is_some(),
                    "{command}"
                );
                assert!(
                    !command.contains("@N") && !command.contains('\n'),
                    "{command}"
                );
            }
            assert_eq!(w.rate.is_some(), w.command.contains("@rate"), "{}", w.name);
        }
    }
}
