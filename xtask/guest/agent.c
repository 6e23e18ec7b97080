/*
 * The runner of `cargo xtask bench guest`: one static program that is the first process of the
 * initial RAM disk, then of the disk, and that also runs natively in a chroot.
 *
 *   /init            loads the modules of /order, mounts /dev/vda read-only, goes on from there
 *   agent guest      mounts /proc, /sys, /dev and memory file systems, serves on /dev/ttyS0
 *   agent native     the same on standard input and output; whoever starts it has mounted things
 *
 * Requests, one a line:   ID COPIES LIMIT_SECONDS SHELL-COMMAND
 *                         clean                               remove what the workload has written
 *                         quit
 * Answers:                @B ID NANOSECONDS                   begins, CLOCK_MONOTONIC
 *                         @V ID NUMBER                        a rate that a copy printed as "@rate N"
 *                         @O ID TEXT                          last lines of a copy that failed
 *                         @E ID NANOSECONDS STATUS CPU        all have ended; time, exit status and the
 *                                                             processor time of all, in nanoseconds
 *                         @clean
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/klog.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { COPIES_MAX = 64, KEPT = 4096, LINE_MAX_BYTES = 8192 };

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Processor time of all processes that were waited for. */
static long long used(void)
{
    struct rusage u;
    getrusage(RUSAGE_CHILDREN, &u);
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000000LL +
           (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1000LL;
}

static void fatal(const char *what)
{
    printf("@fatal %s: %s\n", what, strerror(errno));
    fflush(stdout);
    if (getpid() == 1) {
        sleep(1);
        reboot(RB_POWER_OFF);
    }
    exit(1);
}

/* First process of the initial RAM disk. */
static void initial(void)
{
    char name[256], path[300];
    FILE *order = fopen("/order", "r");
    printf("@init\n");
    fflush(stdout);
    /* The console is the line of requests and answers from here on. */
    klogctl(8, 0, 1);
    if (!order)
        fatal("/order");
    while (fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", name);
        int file = open(path, O_RDONLY);
        if (file < 0)
            fatal(path);
        if (syscall(SYS_finit_module, file, "", 0) && errno != EEXIST)
            fatal(path);
        close(file);
    }
    fclose(order);
    mkdir("/dev", 0755);
    mkdir("/root", 0755);
    /* The kernel mounts devtmpfs by itself only after this process. */
    mount("dev", "/dev", "devtmpfs", 0, 0);
    int n;
    for (n = 0; n < 500 && access("/dev/vda", F_OK); n++)
        usleep(10000);
    if (mount("/dev/vda", "/root", "ext4", MS_RDONLY, 0))
        fatal("mount /dev/vda");
    if (chdir("/root") || mount(".", "/", 0, MS_MOVE, 0) || chroot(".") || chdir("/"))
        fatal("change of the root");
    execl("/bench/bin/agent", "agent", "guest", (char *)0);
    fatal("/bench/bin/agent");
}

static void mounts(void)
{
    mount("dev", "/dev", "devtmpfs", 0, 0);
    mount("proc", "/proc", "proc", 0, 0);
    mount("sys", "/sys", "sysfs", 0, 0);
    mkdir("/dev/shm", 01777);
    mount("shm", "/dev/shm", "tmpfs", 0, 0);
    mount("run", "/run", "tmpfs", 0, 0);
    if (mount("tmp", "/tmp", "tmpfs", 0, "mode=1777"))
        fatal("mount /tmp");
}

static void serial(void)
{
    int line = open("/dev/ttyS0", O_RDWR);
    struct termios t;
    if (line < 0)
        fatal("/dev/ttyS0");
    tcgetattr(line, &t);
    cfmakeraw(&t);
    cfsetspeed(&t, B115200);
    tcsetattr(line, TCSANOW, &t);
    dup2(line, 0);
    dup2(line, 1);
    dup2(line, 2);
    if (line > 2)
        close(line);
}

struct copy {
    pid_t pid;
    int output;
    int status;
    size_t kept;
    char last[KEPT];
};

static void start(struct copy *c, int n, const char *command)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        fatal("pipe");
    c->kept = 0;
    c->output = ends[0];
    c->pid = fork();
    if (c->pid < 0)
        fatal("fork");
    if (c->pid == 0) {
        char dir[64];
        setpgid(0, 0);
        snprintf(dir, sizeof dir, "/tmp/scratch/%d", n);
        if (chdir(dir))
            _exit(126);
        int null = open("/dev/null", O_RDONLY);
        dup2(null, 0);
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        execl("/bin/sh", "sh", "-c", command, (char *)0);
        _exit(127);
    }
    setpgid(c->pid, c->pid);
    close(ends[1]);
}

/* Keeps the end of what a copy prints. */
static int take(struct copy *c)
{
    char piece[KEPT];
    ssize_t n = read(c->output, piece, sizeof piece);
    if (n <= 0)
        return 0;
    if (c->kept + n > KEPT - 1) {
        size_t drop = c->kept + n - (KEPT - 1);
        if (drop > c->kept)
            drop = c->kept;
        memmove(c->last, c->last + drop, c->kept - drop);
        c->kept -= drop;
    }
    size_t room = KEPT - 1 - c->kept;
    size_t skip = (size_t)n > room ? (size_t)n - room : 0;
    memcpy(c->last + c->kept, piece + skip, n - skip);
    c->kept += n - skip;
    return 1;
}

static void request(long id, int copies, int limit, const char *command)
{
    static struct copy all[COPIES_MAX];
    struct pollfd fds[COPIES_MAX];
    int n, open_ends = copies, status = 0;
    char dir[64];

    mkdir("/tmp/scratch", 0755);
    for (n = 0; n < copies; n++) {
        snprintf(dir, sizeof dir, "/tmp/scratch/%d", n);
        mkdir(dir, 0755);
    }
    long long begin = now(), until = begin + limit * 1000000000LL, used_before = used();
    printf("@B %ld %lld\n", id, begin);
    fflush(stdout);
    for (n = 0; n < copies; n++) {
        start(&all[n], n, command);
        fds[n] = (struct pollfd){ .fd = all[n].output, .events = POLLIN };
    }
    while (open_ends) {
        long long left = (until - now()) / 1000000;
        if (left <= 0 || poll(fds, copies, left > 1000 ? 1000 : (int)left) < 0) {
            for (n = 0; n < copies; n++)
                kill(-all[n].pid, SIGKILL);
            status = 124;
            break;
        }
        for (n = 0; n < copies; n++)
            if (fds[n].fd >= 0 && fds[n].revents && !take(&all[n])) {
                fds[n].fd = -1;
                open_ends--;
            }
    }
    for (n = 0; n < copies; n++)
        waitpid(all[n].pid, &all[n].status, 0);
    long long end = now();
    for (n = 0; n < copies; n++) {
        struct copy *c = &all[n];
        close(c->output);
        c->last[c->kept] = 0;
        if (c->status && !status)
            status = WIFEXITED(c->status) ? WEXITSTATUS(c->status) : 128 + WTERMSIG(c->status);
        char *rate = strstr(c->last, "@rate ");
        if (rate)
            printf("@V %ld %.*s\n", id, (int)strcspn(rate + 6, "\r\n"), rate + 6);
        if (c->status) {
            char *text = c->last + (c->kept > 400 ? c->kept - 400 : 0);
            for (char *p = text; *p; p++)
                if (*p < ' ')
                    *p = ' ';
            printf("@O %ld %s\n", id, text);
        }
    }
    printf("@E %ld %lld %d %lld\n", id, end, status, used() - used_before);
    fflush(stdout);
}

static void clean(void)
{
    while (waitpid(-1, 0, WNOHANG) > 0)
        ;
    if (fork() == 0) {
        execl("/bin/rm", "rm", "-rf", "/tmp/scratch", (char *)0);
        _exit(127);
    }
    wait(0);
    printf("@clean\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (!strcmp(argv[0], "/init"))
        initial();
    if (argc < 2)
        return 2;
    int guest = !strcmp(argv[1], "guest");
    clearenv();
    setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:/bench/bin", 1);
    setenv("HOME", "/tmp", 1);
    setenv("LC_ALL", "C", 1);
    setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
    if (guest) {
        mounts();
        serial();
    }
    if (system("exec /bin/sh /bench/prepare.sh"))
        fatal("/bench/prepare.sh");
    printf("@ready\n");
    fflush(stdout);
    static char line[LINE_MAX_BYTES];
    while (fgets(line, sizeof line, stdin)) {
        long id;
        int copies, limit, at = 0;
        line[strcspn(line, "\r\n")] = 0;
        if (!strcmp(line, "quit"))
            break;
        if (!strcmp(line, "clean")) {
            clean();
            continue;
        }
        if (sscanf(line, "%ld %d %d %n", &id, &copies, &limit, &at) != 3 || !at || copies < 1 ||
            copies > COPIES_MAX || limit < 1) {
            printf("@bad request\n");
            fflush(stdout);
            continue;
        }
        request(id, copies, limit, line + at);
    }
    if (guest)
        reboot(RB_POWER_OFF);
    return 0;
}
