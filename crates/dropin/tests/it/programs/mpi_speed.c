/* Latency and bandwidth between two ranks: "BYTES latency US bandwidth MB/S" a line, the best of
 * many short bursts, which leaves out most of the time that other programs on the machine take. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LARGEST = 1 << 22, WINDOW = 16 };

static char *out, *in;

/* One way of a ping-pong, in seconds. */
static double ping_pong(int rank, int size, int rounds)
{
    MPI_Barrier(MPI_COMM_WORLD);
    double begin = MPI_Wtime();
    for (int i = 0; i < rounds; i++) {
        if (rank == 0)
            MPI_Send(out, size, MPI_BYTE, 1, 0, MPI_COMM_WORLD);
        MPI_Recv(in, size, MPI_BYTE, !rank, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        if (rank == 1)
            MPI_Send(out, size, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
    }
    return (MPI_Wtime() - begin) / rounds / 2;
}

/* One message of a window of messages in one direction, in seconds. */
static double window(int rank, int size, int count)
{
    MPI_Request requests[WINDOW];
    MPI_Barrier(MPI_COMM_WORLD);
    double begin = MPI_Wtime();
    for (int i = 0; i < count; i++)
        if (rank == 0)
            MPI_Isend(out, size, MPI_BYTE, 1, 1, MPI_COMM_WORLD, &requests[i]);
        else
            MPI_Irecv(in, size, MPI_BYTE, 0, 1, MPI_COMM_WORLD, &requests[i]);
    MPI_Waitall(count, requests, MPI_STATUSES_IGNORE);
    if (rank == 0)
        MPI_Recv(in, 1, MPI_BYTE, 1, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    else
        MPI_Send(out, 1, MPI_BYTE, 0, 2, MPI_COMM_WORLD);
    return (MPI_Wtime() - begin) / count;
}

int main(int argc, char **argv)
{
    static const struct {
        int size, rounds, count, bursts;
    } all[] = { { 8, 500, WINDOW, 150 }, { 1 << 16, 50, WINDOW, 150 }, { LARGEST, 4, 4, 60 } };
    int rank;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    out = malloc(LARGEST);
    in = malloc(LARGEST);
    memset(out, 1, LARGEST);
    memset(in, 2, LARGEST);
    for (unsigned which = 0; which < sizeof all / sizeof *all; which++) {
        double latency = 1e9, each = 1e9;
        for (int burst = 0; burst < all[which].bursts; burst++) {
            double time = ping_pong(rank, all[which].size, all[which].rounds);
            latency = time < latency ? time : latency;
            time = window(rank, all[which].size, all[which].count);
            each = time < each ? time : each;
        }
        if (rank == 0)
            printf("%d latency %.3f bandwidth %.0f\n", all[which].size, latency * 1e6, all[which].size / each / 1e6);
    }
    MPI_Finalize();
    return 0;
}
