/*
 * What the kernel is asked to do most:
 *   system fault ROUNDS        map 16 MiB, touch every page, unmap
 *   system pipe ROUNDS         a byte to another process and back
 *   system copy BYTES ROUNDS   memcpy of that size, source and target in turns
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int fault(unsigned long rounds)
{
    const size_t size = 16 << 20;
    while (rounds--) {
        volatile char *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || madvise((void *)p, size, MADV_NOHUGEPAGE))
            return 1;
        for (size_t at = 0; at < size; at += 4096)
            p[at] = 1;
        munmap((void *)p, size);
    }
    return 0;
}

static int ping_pong(unsigned long rounds)
{
    int there[2], back[2], status;
    char byte = 1;
    if (pipe(there) || pipe(back))
        return 1;
    pid_t pid = fork();
    if (pid < 0)
        return 1;
    if (!pid) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    while (rounds--)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            return 1;
    close(there[1]);
    waitpid(pid, &status, 0);
    return status != 0;
}

static int copy(size_t size, unsigned long rounds)
{
    char *a = malloc(size + 64), *b = malloc(size + 64);
    if (!a || !b)
        return 1;
    memset(a, 1, size + 64);
    memset(b, 2, size + 64);
    /* Offsets change so that not every copy is aligned. */
    for (unsigned long r = 0; r < rounds; r++) {
        memcpy(a + (r & 31), b + (r >> 5 & 31), size);
        __asm__ volatile("" : : "r"(a) : "memory");
    }
    return a[size / 2] != 2;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "fault"))
        return fault(strtoul(argv[2], 0, 10));
    if (argc == 3 && !strcmp(argv[1], "pipe"))
        return ping_pong(strtoul(argv[2], 0, 10));
    if (argc == 4 && !strcmp(argv[1], "copy"))
        return copy(strtoul(argv[2], 0, 10), strtoul(argv[3], 0, 10));
    return 2;
}
