//! The C interface, from C.
