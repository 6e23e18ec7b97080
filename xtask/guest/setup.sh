#!/bin/sh
# Makes a Debian tree the benchmark's: setup.sh ROOT FILES. FILES holds what is beside this script.
# Leaves /bench in the tree and /boot/initrd-own, an initial RAM disk that only mounts the disk.
set -eu
root=$1 files=$2

b=$root/bench
mkdir -p "$b/bin" "$b/data" "$b/src"
cp "$files"/* "$b/src/"
mv "$b/src/prepare.sh" "$b/prepare.sh"

cat >"$b/build.sh" <<'END'
set -eu
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd /bench/src
gcc -O2 -Wall -static -o ../bin/agent agent.c
gcc -O3 -Wall -o ../bin/matrix-sse2 matrix.c
gcc -O3 -Wall -mavx2 -mfma -o ../bin/matrix-avx2 matrix.c
gcc -O2 -Wall -o ../bin/memory memory.c
gcc -O2 -Wall -o ../bin/system system.c
# The run-time package has the compiler as a module, without its command.
java -m jdk.compiler/com.sun.tools.javac.Main -d ../data Bench.java
for n in 126 12; do python3 generate.py $n >../data/functions-$n.c; done
cp bench.py bench.pl bench.js ../data/

# What is compressed: source text and machine code, 8 MiB.
cat /usr/lib/python3.11/*.py | head -c 4194304 >../data/corpus
head -c 4194304 /usr/lib/gcc/x86_64-linux-gnu/12/cc1 >>../data/corpus
[ "$(stat -c %s ../data/corpus)" = 8388608 ]

version=$(basename /lib/modules/*)
rm -rf /bench/initrd
mkdir -p /bench/initrd/modules /bench/initrd/dev /bench/initrd/root
cp ../bin/agent /bench/initrd/init
for module in crc32c_generic virtio_pci virtio_blk ext4; do
    modprobe --set-version "$version" --show-depends "$module"
done | while read -r verb path rest; do
    [ "$verb" = insmod ] || continue
    name=$(basename "$path")
    [ -e "/bench/initrd/modules/$name" ] && continue
    cp "$path" "/bench/initrd/modules/$name"
    echo "$name" >>/bench/initrd/order
done
mknod /bench/initrd/dev/console c 5 1 2>/dev/null || true
(cd /bench/initrd && find . | sort | cpio --quiet --reproducible -o -H newc) >/boot/initrd-own
rm -rf /bench/initrd
END
mount --rbind /proc "$root/proc" 2>/dev/null || true
status=0
chroot "$root" sh /bench/build.sh || status=$?
umount -l "$root/proc" 2>/dev/null || true
exit "$status"
