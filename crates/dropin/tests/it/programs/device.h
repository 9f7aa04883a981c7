/* The device of the caches: fixed buffers of an io_uring, whose pages the kernel pins. All
 * functions but device_write are thread-safe. */
#ifndef DEVICE_H
#define DEVICE_H
#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { DEVICE_SLOTS = 4096, DEVICE_BYTES = 64 };

static struct {
    int ring, source;
    char *sq, *cq;
    struct io_uring_sqe *sqes;
    struct io_uring_params params;
    atomic_uint next;
    int is_off; /* Registrations do nothing: measures the cache alone. */
} device;

static void device_die(const char *what)
{
    perror(what);
    exit(2);
}

static void device_open(void)
{
    struct io_uring_rsrc_register table = { .nr = DEVICE_SLOTS, .flags = IORING_RSRC_REGISTER_SPARSE };
    char bytes[DEVICE_BYTES];
    memset(bytes, 0x5a, sizeof bytes);
    device.ring = (int)syscall(SYS_io_uring_setup, 4, &device.params);
    if (device.ring < 0)
        device_die("io_uring_setup");
    if (syscall(SYS_io_uring_register, device.ring, IORING_REGISTER_BUFFERS2, &table, sizeof table))
        device_die("IORING_REGISTER_BUFFERS2");
    int flags = PROT_READ | PROT_WRITE;
    device.sq = mmap(NULL, 4096, flags, MAP_SHARED, device.ring, IORING_OFF_SQ_RING);
    device.cq = mmap(NULL, 4096, flags, MAP_SHARED, device.ring, IORING_OFF_CQ_RING);
    device.sqes = mmap(NULL, 4096, flags, MAP_SHARED, device.ring, IORING_OFF_SQES);
    device.source = memfd_create("bytes", MFD_CLOEXEC);
    if (device.sq == MAP_FAILED || device.cq == MAP_FAILED || device.sqes == MAP_FAILED || device.source < 0 ||
        write(device.source, bytes, sizeof bytes) != sizeof bytes)
        device_die("the ring");
}

static int device_set(unsigned slot, void *start, size_t length)
{
    struct iovec buffer = { start, length };
    struct io_uring_rsrc_update2 update = { .offset = slot, .data = (uintptr_t)&buffer, .nr = 1 };
    long done = syscall(SYS_io_uring_register, device.ring, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
    return done == 1 ? 0 : -errno;
}

/* Returns a slot that no registration has used before, or -1. */
static long device_register(void *start, size_t length)
{
    unsigned slot = atomic_fetch_add(&device.next, 1);
    if (device.is_off)
        return slot;
    return slot < DEVICE_SLOTS && device_set(slot, start, length) == 0 ? (long)slot : -1;
}

static void device_deregister(long slot)
{
    if (!device.is_off && slot >= 0)
        device_set((unsigned)slot, NULL, 0);
}

/* Writes DEVICE_BYTES of 0x5a to `at` through the pages of `slot`. Returns 0 or the kernel's
 * error. */
static int device_write(long slot, void *at)
{
    unsigned *tail = (unsigned *)(device.sq + device.params.sq_off.tail);
    unsigned *array = (unsigned *)(device.sq + device.params.sq_off.array);
    unsigned mask = *(unsigned *)(device.sq + device.params.sq_off.ring_mask), index = *tail & mask;
    device.sqes[index] = (struct io_uring_sqe){ .opcode = IORING_OP_READ_FIXED,
                                                .fd = device.source,
                                                .addr = (uintptr_t)at,
                                                .len = DEVICE_BYTES,
                                                .buf_index = (uint16_t)slot };
    array[index] = index;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, device.ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
        device_die("io_uring_enter");
    unsigned *head = (unsigned *)(device.cq + device.params.cq_off.head);
    unsigned cq_mask = *(unsigned *)(device.cq + device.params.cq_off.ring_mask);
    struct io_uring_cqe *cqe = (struct io_uring_cqe *)(device.cq + device.params.cq_off.cqes) + (*head & cq_mask);
    int result = cqe->res;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return result == DEVICE_BYTES ? 0 : result ? result : -EIO;
}
#endif
