/* Two ranks or more exchange buffers that are freed, unmapped or discarded between rounds, and
 * check every byte.
 *
 * exchange SECONDS [ROUNDS]: prints "N rounds, M bytes wrong" on rank 0; exits 1 if a byte was
 * wrong. If ROUNDS is given, SECONDS has no effect. */
#define _GNU_SOURCE
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { LARGEST = 1 << 20 };

static unsigned char content(unsigned round, int from, size_t at)
{
    return (unsigned char)(round * 31 + (unsigned)from * 17 + at * 7 + (at >> 12));
}

/* A system call by an instruction of this program, which libc does not see. */
static void bare(long number, void *start, size_t length, long third)
{
#ifdef __aarch64__
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = (long)start;
    register long x1 __asm__("x1") = (long)length;
    register long x2 __asm__("x2") = third;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
#else
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(start), "S"(length), "d"(third)
                     : "rcx", "r11", "memory");
#endif
}

enum { MALLOC, MUNMAP, BARE_MUNMAP, BARE_DISCARD, WAYS };

/* Makes a buffer in one of several ways. `give` gives it back in the matching way: a buffer that is
 * only discarded stays mapped, and `take` returns it again. */
static unsigned char *take(unsigned way, unsigned char **kept, size_t length)
{
    if (way == MALLOC)
        return malloc(length);
    if (way == BARE_DISCARD && *kept)
        return *kept;
    void *at = mmap(NULL, way == BARE_DISCARD ? LARGEST : length, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return NULL;
    if (way == BARE_DISCARD)
        *kept = at;
    return at;
}

static void give(unsigned way, unsigned char *buffer, size_t length)
{
    if (way == MALLOC)
        free(buffer);
    else if (way == MUNMAP)
        munmap(buffer, length);
    else if (way == BARE_MUNMAP)
        bare(SYS_munmap, buffer, length, 0);
    else
        bare(SYS_madvise, buffer, LARGEST, MADV_DONTNEED);
}

int main(int argc, char **argv)
{
    double limit = argc > 1 ? atof(argv[1]) : 1;
    unsigned most = argc > 2 ? (unsigned)atoi(argv[2]) : 0;
    int rank, size, going = 1;
    unsigned long wrong = 0, all = 0;
    unsigned round = 0;
    unsigned char *kept[2] = {NULL, NULL};
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    double begin = MPI_Wtime();
    while (going) {
        size_t length = (size_t)1 << (8 + round % 13);
        unsigned way_out = round % WAYS, way_in = (round + 1) % WAYS;
        unsigned char *out = take(way_out, &kept[0], length), *in = take(way_in, &kept[1], length);
        if (!out || !in)
            MPI_Abort(MPI_COMM_WORLD, 2);
        for (size_t at = 0; at < length; at++)
            out[at] = content(round, rank, at);
        memset(in, 0xee, length);
        int next = (rank + 1) % size, last = (rank + size - 1) % size;
        MPI_Sendrecv(out, (int)length, MPI_BYTE, next, 0, in, (int)length, MPI_BYTE, last, 0, MPI_COMM_WORLD,
                     MPI_STATUS_IGNORE);
        for (size_t at = 0; at < length; at++)
            wrong += in[at] != content(round, last, at);
        size_t part = length / (size_t)size;
        MPI_Alltoall(out, (int)part, MPI_BYTE, in, (int)part, MPI_BYTE, MPI_COMM_WORLD);
        for (int from = 0; from < size; from++)
            for (size_t at = 0; at < part; at++)
                wrong += in[(size_t)from * part + at] != content(round, from, (size_t)rank * part + at);
        give(way_out, out, length);
        give(way_in, in, length);
        round++;
        going = most ? round < most : MPI_Wtime() - begin < limit;
        MPI_Bcast(&going, 1, MPI_INT, 0, MPI_COMM_WORLD);
    }
    MPI_Reduce(&wrong, &all, 1, MPI_UNSIGNED_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0)
        printf("%u rounds, %lu bytes wrong\n", round, all);
    MPI_Bcast(&all, 1, MPI_UNSIGNED_LONG, 0, MPI_COMM_WORLD);
    MPI_Finalize();
    return all != 0;
}
