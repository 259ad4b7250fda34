/*
 * launch REPORT WARM_MIB COMMAND...: run a command, and write into the file REPORT what it cost:
 * CLOCK_REALTIME right before the fork and when its end was seen (ns), the most memory that it had
 * resident (KiB), user and system time (us), wait status.
 *
 * The kernel counts the memory of a command from the fork on, so it is started by a program that is small itself.
 *
 * WARM_MIB of memory are touched and given back first. Where free memory is handed back to the host of a virtual machine, the first
 * touch of it is many times slower, which says nothing of the command.
 */
#include "beat.h"

#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>

static void warm(size_t n_bytes)
{
	char *at = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			-1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	madvise(at, n_bytes, MADV_HUGEPAGE);
	for (size_t i = 0; i < n_bytes; i += BOARD_PAGE)
		at[i] = 1;
}

int main(int argc, char **argv)
{
	struct rusage used;
	int64_t started, ended;
	FILE *report;
	int status;
	pid_t pid;

	if (argc < 4)
		return 2;
	/* In a child, so that this process stays small. */
	pid = fork();
	if (!pid) {
		size_t n_bytes = strtoul(argv[2], NULL, 0) << 20;

		if (n_bytes)
			warm(n_bytes);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	started = now_ns();
	pid = fork();
	if (!pid) {
		execvp(argv[3], argv + 3);
		die(argv[3]);
	}
	if (pid < 0 || wait4(pid, &status, 0, &used) != pid)
		die("run it");
	ended = now_ns();
	report = fopen(argv[1], "w");
	if (!report)
		die(argv[1]);
	fprintf(report, "%lld %lld %ld %lld %lld %d\n", (long long)started, (long long)ended, used.ru_maxrss,
		used.ru_utime.tv_sec * 1000000ll + used.ru_utime.tv_usec,
		used.ru_stime.tv_sec * 1000000ll + used.ru_stime.tv_usec, status);
	return fclose(report) ? 3 : 0;
}
