//! The library in real programs, with the real UCX, libfabric, Open MPI and MPICH.

mod cache;
mod dormant;
mod mpi;
mod rdma;
mod support;
