/* Preloaded into a coordinator: keeps of every file below a folder what the file held when it was synced last.
 *
 * POWER_CUT_ROOT is the folder, POWER_CUT_SHADOW another on the same file system, with the folders files, folders and
 * held in it. fsync and fdatasync write nothing to the disk; they copy a file to files/INODE, a folder's entries to
 * folders/INODE, and link what they saw to held/INODE, so that no inode is used for another file later. From the
 * shadow and from what lies in the folder at the moment of a cut, power_cut.py makes what a power cut may leave.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void in_shadow(char *path, const char *kind, unsigned long long inode) {
    snprintf(path, PATH_MAX, "%s/%s/%llu", getenv("POWER_CUT_SHADOW"), kind, inode);
}

static int keep(int fd) {
    const char *root = getenv("POWER_CUT_ROOT");
    char own[64], path[PATH_MAX], part[PATH_MAX], block[1 << 16];
    struct stat status;
    snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(own, path, sizeof path - 1);
    if (fstat(fd, &status) != 0) return -1;
    if (!root || length < 0 || strncmp(path, root, strlen(root)) != 0) return 0;
    snprintf(part, sizeof part, "%s/part-%ld", getenv("POWER_CUT_SHADOW"), (long)syscall(SYS_gettid));
    int out = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int in = open(own, O_RDONLY | O_CLOEXEC);
    if (in < 0 || out < 0) abort();
    if (S_ISDIR(status.st_mode)) {
        DIR *folder = fdopendir(in);
        for (struct dirent *entry; (entry = readdir(folder));) {
            if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
            dprintf(out, "%llu %s\n", (unsigned long long)entry->d_ino, entry->d_name);
            in_shadow(path, "held", entry->d_ino);
            linkat(dirfd(folder), entry->d_name, AT_FDCWD, path, 0);
        }
        closedir(folder);
        in_shadow(path, "folders", status.st_ino);
    } else {
        for (ssize_t count; (count = read(in, block, sizeof block)) > 0;)
            if (write(out, block, count) != count) abort();
        close(in);
        in_shadow(path, "held", status.st_ino);
        linkat(AT_FDCWD, own, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
        in_shadow(path, "files", status.st_ino);
    }
    close(out);
    if (rename(part, path) != 0) abort();
    return 0;
}

int fsync(int fd) { return keep(fd); }
int fdatasync(int fd) { return keep(fd); }
