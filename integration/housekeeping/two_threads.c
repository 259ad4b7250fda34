/* What a debugger should find in a core file: two threads, and memory of every kind.

   two_threads FILE    maps FILE, says ready, ends when its input does

   Commands, a line each, answered when done: c changes what `change` says, f forks. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096L

struct point {
    int x;
    double y;
    char name[16];
};

struct point marked;
char *anonymous, *shared, *named, *in_memfd, *of_file, *of_unwritten;
static pthread_barrier_t both;

static void *map(long n_pages, int flags, int fd)
{
    void *at = mmap(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return at;
}

__attribute__((noinline)) static void *second_thread(void *argument)
{
    volatile long answer = 42 + (argument != NULL);
    pthread_barrier_wait(&both);
    for (;;)
        pause();
    return (void *)answer;
}

static void change(void)
{
    pthread_t thread;
    anonymous[3 * PAGE] = anonymous[4 * PAGE] = 'z';	/* one that was written, one that was not */
    memset(anonymous + 6 * PAGE, 'g', PAGE);		/* as it was */
    shared[2 * PAGE] = in_memfd[3 * PAGE] = of_file[2 * PAGE] = 'z';
    munmap(of_unwritten, 4 * PAGE);
    map(2, MAP_SHARED, 3);
    mprotect(named, 4 * PAGE, PROT_READ);
    close(4);
    open("/dev/null", O_WRONLY);
    open("/dev/zero", O_RDONLY);
    dup2(5, 2);
    pthread_create(&thread, NULL, second_thread, NULL);
    pthread_barrier_wait(&both);
}

__attribute__((noinline)) static void wait_for_end(int depth)
{
    volatile int kept = depth * 11;
    char byte;
    while (read(0, &byte, 1) > 0 && kept) {
        if (byte == '\n')
            continue;
        if (byte == 'c')
            change();
        if (byte == 'f' && fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
        puts("done");
        fflush(stdout);
    }
}

__attribute__((noinline)) static void go_deeper(int depth)
{
    if (depth < 4)
        go_deeper(depth + 1);
    else
        wait_for_end(depth);
    marked.x++; /* no tail call */
}

int main(int argc, char **argv)
{
    pthread_t thread;
    if (argc != 2)
        return 2;
    int fd = open(argv[1], O_RDWR);
    int memfd = memfd_create("kept", 0);
    if (fd < 0 || memfd < 0 || ftruncate(memfd, 8 * PAGE))
        return 3;
    anonymous = map(300, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (long at = 0; at < 300; at += 3)
        memset(anonymous + at * PAGE, 'a' + at % 26, PAGE);
    shared = map(4, MAP_SHARED | MAP_ANONYMOUS, -1);
    strcpy(shared + PAGE, "shared and anonymous");
    in_memfd = map(8, MAP_SHARED, memfd);
    strcpy(in_memfd + 2 * PAGE, "in a memfd");
    of_file = map(4, MAP_PRIVATE, fd);
    strcpy(of_file + PAGE, "written over the file");
    of_unwritten = map(4, MAP_PRIVATE, fd);
    named = map(4, MAP_SHARED, fd);
    marked.x = 7;
    marked.y = 2.5;
    strcpy(marked.name, "remembered");
    pthread_barrier_init(&both, NULL, 2);
    pthread_create(&thread, NULL, second_thread, NULL);
    pthread_barrier_wait(&both);
    puts("ready");
    fflush(stdout);
    go_deeper(0);
    return 0;
}
