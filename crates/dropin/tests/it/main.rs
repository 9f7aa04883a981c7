//! The library in real programs, with the real UCX, libfabric, Open MPI and MPICH.

mod cache;
mod dormant;
mod ends;
mod first_use;
mod importer;
mod java;
mod loading;
mod mpi;
mod patcher;
mod rdma;
mod support;
