// Writes below one folder that fail when a test says so; loaded by LD_PRELOAD into a job and all that it starts.
//
// Whatever a process writes with (Python, torch, safetensors, Arrow), it comes through these functions of the C library.
// The folder and a file of shared state are named by the environment; see failing_storage.py, which is the other side.

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

struct State {
    std::atomic<int64_t> error;    // what a refused call says (errno); 0: nothing is refused
    std::atomic<int64_t> is_full;  // whether bytes are counted, and all calls refused after them; else calls are
    std::atomic<int64_t> left;     // bytes, or calls, that pass before
    std::atomic<int64_t> refusals; // calls that are then refused
    std::atomic<int64_t> refused;  // calls that were
    std::atomic<int64_t> period;   // 0, or of every so many calls the last is refused
};

State *state = nullptr;
char folder[4096];
size_t length = 0;

__attribute__((constructor)) void open_state() {
    const char *place = getenv("OML_RAY_TEST_STORAGE"), *file = getenv("OML_RAY_TEST_STORAGE_STATE");
    if (!place || !file || strlen(place) >= sizeof folder) return;
    int opened = open(file, O_RDWR | O_CLOEXEC);
    if (opened < 0) return;
    void *mapped = mmap(nullptr, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, opened, 0);
    close(opened);
    if (mapped == MAP_FAILED) return;
    strcpy(folder, place);
    length = strlen(folder);
    state = static_cast<State *>(mapped);
}

bool is_armed() { return state && state->error.load(); }

bool is_below(const char *path) { return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]); }

bool is_below(int fd) {
    char link[64] = "/proc/self/fd/", digits[16], path[sizeof folder + 64];
    size_t count = 0, end = strlen(link);
    for (int rest = fd; count == 0 || rest; rest /= 10) digits[count++] = char('0' + rest % 10);
    while (count) link[end++] = digits[--count];
    link[end] = 0;
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return false;
    path[size] = 0;
    return is_below(path);
}

// How many of `size` bytes may be written now; -1, with errno set, where none may. A call without bytes counts as one.
ssize_t allowed(ssize_t size) {
    if (state->is_full.load()) {
        int64_t needed = size ? size : 1, left = state->left.fetch_sub(needed);
        if (left >= needed) return size;
        if (left > 0) return size ? left : 0; // what still fits, as of a disk that becomes full
    } else if (int64_t period = state->period.load()) {
        if (state->left.fetch_sub(1) % period != 1 - period) return size;
    } else {
        if (state->left.fetch_sub(1) > 0) return size;
        if (state->refusals.fetch_sub(1) <= 0) return size;
    }
    state->refused.fetch_add(1);
    errno = int(state->error.load());
    return -1;
}

bool refuses(const char *path) { return is_armed() && path && is_below(path) && allowed(0) < 0; }

} // namespace

extern "C" {

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t now = ssize_t(size);
    if (size && is_armed() && is_below(fd) && (now = allowed(now)) < 0) return -1;
    return syscall(SYS_write, fd, data, size_t(now));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    ssize_t now = ssize_t(size);
    if (size && is_armed() && is_below(fd) && (now = allowed(now)) < 0) return -1;
    return syscall(SYS_pwrite64, fd, data, size_t(now), offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }

ssize_t writev(int fd, const iovec *parts, int count) {
    if (!is_armed() || !is_below(fd)) return syscall(SYS_writev, fd, parts, count);
    for (int part = 0; part < count; ++part) // the first that is not empty: a caller goes on with the rest
        if (parts[part].iov_len) return write(fd, parts[part].iov_base, parts[part].iov_len);
    return 0;
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    return refuses(to) ? -1 : int(syscall(SYS_renameat2, from_fd, from, to_fd, to, flags));
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    return renameat2(from_fd, from, to_fd, to, 0);
}

int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int mkdirat(int fd, const char *path, mode_t mode) {
    return refuses(path) ? -1 : int(syscall(SYS_mkdirat, fd, path, mode));
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
}
