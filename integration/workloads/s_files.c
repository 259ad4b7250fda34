/*
 * s_files: every kind of open file that a single process can have to itself.
 *
 * Regular files (offset, append, path-only, shared offsets, one file opened twice, a name with a space, one at
 * a high number), directories, /dev/null, /dev/zero, /dev/urandom, pipes with both ends here (partly read, empty and
 * non-blocking, of a chosen size, in packet mode), eventfds. Files are written into the working
 * directory and stay there. `step log` and `step write` make their files grow, so those differ from a
 * dump's time if an older generation is restored; what was written before must be there all the same.
 */
#include "workload.h"

#include <sys/eventfd.h>
#include <sys/sysmacros.h>

#define N_TEXT 20000		/* bytes of the file that is only read */
#define MAX_FILES 40
#define MAX_LINES 1000

/* What the kernel must say of a descriptor. */
struct file {
	const char *name;
	int fd, status_flags, fd_flags;
	bool seekable;
	off_t offset;
	char link[256];			/* as in /proc/self/fd */
};

static struct file files[MAX_FILES];
static int n_files;
static char directory[200];

static unsigned char text_byte(size_t at)
{
	return (unsigned char)(mix64(at / 8) >> at % 8 * 8);
}

static void read_link(int fd, char *link, size_t size)
{
	char path[64];
	ssize_t n;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	n = readlink(path, link, size - 1);
	link[n < 0 ? 0 : n] = 0;
}

/* Remember everything about a descriptor that must stay. */
static struct file *keep(const char *name, int fd)
{
	struct file *file = &files[n_files++];

	if (fd < 0)
		die("%s", name);
	*file = (struct file){.name = name, .fd = fd, .status_flags = fcntl(fd, F_GETFL),
			      .fd_flags = fcntl(fd, F_GETFD), .offset = lseek(fd, 0, SEEK_CUR)};
	file->seekable = file->offset >= 0;
	read_link(fd, file->link, sizeof file->link);
	return file;
}

static void note_offset(struct file *file)
{
	file->offset = lseek(file->fd, 0, SEEK_CUR);
}

static void check_file(const struct file *f)
{
	char link[256];

	read_link(f->fd, link, sizeof link);
	/* The number in "pipe:[4711]" is the kernel's own. */
	EXPECT(!strncmp(link, f->link, f->link[0] == '/' ? sizeof link : strcspn(f->link, "[") + 1),
	       "%s (fd %d) is %s, was %s", f->name, f->fd, link, f->link);
	EXPECT(fcntl(f->fd, F_GETFL) == f->status_flags, "%s has flags %o, had %o", f->name,
	       (unsigned)fcntl(f->fd, F_GETFL), (unsigned)f->status_flags);
	EXPECT(fcntl(f->fd, F_GETFD) == f->fd_flags, "%s has close-on-exec %d, had %d", f->name,
	       fcntl(f->fd, F_GETFD), f->fd_flags);
	EXPECT(!f->seekable || lseek(f->fd, 0, SEEK_CUR) == f->offset, "%s is at %ld, was at %ld", f->name,
	       (long)lseek(f->fd, 0, SEEK_CUR), (long)f->offset);
}

/* ---- regular files ---------------------------------------------------------------------------- */

static struct file *reader, *twin, *shared, *shared_dup, *logger, *grower, *high, *path_only;
static struct { off_t at; int number; } lines[MAX_LINES];
static int n_lines;

static int open_text(int flags)
{
	char path[64];

	snprintf(path, sizeof path, "s_files-%d text", (int)getpid());
	return open(path, flags, 0600);
}

static int open_own(const char *what, int flags)
{
	char path[64];

	snprintf(path, sizeof path, "s_files-%d.%s", (int)getpid(), what);
	return open(path, flags | O_CREAT | O_TRUNC, 0640);
}

static void prepare_regular(void)
{
	unsigned char text[N_TEXT];
	int fd = open_text(O_WRONLY | O_CREAT | O_TRUNC);

	for (size_t i = 0; i < N_TEXT; i++)
		text[i] = text_byte(i);
	write_all(fd, text, sizeof text);
	close(fd);
	reader = keep("reader", open_text(O_RDONLY | O_CLOEXEC));
	lseek(reader->fd, 777, SEEK_SET);
	note_offset(reader);
	twin = keep("same file opened again", open_text(O_RDONLY | O_NOATIME));
	shared = keep("shared", open_text(O_RDONLY));
	lseek(shared->fd, 4242, SEEK_SET);
	note_offset(shared);
	shared_dup = keep("duplicate of shared", fcntl(shared->fd, F_DUPFD_CLOEXEC, 30));
	path_only = keep("path only", open_text(O_PATH | O_CLOEXEC));
	high = keep("high number", dup2(reader->fd, 900));
	keep("beyond the end", open_text(O_RDONLY));
	lseek(files[n_files - 1].fd, N_TEXT + 5000, SEEK_SET);
	note_offset(&files[n_files - 1]);
	logger = keep("log", open_own("log", O_WRONLY | O_APPEND | O_CLOEXEC));
	grower = keep("grower", open_own("grower", O_RDWR | O_DSYNC));
}

static void advance(struct file *file, size_t n)
{
	unsigned char got[512];
	off_t from = file->offset;

	EXPECT(read(file->fd, got, n) == (ssize_t)n, "%s: short read", file->name);
	for (size_t i = 0; i < n; i++)
		if (got[i] != text_byte((size_t)from + i)) {
			fail("%s: wrong byte at %ld", file->name, (long)from + (long)i);
			break;
		}
	note_offset(file);
}

static void step_read(void)
{
	if (reader->offset > N_TEXT - 1000)
		lseek(reader->fd, reader->offset = 0, SEEK_SET);
	advance(reader, 97);
	high->offset = reader->offset;
	if (shared->offset > N_TEXT - 1000)
		lseek(shared->fd, shared->offset = 0, SEEK_SET);
	shared_dup->offset = shared->offset;
	advance(shared_dup, 53);		/* moves the other one, too */
	shared->offset = shared_dup->offset;
}

static void step_log(void)
{
	char line[32];
	int len = sprintf(line, "line %06d of the log\n", n_lines);

	if (n_lines == MAX_LINES)
		return;
	write_all(logger->fd, line, (size_t)len);
	note_offset(logger);
	lines[n_lines].at = logger->offset - len;
	lines[n_lines].number = n_lines;
	n_lines++;
}

/* Where the last write ended, the next begins: also when a later run of the same program was there. */
static void step_write(void)
{
	unsigned char data[100];

	for (size_t i = 0; i < sizeof data; i++)
		data[i] = text_byte((size_t)grower->offset + i);
	write_all(grower->fd, data, sizeof data);
	note_offset(grower);
}

static void check_regular(void)
{
	unsigned char byte;
	char line[32], expected[32], path[64];
	int log;
	struct stat by_fd, by_name;

	snprintf(path, sizeof path, "s_files-%d.log", (int)getpid());
	log = open(path, O_RDONLY | O_CLOEXEC);
	for (int i = 0; i < n_lines; i++) {
		int len = sprintf(expected, "line %06d of the log\n", lines[i].number);

		EXPECT(pread(log, line, (size_t)len, lines[i].at) == len && !memcmp(line, expected, (size_t)len),
		       "log line %d is not at %ld", i, (long)lines[i].at);
	}
	close(log);
	for (off_t at = 0; at < grower->offset; at++)
		EXPECT(pread(grower->fd, &byte, 1, at) == 1 && byte == text_byte((size_t)at),
		       "grower: wrong byte at %ld", (long)at);
	EXPECT(read(path_only->fd, &byte, 1) < 0 && errno == EBADF, "a path-only descriptor can be read");
	EXPECT(!fstat(path_only->fd, &by_fd) && !stat(path_only->link, &by_name) &&
	       by_fd.st_ino == by_name.st_ino, "the path-only descriptor is another file");
	/* Who shares an offset with whom. */
	lseek(shared->fd, 11, SEEK_SET);
	EXPECT(lseek(shared_dup->fd, 0, SEEK_CUR) == 11, "the duplicate has an offset of its own");
	lseek(shared->fd, shared->offset, SEEK_SET);
	lseek(reader->fd, 12, SEEK_SET);
	EXPECT(lseek(high->fd, 0, SEEK_CUR) == 12, "the high number has an offset of its own");
	EXPECT(lseek(twin->fd, 0, SEEK_CUR) == twin->offset, "two open files share an offset");
	lseek(reader->fd, reader->offset, SEEK_SET);
}

/* ---- directories and devices ------------------------------------------------------------------ */

static struct file *folder, *null, *zero, *random_source;

static void prepare_others(void)
{
	char entries[256];

	folder = keep("directory", open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	syscall(SYS_getdents64, folder->fd, entries, 80);	/* a few entries, not all */
	note_offset(folder);
	keep("directory, path only", open("..", O_PATH | O_DIRECTORY));
	null = keep("/dev/null", open("/dev/null", O_RDWR));
	zero = keep("/dev/zero", open("/dev/zero", O_RDONLY | O_CLOEXEC));
	random_source = keep("/dev/urandom", open("/dev/urandom", O_RDONLY));
}

static void check_device(const struct file *file, unsigned minor_number, const char *content, size_t n)
{
	struct stat st;
	char got[8];

	EXPECT(!fstat(file->fd, &st) && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, minor_number),
	       "%s is another device", file->name);
	EXPECT(read(file->fd, got, sizeof got) == (ssize_t)n && (!content || !memcmp(got, content, n)),
	       "%s does not read as it should", file->name);
}

static void check_others(void)
{
	char name[64];
	int fd;

	snprintf(name, sizeof name, "s_files-%d.log", (int)getpid());
	fd = openat(folder->fd, name, O_RDONLY | O_CLOEXEC);
	EXPECT(fd >= 0, "the directory does not hold %s", name);
	close(fd);
	check_device(null, 3, "", 0);
	check_device(zero, 5, "\0\0\0\0\0\0\0", 8);
	check_device(random_source, 9, NULL, 8);
	EXPECT(write(null->fd, "gone", 4) == 4, "/dev/null takes nothing");
}

/* ---- pipes ------------------------------------------------------------------------------------ */

struct pipe {
	const char *name;
	int ends[2], size;
	uint64_t n_in, n_out;		/* bytes written to and read from it so far */
};

static struct pipe queue = {.name = "pipe"}, empty = {.name = "empty pipe"}, big = {.name = "big pipe"},
		   packets = {.name = "packet pipe"};
static size_t packet_lens[64], n_packets, first_packet;

static void put(struct pipe *pipe, size_t n)
{
	unsigned char data[70000];

	for (size_t i = 0; i < n; i++)
		data[i] = text_byte((size_t)pipe->n_in + i);
	write_all(pipe->ends[1], data, n);
	pipe->n_in += n;
}

static void get(struct pipe *pipe, size_t n)
{
	unsigned char data[5000];

	EXPECT(read(pipe->ends[0], data, n) == (ssize_t)n, "%s: short read", pipe->name);
	for (size_t i = 0; i < n; i++)
		EXPECT(data[i] == text_byte((size_t)pipe->n_out + i), "%s: wrong byte read", pipe->name);
	pipe->n_out += n;
}

static void open_pipe(struct pipe *pipe, int flags, int size)
{
	if (pipe2(pipe->ends, flags))
		die("pipe2");
	if (size && fcntl(pipe->ends[1], F_SETPIPE_SZ, size) < 0)
		die("F_SETPIPE_SZ");
	pipe->size = fcntl(pipe->ends[0], F_GETPIPE_SZ);
	keep(pipe->name, pipe->ends[0]);
	keep(pipe->name, pipe->ends[1]);
}

static void put_packet(size_t len)
{
	put(&packets, len);
	packet_lens[n_packets++ % LEN(packet_lens)] = len;
}

static void prepare_pipes(void)
{
	open_pipe(&queue, 0, 0);
	put(&queue, 5000);
	put(&queue, 300);
	put(&queue, 5000);
	get(&queue, 1234);
	keep("write end again", fcntl(queue.ends[1], F_DUPFD_CLOEXEC, 50));
	open_pipe(&empty, O_NONBLOCK | O_CLOEXEC, 0);
	open_pipe(&big, O_CLOEXEC, 1 << 18);
	put(&big, 70000);
	put(&big, 70000);
	open_pipe(&packets, O_DIRECT | O_NONBLOCK, 1 << 16);
	put_packet(10);
	put_packet(1);
	put_packet(4096);
	put_packet(333);
}

static void step_pipe(void)
{
	get(&queue, 100);
	put(&queue, 100);
	if (n_packets - first_packet > 3)
		get(&packets, packet_lens[first_packet++ % LEN(packet_lens)]);
	put_packet(1 + n_packets * 7 % 50);
}

/* Look at what is queued without taking it out: tee() puts the same bytes into a pipe of ours. */
static void check_pipe(const struct pipe *pipe)
{
	static unsigned char data[1 << 18];
	size_t queued = (size_t)(pipe->n_in - pipe->n_out), packet = first_packet;
	int scratch[2];
	ssize_t n, at = 0;

	EXPECT(fcntl(pipe->ends[1], F_GETPIPE_SZ) == pipe->size, "%s holds up to %d bytes, was %d", pipe->name,
	       fcntl(pipe->ends[1], F_GETPIPE_SZ), pipe->size);
	if (pipe2(scratch, O_NONBLOCK | O_CLOEXEC) || fcntl(scratch[0], F_SETPIPE_SZ, 1 << 18) < 0)
		die("scratch pipe");
	n = tee(pipe->ends[0], scratch[1], sizeof data, SPLICE_F_NONBLOCK);
	EXPECT(n == (ssize_t)queued || (!queued && n < 0 && errno == EAGAIN), "%s holds %zd bytes, not %zu",
	       pipe->name, n, queued);
	while ((n = read(scratch[0], data + at, sizeof data - (size_t)at)) > 0) {
		EXPECT(pipe != &packets || n == (ssize_t)packet_lens[packet++ % LEN(packet_lens)],
		       "a packet has %zd bytes", n);
		at += n;
	}
	for (size_t i = 0; i < queued; i++)
		if (data[i] != text_byte((size_t)pipe->n_out + i)) {
			fail("%s: queued byte %zu is wrong", pipe->name, i);
			break;
		}
	close(scratch[0]);
	close(scratch[1]);
}

/* ---- eventfds --------------------------------------------------------------------------------- */

static int plain, semaphore;
static uint64_t plain_count = 7, semaphore_count = 3;

static void prepare_eventfds(void)
{
	plain = eventfd((unsigned)plain_count, EFD_CLOEXEC);
	semaphore = eventfd((unsigned)semaphore_count, EFD_SEMAPHORE | EFD_NONBLOCK);
	keep("eventfd", plain);
	keep("eventfd as a semaphore", semaphore);
}

static void step_eventfd(void)
{
	eventfd_write(plain, 5);
	plain_count += 5;
	eventfd_write(semaphore, 2);
	semaphore_count += 2;
}

static void check_eventfds(void)
{
	eventfd_t value, taken = 0;

	EXPECT(!eventfd_read(plain, &value) && value == plain_count, "eventfd holds %lu", value);
	eventfd_write(plain, plain_count);
	while (!eventfd_read(semaphore, &value)) {
		EXPECT(value == 1, "the semaphore gave %lu at once", value);
		taken++;
		if (value != 1)
			break;
	}
	EXPECT(taken == semaphore_count, "the semaphore holds %lu, not %lu", taken, semaphore_count);
	eventfd_write(semaphore, semaphore_count);
}

/* ---- all of it -------------------------------------------------------------------------------- */

static void check(void)
{
	char now[200];

	EXPECT(getcwd(now, sizeof now) && !strcmp(now, directory), "the working directory is %s", now);
	for (int i = 0; i < n_files; i++)
		check_file(&files[i]);
	check_regular();
	check_others();
	check_pipe(&queue);
	check_pipe(&empty);
	check_pipe(&big);
	check_pipe(&packets);
	check_eventfds();
}

static void damage_offset(void) { lseek(reader->fd, 1, SEEK_CUR); }
static void damage_append(void) { fcntl(logger->fd, F_SETFL, 0); }
static void damage_cloexec(void) { fcntl(shared_dup->fd, F_SETFD, 0); }
static void damage_sharing(void) { close(high->fd); dup2(open_text(O_RDONLY), 900); lseek(900, 777, SEEK_SET); }
static void damage_identity(void) { dup2(zero->fd, null->fd); }
static void damage_pipe(void) { char byte; EXPECT(read(queue.ends[0], &byte, 1) == 1, "empty"); }
static void damage_pipe_size(void) { fcntl(empty.ends[0], F_SETPIPE_SZ, 8192); }
static void damage_packets(void) { char byte; EXPECT(read(packets.ends[0], &byte, 1) == 1, "empty"); }
static void damage_eventfd(void) { eventfd_write(plain, 1); }
static void damage_semaphore(void) { eventfd_write(semaphore, 1); }
static void damage_closed(void) { close(folder->fd); }

int main(void)
{
	static const struct named steps[] = {
		{"read", step_read}, {"log", step_log}, {"write", step_write}, {"pipe", step_pipe},
		{"eventfd", step_eventfd}, {NULL, NULL}};
	static const struct named damages[] = {
		{"offset", damage_offset}, {"append", damage_append}, {"cloexec", damage_cloexec},
		{"sharing", damage_sharing}, {"identity", damage_identity}, {"pipe", damage_pipe},
		{"pipe_size", damage_pipe_size}, {"packets", damage_packets}, {"eventfd", damage_eventfd},
		{"semaphore", damage_semaphore}, {"closed", damage_closed}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	if (!getcwd(directory, sizeof directory))
		die("getcwd");
	prepare_regular();
	prepare_others();
	prepare_pipes();
	prepare_eventfds();
	step_log();
	step_write();
	return serve(&program);
}
