# Run by the agent before the first workload: everything that workloads read is in memory.
set -e
mkdir -p /tmp/data /tmp/scratch
cp -r /bench/data/. /tmp/data/
cp -r /usr/lib/python3.11 /tmp/data/tree
rm -rf /tmp/data/tree/test
tar -C /tmp/data -cf /tmp/data/tree.tar tree
