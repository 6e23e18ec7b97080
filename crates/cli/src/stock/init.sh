#!/bin/busybox sh
# First process of the stock guest: mounts, modules, network, one shell, power-off.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp

while read -r module; do
    insmod "/lib/modules/$module" 2>/dev/null
done </lib/modules/order

hostname pyrite
ip link set lo up
tty=ttyS0
size=
for word in $(cat /proc/cmdline); do
    case $word in
        pyrite.console=*) tty=${word#*=} ;;
        pyrite.size=*) size=${word#*=} ;;
    esac
done
# The virtio console shows up a moment after its module.
n=0
while [ ! -c "/dev/$tty" ] && [ $n -lt 50 ]; do
    n=$((n + 1))
    usleep 20000
done
[ -c "/dev/$tty" ] || tty=ttyS0

if [ -d /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -i eth0 -s /etc/udhcpc.script -t 5 -T 1 -b >/dev/null 2>&1
fi

# The power button ends the guest as `poweroff` does.
if [ -c /dev/input/event0 ]; then
    mkdir -p /etc/acpi/PWRF
    printf '#!/bin/sh\nsync\npoweroff -f\n' >/etc/acpi/PWRF/00000080
    chmod 755 /etc/acpi/PWRF/00000080
    acpid -l /dev/null
fi

exec <"/dev/$tty" >"/dev/$tty" 2>&1
[ -n "$size" ] && [ "$tty" = ttyS0 ] && stty cols "${size%x*}" rows "${size#*x}"
address=$(ip -4 -o addr show dev eth0 2>/dev/null | awk '{ print $4 }')
echo
echo "Linux $(uname -r), $(nproc) CPU, $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB, network ${address:-none}"
echo "Leave with exit, or Ctrl-A x. Ctrl-A h shows more keys."
cd /root
# A session of its own, whose controlling terminal is the console: job control works.
setsid sh -c "exec sh -l <'/dev/$tty' >'/dev/$tty' 2>&1"
sync
poweroff -f
